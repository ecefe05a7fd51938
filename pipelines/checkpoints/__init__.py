"""Checkpoints: what a run is at, on a disk or in a store, written and read by slices.

In reading order: ``tensor_file`` (one file, mapped or read by ranges), ``slices`` (runs of elements over many files),
``stored`` (a folder in a store), ``folder`` (whole, damaged, newest), ``targets`` and ``saver`` (all ranks write one
checkpoint), ``saved`` (one opened, for any number of ranks).
"""
