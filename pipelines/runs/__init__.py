"""The folder of a run, its records, and what is sent to trackers.

In reading order: ``folder`` (what a run writes), ``predictions`` (of a run's test split), ``retrieval`` (of a
transfer run's held-out clips), ``records`` (runs read back), ``published`` (the folder at a URL), ``results`` (a run's
numbers in words), ``tracking`` (JSONL, W&B, TensorBoard, the progress line), ``leaks`` (test clips in training),
``trained_on`` (what a run says of its data), ``sweeps`` (what a sweep has found).
"""
