"""A sweep: many runs of one config, and which of them is best on validation data.

In reading order: ``trials`` (which values each trial has), ``brackets`` (how long each runs, and who goes on),
``run`` (all of them, or one part of an array job), ``wandb_file`` (the same as a sweep of W&B).
"""
