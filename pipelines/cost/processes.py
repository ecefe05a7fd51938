"""What this process and the processes below it use: CPU time, memory, open files. Linux, from /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


def descendants(root: int | None = None) -> list[int]:
    """Process ids below a process (this one), children of children included."""
    children: dict[int, list[int]] = {}
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            with suppress(*_GONE):
                children.setdefault(int(_status(int(folder.name))[1]), []).append(int(folder.name))
    found, queue = [], [os.getpid() if root is None else root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, seconds: its own and that of the children it has waited for."""
    return sum(int(value) for value in _status(pid)[11:15]) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    """Memory of a process, MiB; pages shared with others count in part (PSS)."""
    for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def open_files(pid: int) -> int:
    return len(list((PROC / str(pid) / "fd").iterdir()))


def descendants_cpu_seconds() -> float:
    """CPU time of all processes below this one, and of this one."""
    total = cpu_seconds(os.getpid())
    for pid in descendants():
        with suppress(*_GONE):
            total += cpu_seconds(pid)
    return total


def _status(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name, which may hold spaces: state, parent, ..."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
