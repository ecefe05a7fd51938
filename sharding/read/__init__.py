"""Shards opened for reading.

In reading order: ``reader`` (samples by number, bytes checked), ``catalog`` (what is known of every sample, mapped into
memory), ``columns`` (the catalog made of the table of samples), ``sample_table`` (strings and lists, when they are
needed), ``selection`` (the rows of a split), ``subsets`` (held-out groups, few labels), ``shared`` (arrays that workers
map), ``fetch`` (open files, cached shards, read-ahead), ``generations`` (clips added, videos removed), ``embeddings``
(vectors of the clips), ``difference`` (what changed), ``contact_sheet`` (a page to look at a dataset).
"""
