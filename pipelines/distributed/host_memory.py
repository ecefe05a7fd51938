"""On a CPU, memory that tensors free stays with the process.

A step makes and frees the same tensors again and again. glibc maps large blocks each for itself, gives freed memory
back to the kernel, and asks for it anew in the next layer; the kernel then clears it 4 KiB at a time, each with a page
fault. benchmarks/host_memory.py measures what that costs a step. Activations on a GPU have an allocator of their own
that keeps what is freed; this is the same for the host.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

# Of mallopt(3) in malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 64 << 20  # by which the heap grows at least


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell the C library to keep what is freed until the process ends; whether it does.

    Freed memory is used again by whatever is made next, so the most that a process holds is what it needs at its peak.
    It does nothing, and returns False, where the C library is not glibc or where variables of the user tune
    it (``MALLOC_*_``, ``GLIBC_TUNABLES``).
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environment):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # musl has a mallopt that does nothing
        mallopt = library.mallopt
    except (AttributeError, OSError):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD_BYTES))
    return all(mallopt(setting, value) == 1 for setting, value in settings)
