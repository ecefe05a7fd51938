"""Raw collections, read as one list of videos.

In reading order: ``read`` (any source to a list, and its splits), ``lists`` (rows of CSV and Parquet), ``labels``
(what a label means), ``files`` (what lies below a folder), ``public_datasets`` (official lists as published),
``json_lists`` (those in JSON: Something-Something, Diving48), ``kinetics710`` (three editions merged), ``tfrecord``
(YouTube-8M's records), ``tars`` (videos in tars of others), ``dealing`` (which shard gets which).
"""
