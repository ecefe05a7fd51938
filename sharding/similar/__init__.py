"""Clips that are alike, found by their embeddings among any number of clips. Nothing here decodes or knows a network.

In reading order: ``exact`` (products of vectors that are the same on every machine), ``kmeans`` (clusters), ``dealt``
(vectors on disk in the order of their clusters), ``pairs`` (pairs with similar vectors), ``sketches`` (whether two
clips show the same), ``groups`` (which of similar clips stays).
"""
