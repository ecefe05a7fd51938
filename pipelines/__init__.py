"""Training, evaluation and reports: everything that puts configs, models and shards together.

In reading order: ``distributed`` (ranks), ``data`` (shards to batches), ``runs`` (a run's folder), ``checkpoints``
(what a run is at, in slices), ``compute`` (recomputed and compiled passes), ``engine`` (the training loop),
``evaluation`` (trained networks applied), ``probes`` (features judged during pretraining), ``embeddings`` (clips as
vectors), ``stages`` (transfer, pretrain, finetune),
``report`` (the HTML page), ``api`` (for notebooks), ``cost`` (memory and time, before a run), ``repeats`` (folds and
seeds, one run each), ``sweep`` (many runs of one config, chosen by validation). Each stands on those before it.
"""
