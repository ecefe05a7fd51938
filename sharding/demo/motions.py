"""How things move in the demo's clips: the actions, the paths of shapes and objects, the camera and the light.

A shape has four coordinates (across, down, turn, size), each on a circle: what leaves on one side enters on the other.
An object stays in the picture: its place and size go to and fro. Either way each coordinate is uniform over its range
in every frame, whatever the motion: a frame alone says nothing about it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cliplift.sharding.demo.shapes import SPRITE_PIXELS, Array
from cliplift.sharding.video.decode import Frames

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
SHAKE_PIXELS = 0.6
NOISE_LEVELS = 2.5

# motion of an object -> the coordinate that moves, and how often a second it goes to and fro, slowest and fastest.
MOTIONS: Mapping[str, tuple[int, float, float]] = {
    "pulse": (SIZE, 0.6, 0.8),
    "rest": (SIZE, 0.0, 0.0),
    "swing": (ACROSS, 1.6, 2.2),
}
OBJECT_RANGE = {ACROSS: (0.36, 0.64), DOWN: (0.42, 0.58), TURN: (0.0, 1.0), SIZE: (0.0, 1.0)}
OBJECT_RADIUS = (0.18, 0.36)  # smallest and largest, share of the picture's side


def shape_path(rng: np.random.Generator, action: str | None, *, num_frames: int, fps: int) -> Array:
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


def object_path(rng: np.random.Generator, motion: str, *, num_frames: int, fps: int) -> Array:
    """The four coordinates of one object over time, (4, T), each within its :data:`OBJECT_RANGE`.

    At most one coordinate moves: to and fro at a constant speed, from a random place.
    """
    moving, slowest, fastest = MOTIONS[motion]
    phase = np.repeat(rng.random((4, 1)), num_frames, axis=1)
    cycles = rng.uniform(slowest, fastest) * rng.choice((-1, 1))
    phase[moving] = (phase[moving] + cycles * np.arange(num_frames) / fps) % 1.0
    path = np.empty((4, num_frames), np.float32)
    for coordinate, (low, high) in OBJECT_RANGE.items():
        share = phase[coordinate] if coordinate == TURN else np.abs(2 * phase[coordinate] - 1)
        path[coordinate] = low + (high - low) * share
    return path


def draw_shape(
    frames: Array,
    sprite: Array,
    path: Array,
    shake: Array,
    *,
    radii: tuple[float, float] = (SMALLEST, LARGEST),
    fade: float | None = FADE,
) -> None:
    """Blend a shape into the frames (T, H, W, 3), in place; what leaves on one side enters on the other.

    Args:
        frames: RGB in [0, 1].
        sprite: RGBA, (S, S, 4).
        path: the four coordinates over time, (4, T).
        shake: of the camera, (T, 2) pixels, down and across.
        radii: smallest and largest radius, share of the picture's side.
        fade: share of the size range over which it appears and vanishes at both ends; None shows it always.
    """
    num_frames, side = frames.shape[:2]
    smallest, largest = radii
    radius = smallest * (largest / smallest) ** path[SIZE] * side
    opacity = (
        np.ones_like(radius) if fade is None else np.clip(np.minimum(path[SIZE], 1 - path[SIZE]) / fade, 0, 1)
    )
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


def camera_shake(rng: np.random.Generator, num_frames: int) -> Array:
    """Hand-held camera: slow zero-mean wander, (T, 2) pixels, down and across."""
    white = rng.standard_normal((num_frames + 8, 2))
    smooth = np.stack([np.convolve(white[:, i], np.ones(9) / 3, "valid") for i in range(2)], axis=1)
    return np.asarray(SHAKE_PIXELS * (smooth - smooth.mean(axis=0)), np.float32)


def seen_by_camera(canvas: Array, shake: Array) -> Array:
    """The background seen by the shaking camera, (T, H, W, 3)."""
    side = canvas.shape[0]
    move = np.rint(shake).astype(np.int64)
    line = np.arange(side)
    rows, columns = (line - move[:, :1]) % side, (line - move[:, 1:]) % side
    return np.ascontiguousarray(canvas[rows[:, :, None], columns[:, None, :]])


def lit(rng: np.random.Generator, frames: Array, fps: int) -> Frames:
    """Changing light, then sensor noise; to uint8."""
    num_frames, side = frames.shape[:2]
    seconds = np.arange(num_frames) / fps
    light = rng.uniform(0.75, 1.1) * (
        1 + 0.12 * np.sin(2 * np.pi * rng.uniform(0.2, 0.9) * seconds + rng.uniform(0, 2 * np.pi))
    )
    frames *= (255 * light).astype(np.float32)[:, None, None, None]
    frames += NOISE_LEVELS * rng.standard_normal((num_frames, side, side, 1), dtype=np.float32)
    return np.clip(frames, 0, 255).astype(np.uint8)
