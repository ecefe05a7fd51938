"""Raw videos to WebDataset shards, and shards read again. Never imports torch.

In reading order: ``storage`` (local folders and object stores), ``redirects`` (which of HTTP's are followed),
``manifest`` (what is written beside the tars), ``scratch`` (unfinished work), ``tables`` (more rows than memory holds);
then the rooms ``sources`` (lists of videos), ``video`` (one video), ``scores`` (what is measured of a clip),
``similar`` (clips that are alike), ``build`` (shards written), ``read`` (shards read), ``scoring`` (scores of a
dataset), ``leaks`` (clips of one dataset in another), ``demo`` (the videos of the demo).
"""
