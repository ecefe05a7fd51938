"""Action clips made on the spot: textured shapes moving over textured backgrounds, as real H.264 files.

What a single frame shows says nothing about the action, by construction. A shape has four coordinates (across, down,
turn, size), each on a circle: what leaves on one side enters on the other. Every coordinate starts at a uniformly
random point, and the action only says which one moves and how. A uniform start plus any motion on a circle is uniform
again, so at every instant all four are uniform and independent, whatever the action: the distribution of single
frames is the same for all classes, and opposite actions are each other's time reversal.

Train, validation and test differ in shapes, backgrounds and colours, so that memorised looks do not help.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.transcode import encode_array
from cliplift.sharding.video import Frames

Array = NDArray[np.float32]

ACROSS, DOWN, TURN, SIZE = range(4)

# action -> (coordinate that moves, direction; 0 swings to and fro). Directions as seen on the screen.
ACTIONS: Mapping[str, tuple[int, int]] = {
    "move_left": (ACROSS, -1),
    "move_right": (ACROSS, +1),
    "move_up": (DOWN, -1),
    "move_down": (DOWN, +1),
    "rotate_clockwise": (TURN, +1),
    "rotate_counterclockwise": (TURN, -1),
    "approach": (SIZE, +1),
    "recede": (SIZE, -1),
    "swing_sideways": (ACROSS, 0),
    "swing_up_down": (DOWN, 0),
}
CLASSES = tuple(sorted(ACTIONS))

# Cycles of a coordinate per second, slowest and fastest.
SPEED_PER_SECOND = {ACROSS: (0.45, 0.8), DOWN: (0.45, 0.8), TURN: (0.4, 0.75), SIZE: (0.5, 0.8)}
SWING_HERTZ = (1.3, 2.0)
SWING_AMPLITUDE = (0.10, 0.16)

SMALLEST, LARGEST = 0.17, 0.36  # radius of a shape, share of the picture's side
FADE = 0.12  # share of the size circle over which a shape appears when smallest and vanishes when largest
SPRITE_PIXELS = 96
SHAKE_PIXELS = 0.6
NOISE_LEVELS = 2.5


@dataclass(frozen=True)
class Look:
    """Shapes, backgrounds and colours of one split; no two splits share any of them."""

    seed: int
    shapes: tuple[str, ...]
    backgrounds: tuple[str, ...]
    hues: tuple[tuple[float, float], ...]


LOOKS: Mapping[str, Look] = {
    "train": Look(1, ("triangle", "square", "hexagon", "star5", "gear"), ("clouds", "stripes", "checks"),
                  ((0.00, 0.08), (0.22, 0.30), (0.44, 0.52), (0.66, 0.74), (0.85, 0.92))),
    "val": Look(2, ("pentagon", "star6"), ("rings", "clouds_fine"), ((0.10, 0.14), (0.54, 0.58), (0.76, 0.79))),
    "test": Look(3, ("cross", "drop", "star4"), ("waves", "cells"),
                 ((0.16, 0.20), (0.32, 0.42), (0.60, 0.64), (0.94, 0.98))),
    "unlabelled": Look(4, ("triangle", "square", "hexagon", "star5", "gear"), ("clouds", "stripes", "checks"),
                       ((0.00, 0.08), (0.22, 0.30), (0.44, 0.52), (0.66, 0.74), (0.85, 0.92))),
}  # fmt: skip


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
    command = [sys.executable, "-m", "cliplift.sharding.synthetic"]
    children = []
    for job in jobs[1:]:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=env)
        assert child.stdin is not None
        child.stdin.write(json.dumps(job))
        child.stdin.close()
        children.append(child)
    try:
        _write_part(jobs[0])
    finally:
        codes = [child.wait() for child in children]
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
    shake = _shake(rng, num_frames)
    canvas = _background(rng, look, size_pixels)
    frames = _rolled(canvas, shake)
    for _ in range(rng.integers(2, 4)):
        sprite = _sprite(rng, look)
        path = _path(rng, action, num_frames=num_frames, fps=fps)
        _draw(frames, sprite, path, shake)
    return _lit(rng, frames, fps)


def _path(rng: np.random.Generator, action: str | None, *, num_frames: int, fps: int) -> Array:
    """The four coordinates of one shape over time, (4, T), each in [0, 1) on its circle."""
    velocity = np.zeros((4, num_frames), np.float64)
    step = num_frames if action is not None else round(rng.uniform(0.8, 1.5) * fps)
    for start in range(0, num_frames, step):
        name = action if action is not None else CLASSES[rng.integers(len(CLASSES))]
        coordinate, direction = ACTIONS[name]
        span = np.arange(start, min(start + step, num_frames)) / fps
        if direction:
            velocity[coordinate, start : start + step] = direction * rng.uniform(
                *SPEED_PER_SECOND[coordinate]
            )
        else:
            turn = 2 * np.pi * rng.uniform(*SWING_HERTZ)
            swing = np.cos(turn * span + rng.uniform(0, 2 * np.pi))
            velocity[coordinate, start : start + step] = rng.uniform(*SWING_AMPLITUDE) * turn * swing
    start_point = rng.random((4, 1))
    return np.asarray((start_point + np.cumsum(velocity, axis=1) / fps) % 1.0, np.float32)


def _draw(frames: Array, sprite: Array, path: Array, shake: Array) -> None:
    """Blend a shape into the frames (T, H, W, 3), in place; what leaves on one side enters on the other."""
    num_frames, side = frames.shape[:2]
    radius = SMALLEST * (LARGEST / SMALLEST) ** path[SIZE] * side
    opacity = np.clip(np.minimum(path[SIZE], 1 - path[SIZE]) / FADE, 0, 1)
    reach = int(np.ceil(radius.max())) + 1
    centre = np.stack([path[DOWN], path[ACROSS]]) * side + shake.T  # (2, T)
    whole = np.floor(centre).astype(np.int64)
    offset = np.arange(-reach, reach + 1)
    dy = offset[None, :] - (centre - whole)[0][:, None]  # (T, R)
    dx = offset[None, :] - (centre - whole)[1][:, None]
    cos, sin = np.cos(2 * np.pi * path[TURN]) / radius, np.sin(2 * np.pi * path[TURN]) / radius  # (T,)
    # The screen's y axis points down, so this turns the shape clockwise as TURN grows.
    u = (cos[:, None] * dx)[:, None, :] + (sin[:, None] * dy)[:, :, None]  # (T, R, R)
    v = -(sin[:, None] * dx)[:, None, :] + (cos[:, None] * dy)[:, :, None]
    scale = (SPRITE_PIXELS - 1) / 2
    column = np.clip(np.rint((u + 1) * scale), 0, SPRITE_PIXELS - 1).astype(np.int64)
    row = np.clip(np.rint((v + 1) * scale), 0, SPRITE_PIXELS - 1).astype(np.int64)
    pixels = sprite.reshape(-1, 4)[row * SPRITE_PIXELS + column]  # (T, R, R, 4)
    alpha = pixels[..., 3:] * opacity[:, None, None, None]
    at = (
        np.arange(num_frames)[:, None, None],
        ((whole[0][:, None] + offset) % side)[:, :, None],
        ((whole[1][:, None] + offset) % side)[:, None, :],
    )
    under = frames[at]
    frames[at] = under + alpha * (pixels[..., :3] - under)


def _sprite(rng: np.random.Generator, look: Look) -> Array:
    """A textured shape, RGBA in [0, 1], (S, S, 4). Its texture has a direction, so that its turn can be seen."""
    axis = np.linspace(-1, 1, SPRITE_PIXELS, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    distance, angle = np.hypot(x, y), np.arctan2(y, x)
    edge = _outline(look.shapes[rng.integers(len(look.shapes))], angle)
    alpha = np.clip((edge - distance) * 14, 0, 1)
    first, second = _colour(rng, look), _colour(rng, look)
    wave = 0.5 + 0.5 * np.sin(
        rng.uniform(4, 9) * (x * np.cos(a := rng.uniform(0, 2 * np.pi)) + y * np.sin(a)) + rng.uniform(0, 6)
    )
    side = (x > rng.uniform(-0.2, 0.2)).astype(np.float32)
    mix = np.clip(0.65 * side + 0.35 * wave, 0, 1)[..., None]
    colours = first * mix + second * (1 - mix)
    rim = np.clip((distance - edge + 0.16) * 8, 0, 1)[..., None]
    return np.concatenate([colours * (1 - 0.6 * rim), alpha[..., None]], axis=-1).astype(np.float32)


def _outline(shape: str, angle: Array) -> Array:
    """Radius of a shape's edge at each angle, at most 1."""
    corners = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}
    if shape in corners:
        half = np.pi / corners[shape]
        return np.asarray(np.cos(half) / np.cos((angle % (2 * half)) - half), np.float32)
    if shape.startswith("star"):
        points = int(shape[4:])
        return np.asarray(0.42 + 0.58 * np.abs((angle * points / np.pi) % 2 - 1) ** 1.3, np.float32)
    if shape == "gear":
        return np.asarray(0.85 + 0.15 * np.sign(np.sin(8 * angle)), np.float32)
    if shape == "cross":
        quarter = (angle + np.pi / 4) % (np.pi / 2) - np.pi / 4
        return np.asarray(np.where(np.abs(np.tan(quarter)) < 0.38, 0.93 / np.cos(quarter), 0.5), np.float32)
    assert shape == "drop", shape
    return np.asarray(0.55 + 0.45 * np.maximum(0, np.cos(angle)) ** 6, np.float32)


