"""Clips of one dataset that another one has too: a pretraining set that holds clips of the test set.

In reading order: ``search`` (which clips may show the same, by the looks of their pictures), ``pictures`` (whether they
do, by the pictures themselves), ``embedded`` (clips that are alike by
embedding), ``check`` (two datasets), ``records`` (what was checked, kept beside the dataset),
``page`` (the pairs side by side).
"""
