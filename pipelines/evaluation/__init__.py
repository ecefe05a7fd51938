"""Trained networks applied: metrics, predictions, explanations, exports.

In reading order: ``over_split`` (one pass over a split, for all), ``metrics`` (pure functions), ``evaluate`` (a
classifier on a split), ``features`` (what its classifier saw), ``clip_tables`` (rows for trackers), ``predict``
(video files), ``segments`` (what happens when), ``fuse`` (several runs, one answer), ``explain`` and ``grad_cam``
(heat maps), ``export``.
"""