def _colour(rng: np.random.Generator, look: Look) -> Array:
    low, high = look.hues[rng.integers(len(look.hues))]
    return _rgb(rng.uniform(low, high), rng.uniform(0.35, 0.95), rng.uniform(0.35, 1.0))


def _rgb(hue: float, saturation: float, value: float) -> Array:
    channel = (np.array([5, 3, 1]) + hue * 6) % 6
    return np.asarray(value * (1 - saturation * np.clip(np.minimum(channel, 4 - channel), 0, 1)), np.float32)


def _background(rng: np.random.Generator, look: Look, side: int) -> Array:
    """A texture that closes at its edges, RGB in [0, 1], (H, W, 3)."""
    family = look.backgrounds[rng.integers(len(look.backgrounds))]
    axis = np.arange(side, dtype=np.float32) / side
    y, x = np.meshgrid(axis, axis, indexing="ij")
    phase = rng.uniform(0, 2 * np.pi, 4)
    a, b = rng.integers(1, 5, 2)
    wobble = 0.25 * np.sin(2 * np.pi * x + phase[0]) + 0.25 * np.cos(2 * np.pi * y + phase[1])
    field: Any
    if family.startswith("clouds"):
        field = _clouds(rng, side, finest=3 if family == "clouds" else 5)
    elif family == "stripes":
        field = np.sin(2 * np.pi * (a * x + b * y) + phase[2] + 2 * wobble)
    elif family == "checks":
        field = np.sign(
            np.sin(2 * np.pi * (a + 1) * x + phase[2]) * np.sin(2 * np.pi * (b + 1) * y + phase[3])
        )
    elif family == "rings":
        field = np.sin(8 * np.hypot(np.sin(np.pi * (x - 0.5)), np.sin(np.pi * (y - 0.5))) * a + phase[2])
    elif family == "waves":
        field = np.sin(2 * np.pi * a * x + phase[2] + 3 * np.sin(2 * np.pi * b * y + phase[3]))
    else:
        assert family == "cells", family
        field = _cells(rng, x, y)
    mix = np.asarray(0.5 + 0.5 * field / np.abs(field).max(), np.float32)[..., None]
    grain = 0.06 * _clouds(rng, side, finest=6)[..., None]
    return np.asarray(
        np.clip(0.8 * (_colour(rng, look) * mix + _colour(rng, look) * (1 - mix)) + grain, 0, 1), np.float32
    )


