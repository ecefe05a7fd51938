"""The videos the demo makes.

In reading order: ``synthetic`` (the files), ``motions`` (how things move), ``shapes`` and ``objects`` (what is seen).
"""
