"""The training loop on DeepSpeed, with checkpoints, guards and telemetry.

In reading order: ``task`` (what a stage offers), ``loop`` (``fit``), ``late`` (answers of the device, read one step
late), ``optim`` (parameter groups, optimizers, schedules), ``faults`` (bad losses, signals, hangs),
``partitioned_build`` (networks built in parts), ``deepspeed_setup`` (the engine section as DeepSpeed's dictionary),
``state`` (what a run is at), ``zero_state`` (which rank keeps what of it), ``ema`` (averaged weights), ``batchnorm``
(statistics for evaluation), ``telemetry`` (what is logged).
"""
