"""Throughput of sharding against the ffmpeg command line: same files, same settings, alternating rounds.

    python benchmarks/sharding.py VIDEOS [--clips 40] [--rounds 3] [--soak 2000]

Prints one JSON object: clips/s of encoding (wall and CPU) against ffmpeg's; of ``mode: copy`` on clips that fit against
plain ``cp`` of the same files and against encoding them once more; and with ``--soak`` the memory of the worker over
that many clips. Needs ``ffmpeg`` on the path for the first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cliplift.configs.sharding import TranscodeConfig
from cliplift.configs.sources import VIDEO_SUFFIXES
from cliplift.sharding.build.pool import ENVIRONMENT, Job, WorkerPool
from cliplift.sharding.video.decode import probe
from cliplift.sharding.video.encode import encoder_options
from cliplift.sharding.video.full_decode import check_clip


def with_ffmpeg(file: Path, scratch: Path, config: TranscodeConfig) -> None:
    """Transcode one file and decode the result in full, as our worker does."""
    facts = probe(file)
    short = min(config.short_side_pixels, facts.width, facts.height)
    landscape = facts.width >= facts.height
    scale = f"scale={'-2' if landscape else short}:{short if landscape else '-2'}:flags=bicubic"
    options = encoder_options(config)
    command = ["ffmpeg", "-v", "error", "-y", "-threads", "1", "-i", str(file), "-an", "-filter_threads", "1"]
    command += ["-vf", f"{scale},format=yuv420p", "-r", str(facts.fps), "-c:v", "libx264", "-threads", "1"]
    command += [word for name, value in options.items() for word in (f"-{name}", value)]
    subprocess.run([*command, "-movflags", "+faststart", str(scratch / "out.mp4")], check=True)
    subprocess.run(
        ["ffmpeg", "-v", "error", "-threads", "1", "-i", str(scratch / "out.mp4"), "-f", "null", "-"],
        check=True,
    )


def timed(action: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds of an action, children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    action()
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(files: list[Path], config: TranscodeConfig) -> list[bytes]:
    """Cut and check the files in one worker process; the clips."""
    settings = {"cut": {"kind": "whole"}, "transcode": config.model_dump(mode="json"), "memory_mib": None}
    jobs = [Job(message={"url": str(f), "start": None, "end": None}, context=None) for f in files]
    with WorkerPool(workers=1, settings=settings, clip_timeout_seconds=300, attempts=1) as pool:
        return [mp4 for _, result in pool.run(jobs) for _, mp4 in result.clips]


def soak(files: list[Path], config: TranscodeConfig, clips: int) -> dict[str, float]:
    """Resident memory of one worker after an eighth of the clips and at the end, MiB."""
    settings = {"cut": {"kind": "whole"}, "transcode": config.model_dump(mode="json"), "memory_mib": None}
    jobs = (
        Job(message={"url": str(f), "start": None, "end": None}, context=None) for f in itertools.cycle(files)
    )
    readings: list[float] = []
    with WorkerPool(workers=1, settings=settings, clip_timeout_seconds=300, attempts=1) as pool:
        for done, _ in enumerate(pool.run(itertools.islice(jobs, clips)), start=1):
            if done % max(1, clips // 8) == 0:
                readings.append(_children_mib())
    return {
        "clips": clips,
        "mib_after_an_eighth": readings[0],
        "mib_at_the_end": readings[-1],
        "mib_most": max(readings),
    }


def _children_mib() -> float:
    pages = 0
    for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        pages += int(Path(f"/proc/{child}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, help="folder of videos")
    parser.add_argument("--clips", type=int, default=40, help="files of a round")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds")
    parser.add_argument("--soak", type=int, default=0, help="clips of the memory test; 0 leaves it out")
    options = parser.parse_args()
    files = sorted(p for p in options.videos.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)[
        : options.clips
    ]
    if not files:
        sys.exit(f"{options.videos} holds no video")
    config = TranscodeConfig()
    results: dict[str, object] = {"files": len(files), "rounds": options.rounds, "threads": 1}
    if shutil.which("ffmpeg"):
        results |= _compare(files, config, options.rounds)
    results["copy"] = _compare_copy(files, config, options.rounds)
    if options.soak:
        results["memory"] = soak(files, config, options.soak)
    print(json.dumps(results, indent=1))


def _compare(files: list[Path], config: TranscodeConfig, rounds: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        median = _alternate(
            {
                "ours": lambda: ours(files, config),
                "ffmpeg": lambda: [with_ffmpeg(f, scratch, config) for f in files],
            },
            rounds,
        )
        check_clip((scratch / "out.mp4").read_bytes())
    return {
        "clips_per_second_wall": {name: round(len(files) / wall, 2) for name, (wall, _) in median.items()},
        "clips_per_second_cpu": {name: round(len(files) / cpu, 2) for name, (_, cpu) in median.items()},
        "ours_over_ffmpeg_wall": round(median["ffmpeg"][0] / median["ours"][0], 3),
        "ours_over_ffmpeg_cpu": round(median["ffmpeg"][1] / median["ours"][1], 3),
        "environment": ENVIRONMENT,
    }


def _compare_copy(files: list[Path], config: TranscodeConfig, rounds: int) -> dict[str, object]:
    """Clips that fit, cut by ``mode: copy`` (with its full decode), copied by ``cp``, and encoded once more."""
    copy = config.model_copy(update={"mode": "copy"})
    with tempfile.TemporaryDirectory() as folder:
        fitting = []
        for number, clip in enumerate(ours(files, config)):
            fitting.append(Path(folder) / f"{number}.mp4")
            fitting[-1].write_bytes(clip)
        target = Path(folder) / "target"
        target.mkdir()
        median = _alternate(
            {
                "copy": lambda: ours(fitting, copy),
                "cp": lambda: subprocess.run(["cp", *map(str, fitting), str(target)], check=True),
                "encode": lambda: ours(fitting, config),
            },
            rounds,
        )
        size = sum(file.stat().st_size for file in fitting)
    return {
        "clips": len(fitting),
        "mib": round(size / 2**20, 1),
        "clips_per_second_wall": {name: round(len(fitting) / wall, 1) for name, (wall, _) in median.items()},
        "mib_per_second_wall": {name: round(size / 2**20 / wall, 1) for name, (wall, _) in median.items()},
        "copy_over_encode_wall": round(median["encode"][0] / median["copy"][0], 2),
        "copy_over_cp_wall": round(median["cp"][0] / median["copy"][0], 4),
    }


def _alternate(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Median wall and CPU seconds of each; the order changes, so that a busy moment hits all."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in sorted(runs, reverse=bool(number % 2)):
            run = runs[name]
            seconds[name].append(timed(lambda run=run: (run(), None)[1]))
    return {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in seconds.items()
    }


if __name__ == "__main__":
    main()
