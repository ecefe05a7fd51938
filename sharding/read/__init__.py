"""Shards opened for reading.

In reading order: ``reader`` (samples by number, bytes checked), ``subsets`` (held-out groups, few labels), ``fetch``
(open files, cached shards, read-ahead), ``contact_sheet`` (a page to look at a dataset).
"""
