"""The folder of a run, its records, and what is sent to trackers.

In reading order: ``folder`` (what a run writes), ``records`` (runs read back), ``results`` (its numbers in words),
``tracking`` (JSONL, W&B, TensorBoard, the progress line).
"""
