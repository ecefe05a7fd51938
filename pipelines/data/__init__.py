"""From shards to batches, as a pure function of (seed, epoch, position).

In reading order: ``order`` (position to sample), ``clip_plan`` (frames, box and draws of a clip), ``source`` (a
sample read, decoded and cut), ``batch`` (what a loader yields), ``workers`` (decoding processes), ``failures``
(unreadable samples, counted), ``loader`` (training batches), ``eval_loader`` (test views, each sample once),
``augment`` and ``rand_augment`` (on the device), ``sequential`` (tars without an index), ``video_files`` (videos that
are in no shard).
"""
