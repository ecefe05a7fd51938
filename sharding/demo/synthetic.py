"""Action clips made on the spot: textured shapes moving over textured backgrounds, as real H.264 files.

What a single frame shows says nothing about the action, by construction. A shape has four coordinates (across, down,
turn, size), each on a circle. Every coordinate starts at a uniformly random point, and the action only says which one
moves and how. A uniform start plus any motion on a circle is uniform again, so at every instant all four are uniform
and independent, whatever the action: the distribution of single frames is the same for all classes, and opposite
actions are each other's time reversal.

Train, validation and test differ in shapes, backgrounds and colours, so that memorised looks do not help.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.demo.motions import CLASSES, camera_shake, draw_shape, lit, seen_by_camera, shape_path
from cliplift.sharding.demo.shapes import LOOKS, background, textured_shape
from cliplift.sharding.video.decode import Frames
from cliplift.sharding.video.transcode import encode_array


@dataclass(frozen=True)
class DemoSummary:
    """What was written: ``labelled/SPLIT/CLASS/*.mp4`` and ``unlabelled/*.mp4`` below ``folder``."""

    folder: str
    classes: tuple[str, ...]
    clips: dict[str, int]
    frames_per_clip: int
    fps: int
    size_pixels: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class _Clip:
    path: str
    split: str
    action: str | None
    number: int
    seconds: float


def write_demo_videos(
    folder: str | Path,
    *,
    seed: int = 0,
    train_per_class: int = 24,
    val_per_class: int = 4,
    test_per_class: int = 12,
    unlabelled: int = 48,
    size_pixels: int = 96,
    fps: int = 15,
    seconds: float = 1.4,
    unlabelled_seconds: float = 4.5,
    workers: int = 2,
) -> DemoSummary:
    """Write the demo's videos. The same arguments give the same files, whatever the number of workers.

    Args:
        folder: written below it: ``labelled/{train,val,test}/ACTION/*.mp4`` and ``unlabelled/*.mp4``.
        seed: another seed gives other videos.
        train_per_class, val_per_class, test_per_class: clips of each action.
        unlabelled: longer videos in which several shapes change their motion.
        size_pixels: side of the square picture, even.
        fps: frames per second.
        seconds: length of a labelled clip.
        unlabelled_seconds: length of an unlabelled video.
        workers: processes.

    Raises:
        ValueError: the size is odd or too small.
    """
    if size_pixels % 2 or size_pixels < 32:
        raise ValueError(f"size_pixels={size_pixels} must be even and at least 32")
    started = time.monotonic()
    root = Path(folder)
    counts = {"train": train_per_class, "val": val_per_class, "test": test_per_class}
    clips = [
        _Clip(f"labelled/{split}/{action}/{split}_{action}_{number:04d}.mp4", split, action, number, seconds)
        for split, count in counts.items()
        for action in CLASSES
        for number in range(count)
    ]
    clips += [
        _Clip(f"unlabelled/unlabelled_{number:04d}.mp4", "unlabelled", None, number, unlabelled_seconds)
        for number in range(unlabelled)
    ]
    for parent in {root / Path(clip.path).parent for clip in clips}:
        parent.mkdir(parents=True, exist_ok=True)
    job = {"root": str(root), "seed": seed, "size": size_pixels, "fps": fps}
    _in_processes([{**job, "clips": [asdict(c) for c in clips[part::workers]]} for part in range(workers)])
    return DemoSummary(
        folder=str(root),
        classes=CLASSES,
        clips={split: sum(c.split == split for c in clips) for split in LOOKS},
        frames_per_clip=round(seconds * fps),
        fps=fps,
        size_pixels=size_pixels,
        bytes=sum((root / clip.path).stat().st_size for clip in clips),
        seconds=round(time.monotonic() - started, 3),
    )


def _in_processes(jobs: list[dict[str, Any]]) -> None:
    """Run the first job here, the others in fresh processes (a fork of a process with threads may hang)."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cliplift.sharding.demo.synthetic"]
    children = []
    for job in jobs[1:]:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=env)
        assert child.stdin is not None
        child.stdin.write(json.dumps(job))
        child.stdin.close()
        children.append(child)
    try:
        _write_part(jobs[0])
        codes = [child.wait() for child in children]
    finally:  # after an error, or a signal, nothing they still make is wanted
        for child in children:
            child.kill()
            child.wait()
    if any(codes):
        raise RuntimeError(f"a process that makes videos ended with exit status {max(codes, key=abs)}")


def _write_part(job: dict[str, Any]) -> None:
    # Sources of the demo, not shards: quick to encode, good enough to be encoded once more.
    config = TranscodeConfig(preset="ultrafast", crf=20, gop_frames=12, tune="none", b_frames=0)
    for tree in job["clips"]:
        clip = _Clip(**tree)
        frames = render_clip(
            split=clip.split,
            action=clip.action,
            number=clip.number,
            seed=job["seed"],
            size_pixels=job["size"],
            fps=job["fps"],
            num_frames=max(1, round(clip.seconds * job["fps"])),
        )
        (Path(job["root"]) / clip.path).write_bytes(
            encode_array(frames, fps=Fraction(job["fps"]), config=config)
        )


def render_clip(
    *, split: str, action: str | None, number: int, seed: int, size_pixels: int, fps: int, num_frames: int
) -> Frames:
    """One clip as uint8 RGB frames (T, H, W, 3).

    Args:
        split: whose shapes, backgrounds and colours are used.
        action: one of :data:`CLASSES`; None lets every shape change its motion about once a second.
        number: number of the clip within its split and action.
        seed: seed of the whole corpus.
        size_pixels: side of the picture.
        fps: frames per second.
        num_frames: length T.
    """
    look = LOOKS[split]
    kind = CLASSES.index(action) if action is not None else len(CLASSES)
    rng = np.random.default_rng([seed, look.seed, kind, number])
    shake = camera_shake(rng, num_frames)
    canvas = background(rng, look, size_pixels)
    frames = seen_by_camera(canvas, shake)
    for _ in range(rng.integers(2, 4)):
        sprite = textured_shape(rng, look)
        path = shape_path(rng, action, num_frames=num_frames, fps=fps)
        draw_shape(frames, sprite, path, shake)
    return lit(rng, frames, fps)


if __name__ == "__main__":
    _write_part(json.load(sys.stdin))
