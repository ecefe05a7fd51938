"""One file for each command, or family of commands, of `cliplift`: its summary, its options and what it runs.

A file has ``COMMANDS``, its rows in the order of ``cliplift --help``; it imports nothing heavy before a command runs.
Read first ``command`` (what a command is) and ``subject`` (from its words to the run they name), then any other.
"""

# The files that hold commands, in the order of `cliplift --help`. A new file is one more name here.
MODULES = (
    "start",
    "shard",
    "generations",
    "train",
    "apply",
    "models",
    "check",
    "submit",
    "bench",
    "demo",
)
