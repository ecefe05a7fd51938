"""Recurrent networks whose state is a vector or a map, and the forecaster built from them.

In reading order: ``fc_lstm`` (on vectors), ``conv_lstm`` and ``conv_gru`` (on maps), ``recurrence`` (stacking,
directions and padding, shared by the three), ``lstm_unroll`` (the loop over a sequence with its gradient written
out), ``forecaster`` (reads frames, predicts those to come), ``gru_rcn`` (a recurrence on every level of an image
network), ``variants`` (the published networks by name).
"""
