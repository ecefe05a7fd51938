"""Checkpoints: what a run is at, on disk, written and read by slices.

In reading order: ``slices`` (runs of elements over many files), ``saver`` (all ranks write one checkpoint),
``folder`` (whole, damaged, newest), ``saved`` (one opened, for any number of ranks).
"""
