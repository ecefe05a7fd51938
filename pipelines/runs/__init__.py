"""The folder of a run, its records, and what is sent to trackers."""
