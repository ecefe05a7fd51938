"""Frozen networks that describe every clip of a dataset by a vector, for finding clips that are alike.

In reading order: ``networks`` (which network a word of the command line names, and what it sees of a clip), ``embed``
(clips decoded in worker processes, the network's features one clip at a time), ``score`` (whole datasets, for
``cliplift score``).
"""
