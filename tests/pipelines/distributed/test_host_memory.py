"""On CPUs freed memory stays with the process."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from cliplift.pipelines.distributed.host_memory import keep_freed_memory

# Blocks of several sizes, all freed before the next round, as the maps of a network are. Counts the pages that the
# kernel had to give.
ROUNDS = """
import ctypes, json, resource, sys
from cliplift.pipelines.distributed.host_memory import keep_freed_memory
kept = keep_freed_memory({}) if sys.argv[1] == "keep" else False
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def one_round():
    blocks = [(libc.malloc(n << 20), n << 20) for n in (1, 2, 4, 8, 16, 40) for _ in range(2)]
    for place, size in blocks:
        ctypes.memset(place, 1, size)
    for place, _ in blocks:
        libc.free(place)
one_round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    one_round()
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""
PAGES_OF_FIVE_ROUNDS = 5 * 2 * 71 * 256


def faults(way: str) -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", ROUNDS, way], capture_output=True, text=True, check=True)
    kept, count = json.loads(done.stdout)
    return kept, count


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_the_kernel_is_asked_for_memory_once() -> None:
    assert faults("leave")[1] > 0.9 * PAGES_OF_FIVE_ROUNDS, "what is to be avoided is there"
    kept, count = faults("keep")
    assert kept
    assert count < 0.02 * PAGES_OF_FIVE_ROUNDS


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_has_tuned_stays(name: str) -> None:
    assert not keep_freed_memory({name: "1"})
