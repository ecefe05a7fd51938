"""NCCL's flight recorder: the last collectives of each rank, written beside the stacks when one of them never ends.

A rank keeps what it asked of the others in a ring: the operation, its shapes, the lines that asked for it, and whether
it began and ended. When a collective is silent for ``engine.collective_timeout_seconds``, NCCL's watchdog writes every
ring to a file of its own. What only some of them began is where the ranks parted (docs/cluster.md).

The variables are read by torch (FlightRecorder.hpp and ProcessGroupNCCL.hpp of torch/csrc/distributed/c10d) when ranks
meet and when a ring is written. The files are pickles, which this package never reads.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

RECORDED = 2000  # collectives and messages kept by each rank: some hundred bytes each
FILES = "collectives_rank"  # with the rank behind it

_set: dict[str, str] = {}  # what this process has set, for its next run has another folder


def record_collectives(folder: Path, environment: MutableMapping[str, str]) -> None:
    """Have NCCL record, and write to ``folder``. Call before ranks meet; what the user has set stays.

    Args:
        folder: of the stacks of this run.
        environment: of this process.
    """
    size, place = str(RECORDED), str(folder.absolute() / FILES)
    # Each variable with the name that earlier versions of torch gave it: a user may have set either.
    for names, value in (
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), size),
        (("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), place),
        (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
    ):
        if any(name in environment and environment[name] != _set.get(name) for name in names):
            continue
        for name in names:
            environment[name] = _set[name] = value
