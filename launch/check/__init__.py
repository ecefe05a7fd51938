"""`cliplift check` and `cliplift doctor`: does the run fit this machine?

In reading order: ``findings`` (one row of either table), ``machine`` (GPUs by name, or this host), ``cost`` (memory,
hours, cores, disk), ``fit`` (the answers of `check`), ``doctor`` (what this machine has, tried),
``graph_breaks`` (where torch.compile would leave a network's graph).
"""
