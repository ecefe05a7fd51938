"""A 2D network on every frame, then pooling, attention or an LSTM over time.

In reading order: ``frame_average`` (the baseline), ``frame_sequence`` (an image network on every frame), ``lstm`` (a
stacked LSTM whose state the caller carries), ``attention``; then the models: ``lrcn``, ``snippets``, ``multi_lstm``,
``attention_lstm``, ``visual_attention``.
"""
