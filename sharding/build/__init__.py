"""Shards built: plan, units of work, engines, finalizing, verifying.

In reading order: ``run`` (the phases), ``plan`` (which video goes into which shard), ``unit`` (one shard), ``pool``
and ``worker`` (isolated processes that touch untrusted video), ``writer`` (the tar and its index), ``ray_engine``
(units on a cluster), ``dedupe`` (duplicates), ``finalize`` (the dataset's table and manifest), ``verify``,
``tracking`` (W&B of a build), ``index_tars`` (tars that others wrote).
"""