def _clouds(rng: np.random.Generator, side: int, *, finest: int) -> Array:
    """Smooth noise in about [-1, 1] that closes at its edges: white noise filtered on the torus."""
    white = np.fft.rfft2(rng.standard_normal((side, side)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]) * side
    noise = np.fft.irfft2(white * np.exp(-((frequency / (2.0 * finest)) ** 2)), s=(side, side))
    return np.asarray(noise / (np.abs(noise).max() + 1e-9), np.float32)


def _cells(rng: np.random.Generator, x: Any, y: Any) -> Array:
    points = rng.random((12, 2))
    apart = np.stack([np.hypot((x - px + 0.5) % 1 - 0.5, (y - py + 0.5) % 1 - 0.5) for px, py in points])
    return np.asarray(apart.min(axis=0) * 6 - 1, np.float32)


def _shake(rng: np.random.Generator, num_frames: int) -> Array:
    """Hand-held camera: slow zero-mean wander, (T, 2) pixels, down and across."""
    white = rng.standard_normal((num_frames + 8, 2))
    smooth = np.stack([np.convolve(white[:, i], np.ones(9) / 3, "valid") for i in range(2)], axis=1)
    return np.asarray(SHAKE_PIXELS * (smooth - smooth.mean(axis=0)), np.float32)


def _rolled(canvas: Array, shake: Array) -> Array:
    """The background seen by the shaking camera, (T, H, W, 3)."""
    side = canvas.shape[0]
    move = np.rint(shake).astype(np.int64)
    line = np.arange(side)
    rows, columns = (line - move[:, :1]) % side, (line - move[:, 1:]) % side
    return np.ascontiguousarray(canvas[rows[:, :, None], columns[:, None, :]])


def _lit(rng: np.random.Generator, frames: Array, fps: int) -> Frames:
    """Changing light, then sensor noise; to uint8."""
    num_frames, side = frames.shape[:2]
    seconds = np.arange(num_frames) / fps
    light = rng.uniform(0.75, 1.1) * (
        1 + 0.12 * np.sin(2 * np.pi * rng.uniform(0.2, 0.9) * seconds + rng.uniform(0, 2 * np.pi))
    )
    frames *= (255 * light).astype(np.float32)[:, None, None, None]
    frames += NOISE_LEVELS * rng.standard_normal((num_frames, side, side, 1), dtype=np.float32)
    return np.clip(frames, 0, 255).astype(np.uint8)


if __name__ == "__main__":
    _write_part(json.load(sys.stdin))
