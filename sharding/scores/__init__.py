"""What is measured of stored clips, and how it is stored beside the catalog. Nothing here runs workers.

In reading order: ``pictures`` (which pictures of a clip are decoded), ``overlays`` (the text drawn over them),
``measures`` (what they say: motion, brightness, sharpness, borders, text, shots), ``stored`` (columns that all
processes of a host share), ``carried`` (columns of a generation read, written and taken over into the next),
``vectors`` (the embeddings of one shard), ``embeddings`` (those of a generation), ``chosen`` (the clips that an
expression of ``data.where`` leaves).
"""
