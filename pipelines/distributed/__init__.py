"""Ranks: who they are, how they talk, and that they agree.

In reading order: ``launchers`` (which process this is, from the environment), ``collectives`` (the topology and what
is exchanged), ``sequence`` (ranks that share each clip), ``agreement`` (all ranks run the same code, config and
data), ``slowest`` (which one holds the others up), ``flight_recorder`` (what NCCL writes down when ranks wait for one
another for ever), ``host_memory`` (freed memory is kept on CPUs).
"""
