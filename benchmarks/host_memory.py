"""What keeping freed memory saves a training step on a CPU (pipelines/distributed/host_memory.py).

    python benchmarks/host_memory.py --pairs 5

Forward and backward pass of each network, in processes of their own because the setting cannot be taken back, in turns
with and without it. Reported: the medians of the seconds a step takes and of its processor time, the page faults, the
most memory held, and the ratio of the seconds with its range over the pairs.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch

from cliplift.models import create_model
from cliplift.pipelines.distributed.host_memory import keep_freed_memory

WAYS = ("left", "kept")
STEPS = 5


@dataclass(frozen=True)
class Case:
    """A network and its clips: (clips, 3, frames, crop, crop)."""

    model: str
    clips: int
    frames: int
    crop: int


CASES = (
    Case("efficientnet_lite0_tam", 8, 8, 112),
    Case("t3d_tiny", 8, 8, 80),
    Case("resnet3d_18", 4, 8, 112),
    Case("video_vit_small_16", 4, 8, 112),
)


@dataclass(frozen=True)
class Row:
    """Of a step: seconds, processor seconds and page faults; and the process's peak."""

    seconds: float
    processor_seconds: float
    page_faults: float
    peak_mib: float


def measure(case: Case, way: str) -> Row:
    """Train on noise in this process."""
    if way == "kept" and not keep_freed_memory({}):
        raise SystemExit("the C library is not glibc: nothing to measure")
    torch.manual_seed(0)
    options = {"in_frames": case.frames, "crop": case.crop} if case.model.startswith("video_vit") else {}
    network = create_model(case.model, num_classes=10, **options).train()
    clips = torch.randn(case.clips, 3, case.frames, case.crop, case.crop)

    def step() -> None:
        network(clips).square().mean().backward()
        network.zero_grad(set_to_none=True)

    step()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    for _ in range(STEPS):
        step()
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Row(
        seconds / STEPS,
        processor / STEPS,
        (after.ru_minflt - before.ru_minflt) / STEPS,
        after.ru_maxrss / 1024,
    )


def in_a_process(case: Case, way: str) -> Row:
    words = [sys.executable, __file__, "--one", json.dumps([asdict(case), way])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="processes of each kind")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case, way = json.loads(options.one)
        print(json.dumps(asdict(measure(Case(**case), way))))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for case in CASES:
        pairs = [
            {way: in_a_process(case, way) for way in (WAYS if turn % 2 else WAYS[::-1])}
            for turn in range(options.pairs)
        ]
        ratios = sorted(pair["left"].seconds / pair["kept"].seconds for pair in pairs)
        print(
            f"{case.model} {case.clips}x{case.frames}x{case.crop}: {statistics.median(ratios):.2f} times as fast "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
            *(f"\n  {way}: {said([pair[way] for pair in pairs])}" for way in WAYS),
            flush=True,
        )


def said(rows: list[Row]) -> str:
    middle = {
        name: statistics.median(getattr(row, name) for row in rows)
        for name in ("seconds", "processor_seconds", "page_faults", "peak_mib")
    }
    return (
        f"{middle['seconds']:.3f} s, {middle['processor_seconds']:.3f} s of processor, "
        f"{middle['page_faults']:,.0f} page faults, peak {middle['peak_mib']:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
