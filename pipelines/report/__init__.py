"""The HTML report of one or more runs.

In reading order: ``page`` (the whole page), ``sections`` (curves, confusions, classes, lineage), ``tables``
(results), ``charts`` (SVG), ``clips`` (which clips are shown), ``feature_map`` (test clips in the plane).
"""
