"""Scores made for all clips of a dataset, in isolated processes, and what filters leave of it.

In reading order: ``run`` (all shards), ``ray_scores`` (the same on a cluster), ``parts`` (the scores of one shard, kept
so that nothing is computed twice), ``generation`` (the columns of the next generation), ``duplicates`` (a column made
of the build's listing), ``embed`` (embeddings of all shards), ``likeness`` (clusters and near-duplicates), ``census``
(how many clips an expression leaves), ``histogram`` (how a column is spread), ``sheet`` (clips by score, on a page),
``tracking`` (the same in W&B).
"""
