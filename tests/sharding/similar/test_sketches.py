"""Whether two clips show the same: copies of moving pictures, changed in each way, against others of the same place."""

from __future__ import annotations

import numpy as np
import pytest

from cliplift.sharding.similar.sketches import Sketch, picture, sketch_frames

SIDE = 96


def place(seed: int) -> np.ndarray:
    """(96, 96) a smooth picture of a place."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    waves = np.random.default_rng(seed).normal(size=(5, 3)) * 6
    field = sum(np.sin(a * x + b * y + c) for a, b, c in waves)
    return 120 + 25 * field


def film(where: int, what: int, *, frames: int = 75, speed: float = 1.0, start: float = 0.0) -> np.ndarray:
    """(T, 96, 96, 3) two patches that move through a place; 25 frames a second."""
    rng = np.random.default_rng(1000 + what)
    y, x = np.mgrid[:SIDE, :SIDE]
    found = np.repeat(place(where)[None], frames, axis=0)
    for _ in range(2):
        begin, pace = rng.uniform(0, SIDE, 2), rng.uniform(-14, 14, 2)
        level, phase = rng.choice([-1, 1]) * rng.uniform(50, 90), rng.uniform(0, 6)
        for t in range(frames):
            seconds = start + speed * t / 25
            at = (begin + pace * seconds + 8 * np.sin(phase + 2 * seconds)) % SIDE
            found[t] += level * np.exp(-(((y - at[0]) ** 2 + (x - at[1]) ** 2) / 120))
    return np.repeat(found.clip(0, 255)[..., None], 3, axis=-1).astype(np.uint8)


def sketch(frames: np.ndarray) -> Sketch:
    numbers, spacing = sketch_frames(len(frames), 25.0)
    return Sketch(spacing, np.stack([picture(frames[n]) for n in numbers]))


def noisy(frames: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(len(frames)).normal(scale=4, size=frames.shape)
    return (frames + noise).clip(0, 255).astype(np.uint8)


CHANGES = {
    "encoded": noisy,
    "smaller": lambda frames: frames.reshape(-1, 48, 2, 48, 2, 3).mean(axis=(2, 4)).astype(np.uint8),
    "cropped": lambda frames: frames[:, 2:92, 4:94],
    "recoloured": lambda frames: (255 * (frames * np.array([0.9, 0.7, 0.8]) / 255) ** 0.85).astype(np.uint8),
    "mirrored": lambda frames: frames[:, :, ::-1],
    "cut": lambda frames: frames[20:],
}


@pytest.mark.parametrize("change", [*CHANGES, "faster"])
def test_a_changed_copy_shows_the_same(change: str) -> None:
    for where, what in ((0, 0), (1, 4)):
        whole = film(where, what)
        changed = film(where, what, frames=60, speed=1.25) if change == "faster" else CHANGES[change](whole)
        assert sketch(whole).same(sketch(changed)) is not None
        assert sketch(changed).same(sketch(whole)) is not None


def test_other_clips_of_the_same_place_do_not() -> None:
    sketches = [sketch(noisy(film(where, what))) for where in (0, 1) for what in range(6)]
    for i, one in enumerate(sketches):
        assert [one.same(other) for other in sketches[:i]] == [None] * i


def test_where_nothing_moves_the_picture_decides() -> None:
    still = [
        np.repeat(np.kron(place(n), np.ones((2, 2)))[None, ..., None], 30, axis=0)
        .repeat(3, -1)
        .astype(np.uint8)
        for n in range(4)
    ]
    for i, one in enumerate(still):
        assert sketch(one).same(sketch(noisy(one[:25])[:, ::2])) is not None
        assert [sketch(one).same(sketch(other)) for other in still[:i]] == [None] * i
    even = np.full((50, 64, 64, 3), 16, dtype=np.uint8)
    assert sketch(even).same(sketch(even)) is None, "what is even is like many"


def test_a_picture_is_the_means_of_its_parts() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (66, 100, 3)).astype(np.uint8)
    luma = (frame.astype(int) @ [77, 150, 29]) // 256
    rows, columns = ([i * n // 32 for i in range(33)] for n in (66, 100))
    for i, j in ((0, 0), (31, 31), (7, 3)):
        part = luma[rows[i] : rows[i + 1], columns[j] : columns[j + 1]]
        assert float(picture(frame)[i, j]) == pytest.approx(float(part.mean()), rel=1e-6)
    assert picture(frame[:5, :3]).shape == (32, 32)


@pytest.mark.parametrize(
    ("frames", "fps", "count", "spacing"),
    [
        (250, 25.0, 24, 250 / 24 / 25),
        (25, 25.0, 8, 0.125),
        (2400, 30.0, 24, 80 / 24),
        (3, 10.0, 3, 0.1 * 1.25),
    ],
)
def test_pictures_lie_at_even_distances(frames: int, fps: float, count: int, spacing: float) -> None:
    numbers, seconds = sketch_frames(frames, fps)
    assert (len(numbers), numbers[0]) == (count, 0)
    assert seconds == pytest.approx(spacing)
    assert numbers[-1] < frames
    assert np.abs(numbers - np.arange(count) * seconds * fps).max() <= 1
