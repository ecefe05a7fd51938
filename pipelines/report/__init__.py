"""The HTML report of one or more runs.

In reading order: ``page`` (the whole page), ``sections`` (curves, confusions, classes, the map of features, lineage),
``confidence`` (calibration, precision-recall, ROC), ``hardest`` (clips most runs get wrong), ``sweep`` (trials),
``tables`` (results), ``campaign`` (experiments beside each other), ``charts`` (SVG), ``clips`` (which clips are shown),
``retrieval`` (what a transfer run's student finds, with pictures), ``data`` (test clips in training, filters).
"""
