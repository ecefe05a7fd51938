"""One video: the only room that decodes and encodes.

In reading order: ``decode`` (facts and frames), ``cuts`` (where clips begin and end), ``transcode`` (one clip of a
raw video), ``passes`` (decoding once for many clips), ``regular_frames`` (constant rate, upright, square pixels),
``encode``, ``remux`` (cutting without encoding), ``full_decode`` (the check of what was written), ``flow`` (optical
flow as a second video), ``picture_hash`` (near-duplicates), ``likeness`` (which of many clips may be duplicates),
``glance`` (a first look at a raw video).
"""
