"""Clips made on the spot: shapes or objects moving over textured backgrounds, as real H.264 files.

There are two sets. In the first, classes differ by motion alone; in the second, a class is a kind of object and a
motion, such as a fish that spins: what a frame shows says the kind, and nothing about the motion.

What a single frame shows says nothing about the motion, by construction. A shape has four coordinates (across, down,
turn, size), each on a circle. Every coordinate starts at a uniformly random point, and the action only says which one
moves and how. A uniform start plus any motion on a circle is uniform again, so at every instant all four are uniform
and independent, whatever the action: the distribution of single frames is the same for all classes, and opposite
actions are each other's time reversal.

The objects of the second set stay in the picture: place and size go to and fro at a constant speed, which leaves a
uniform start uniform as well.

Train, validation and test differ in shapes or in instances of the objects, in backgrounds and in colours, so that
memorised looks do not help.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.demo.motions import (
    CLASSES,
    MOTIONS,
    OBJECT_RADIUS,
    camera_shake,
    draw_shape,
    lit,
    object_path,
    seen_by_camera,
    shape_path,
)
from cliplift.sharding.demo.objects import KINDS, object_sprite
from cliplift.sharding.demo.shapes import LOOKS, Array, Look, background, textured_shape
from cliplift.sharding.video.decode import Frames
from cliplift.sharding.video.transcode import encode_array

BACKGROUND_CONTRAST, HAZE = 0.55, 0.25  # of what lies behind an object: it is out of focus and in the haze
KIND_CLASSES = tuple(f"{kind}_{motion}" for kind in sorted(KINDS) for motion in sorted(MOTIONS))


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
    kind: str | None = None


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
    with_kinds: bool = False,
) -> DemoSummary:
    """Write the demo's videos. The same arguments give the same files, whatever the number of workers.

    Args:
        folder: written below it: ``labelled/{train,val,test}/CLASS/*.mp4``, ``unlabelled/*.mp4``, and ``clips.csv``,
            what each of them shows.
        seed: another seed gives other videos.
        train_per_class, val_per_class, test_per_class: clips of each class.
        unlabelled: videos without a class. Of the first set, longer ones in which several shapes change their motion;
            of the second, as the labelled ones, all classes equally often.
        size_pixels: side of the square picture, even.
        fps: frames per second.
        seconds: length of a labelled clip.
        unlabelled_seconds: length of an unlabelled video.
        workers: processes.
        with_kinds: the second set, of kinds and motions; otherwise the first, of motions alone.

    Raises:
        ValueError: the size is odd or too small.
    """
    if size_pixels % 2 or size_pixels < 32:
        raise ValueError(f"size_pixels={size_pixels} must be even and at least 32")
    started = time.monotonic()
    root = Path(folder)
    counts = {"train": train_per_class, "val": val_per_class, "test": test_per_class}
    if with_kinds:
        clips = _clips_of_kinds(counts, unlabelled, seconds=seconds)
    else:
        clips = _clips_of_motions(counts, unlabelled, seconds=seconds, unlabelled_seconds=unlabelled_seconds)
    for parent in {root / Path(clip.path).parent for clip in clips}:
        parent.mkdir(parents=True, exist_ok=True)
    job = {"root": str(root), "seed": seed, "size": size_pixels, "fps": fps}
    _in_processes([{**job, "clips": [asdict(c) for c in clips[part::workers]]} for part in range(workers)])
    _write_truth(root / "clips.csv", clips)
    return DemoSummary(
        folder=str(root),
        classes=KIND_CLASSES if with_kinds else CLASSES,
        clips={split: sum(c.split == split for c in clips) for split in LOOKS},
        frames_per_clip=round(seconds * fps),
        fps=fps,
        size_pixels=size_pixels,
        bytes=sum((root / clip.path).stat().st_size for clip in clips),
        seconds=round(time.monotonic() - started, 3),
    )


def _clips_of_motions(
    counts: Mapping[str, int], unlabelled: int, *, seconds: float, unlabelled_seconds: float
) -> list[_Clip]:
    clips = [
        _Clip(f"labelled/{split}/{action}/{split}_{action}_{number:04d}.mp4", split, action, number, seconds)
        for split, count in counts.items()
        for action in CLASSES
        for number in range(count)
    ]
    return clips + [
        _Clip(f"unlabelled/unlabelled_{number:04d}.mp4", "unlabelled", None, number, unlabelled_seconds)
        for number in range(unlabelled)
    ]


def _clips_of_kinds(counts: Mapping[str, int], unlabelled: int, *, seconds: float) -> list[_Clip]:
    both = [(kind, motion) for kind in sorted(KINDS) for motion in sorted(MOTIONS)]
    clips = []
    for split, count in counts.items():
        for kind, motion in both:
            name = f"{kind}_{motion}"
            clips += [
                _Clip(
                    f"labelled/{split}/{name}/{split}_{name}_{number:04d}.mp4",
                    split,
                    motion,
                    number,
                    seconds,
                    kind,
                )
                for number in range(count)
            ]
    for number in range(unlabelled):
        kind, motion = both[number % len(both)]
        path = f"unlabelled/unlabelled_{number:04d}.mp4"
        clips.append(_Clip(path, "unlabelled", motion, number, seconds, kind))
    return clips


def _write_truth(file: Path, clips: Sequence[_Clip]) -> None:
    """What every clip shows; the unlabelled ones' is for looking at, no run reads it."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(("path", "split", "kind", "motion"))
        writer.writerows((clip.path, clip.split, clip.kind or "", clip.action or "") for clip in clips)


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
        shape: dict[str, Any] = {
            "split": clip.split,
            "number": clip.number,
            "seed": job["seed"],
            "size_pixels": job["size"],
            "fps": job["fps"],
            "num_frames": max(1, round(clip.seconds * job["fps"])),
        }
        if clip.kind is None:
            frames = render_clip(action=clip.action, **shape)
        else:
            assert clip.action is not None
            frames = render_object(kind=clip.kind, motion=clip.action, **shape)
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

    def draw(frames: Array, shake: Array) -> None:
        for _ in range(rng.integers(2, 4)):
            sprite = textured_shape(rng, look)
            path = shape_path(rng, action, num_frames=num_frames, fps=fps)
            draw_shape(frames, sprite, path, shake)

    return _filmed(rng, look, draw, size_pixels=size_pixels, fps=fps, num_frames=num_frames)


def render_object(
    *,
    split: str,
    kind: str,
    motion: str,
    number: int,
    seed: int,
    size_pixels: int,
    fps: int,
    num_frames: int,
) -> Frames:
    """One clip of one object, as uint8 RGB frames (T, H, W, 3).

    Args:
        split: whose instances, backgrounds and colours are used.
        kind: one of :data:`KINDS`.
        motion: one of :data:`MOTIONS`.
        number: number of the clip within its split and class.
        seed: seed of the whole corpus.
        size_pixels: side of the picture.
        fps: frames per second.
        num_frames: length T.
    """
    look = LOOKS[split]
    # Clips of motions alone have four numbers here, so no two clips share a stream.
    rng = np.random.default_rng(
        [seed, look.seed, sorted(KINDS).index(kind), sorted(MOTIONS).index(motion), number]
    )

    def draw(frames: Array, shake: Array) -> None:
        sprite = object_sprite(rng, kind, split)
        path = object_path(rng, motion, num_frames=num_frames, fps=fps)
        draw_shape(frames, sprite, path, shake, radii=OBJECT_RADIUS, fade=None)

    return _filmed(rng, look, draw, size_pixels=size_pixels, fps=fps, num_frames=num_frames, haze=True)


def _filmed(
    rng: np.random.Generator,
    look: Look,
    draw: Callable[[Array, Array], None],
    *,
    size_pixels: int,
    fps: int,
    num_frames: int,
    haze: bool = False,
) -> Frames:
    """What every clip is made of: a background before a shaking camera, what ``draw`` adds, and changing light.

    Args:
        rng: draws everything, in this order.
        look: whose backgrounds and colours are used.
        draw: adds what moves to frames (T, H, W, 3) in [0, 1], of a camera that shakes by (T, 2) pixels.
        size_pixels: side of the picture.
        fps: frames per second.
        num_frames: length T.
        haze: the background has less contrast.
    """
    shake = camera_shake(rng, num_frames)
    canvas = background(rng, look, size_pixels)
    if haze:
        canvas = HAZE + BACKGROUND_CONTRAST * (canvas - HAZE)
    frames = seen_by_camera(canvas, shake)
    draw(frames, shake)
    return lit(rng, frames, fps)


if __name__ == "__main__":
    _write_part(json.load(sys.stdin))
