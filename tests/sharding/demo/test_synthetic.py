"""The demo's clips: motion tells the class, a single frame does not, splits share no looks, files are reproducible."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from cliplift.sharding.demo.motions import ACTIONS, CLASSES, shape_path
from cliplift.sharding.demo.shapes import LOOKS, outline
from cliplift.sharding.demo.synthetic import render_clip, write_demo_videos
from cliplift.sharding.video.decode import decode_frames, probe

SIZE, FPS, FRAMES = 48, 15, 15


def _clips(action: str, numbers: range, *, split: str = "train") -> np.ndarray:
    return np.stack(
        [
            render_clip(
                split=split, action=action, number=n, seed=7, size_pixels=SIZE, fps=FPS, num_frames=FRAMES
            )
            for n in numbers
        ]
    )


@pytest.fixture(scope="module")
def gray_clips() -> tuple[np.ndarray, np.ndarray]:
    """(classes, clips, T, H, W) luma of clips to learn from and of other clips of the same split to test on."""
    luma = {name: _clips(name, range(60)).mean(axis=-1) for name in CLASSES}
    both = np.stack([luma[name] for name in CLASSES])
    return both[:, :40], both[:, 40:]


def _ridge_accuracy(train: np.ndarray, test: np.ndarray, penalty: float) -> float:
    """Accuracy of one-against-all ridge regression; inputs are (classes, samples, features)."""
    classes, samples, features = train.shape
    x, y = train.reshape(-1, features), np.repeat(np.eye(classes), samples, axis=0)
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    x = (x - mean) / scale
    # The dual form: as many unknowns as samples.
    weights = x.T @ np.linalg.solve(x @ x.T + penalty * len(x) * np.eye(len(x)), y - y.mean(axis=0))
    guess = ((test.reshape(-1, features) - mean) / scale @ weights).argmax(axis=1)
    return float((guess == np.repeat(np.arange(classes), test.shape[1])).mean())


@pytest.mark.slow
@pytest.mark.parametrize("frame", [0, FRAMES // 2, FRAMES - 1])
def test_a_single_frame_does_not_tell_the_class(
    gray_clips: tuple[np.ndarray, np.ndarray], frame: int
) -> None:
    train, test = (
        clips[:, :, frame]
        .reshape(*clips.shape[:2], 12, 4, 12, 4)
        .mean(axis=(3, 5))
        .reshape(*clips.shape[:2], -1)
        for clips in gray_clips
    )
    count = test.shape[0] * test.shape[1]
    chance = 1 / len(CLASSES)
    bound = chance + 4 * np.sqrt(chance * (1 - chance) / count)  # four standard deviations of guessing
    for penalty in (0.1, 1.0, 10.0):
        assert _ridge_accuracy(train, test, penalty) < bound


@pytest.mark.slow
def test_frame_differences_tell_the_direction(gray_clips: tuple[np.ndarray, np.ndarray]) -> None:
    directions = [CLASSES.index(name) for name in ("move_left", "move_right", "move_up", "move_down")]
    features = []
    for every_class in gray_clips:
        clips = every_class[directions]
        change = np.diff(clips, axis=2)
        across = (np.roll(clips, -1, axis=4) - np.roll(clips, 1, axis=4))[:, :, :-1]
        down = (np.roll(clips, -1, axis=3) - np.roll(clips, 1, axis=3))[:, :, :-1]
        flow = [
            (change * slope).mean(axis=(2, 3, 4)) / (slope**2).mean(axis=(2, 3, 4))
            for slope in (across, down)
        ]
        features.append(np.stack(flow, axis=-1))
    assert _ridge_accuracy(*features, penalty=1e-3) > 0.7  # chance is 0.25


@pytest.mark.parametrize("action", CLASSES)
def test_every_coordinate_is_uniform_at_every_time(action: str) -> None:
    count = 800
    paths = np.stack(
        [shape_path(np.random.default_rng([n, 5]), action, num_frames=20, fps=15) for n in range(count)]
    )
    expected = (np.arange(count) + 0.5) / count
    for coordinate, time in itertools.product(range(4), (0, 10, 19)):
        furthest = np.abs(np.sort(paths[:, coordinate, time]) - expected).max()
        # Kolmogorov-Smirnov: 2.2/sqrt(n) is passed by chance once in 8,000 for one of the 120 comparisons.
        assert furthest < 2.2 / np.sqrt(count)


@pytest.mark.parametrize("action", CLASSES)
def test_the_action_moves_its_own_coordinate(action: str) -> None:
    coordinate, direction = ACTIONS[action]
    path = shape_path(np.random.default_rng(3), action, num_frames=20, fps=15).astype(np.float64)
    steps = (np.diff(path, axis=1) + 0.5) % 1 - 0.5
    still = [c for c in range(4) if c != coordinate]
    assert np.abs(steps[still]).max() < 1e-6
    if direction:
        assert (np.sign(steps[coordinate]) == direction).all()
    else:
        assert abs(steps[coordinate].sum()) < 0.4
        assert (steps[coordinate] > 0).any()
        assert (steps[coordinate] < 0).any()


def test_splits_share_no_shape_background_or_colour() -> None:
    seen = [LOOKS[name] for name in ("train", "val", "test")]
    for first, second in itertools.combinations(seen, 2):
        assert not set(first.shapes) & set(second.shapes)
        assert not set(first.backgrounds) & set(second.backgrounds)
        assert all(a[1] < b[0] or b[1] < a[0] for a in first.hues for b in second.hues)
        assert first.seed != second.seed


@pytest.mark.parametrize("shape", sorted({shape for look in LOOKS.values() for shape in look.shapes}))
def test_an_outline_fits_its_sprite_and_is_not_empty(shape: str) -> None:
    edge = outline(shape, np.linspace(-np.pi, np.pi, 721, dtype=np.float32))
    assert edge.max() <= 1.0 + 1e-5
    assert edge.min() > 0.3


@pytest.mark.parametrize("split", sorted(LOOKS))
def test_clips_are_reproducible_and_differ(split: str) -> None:
    action = None if split == "unlabelled" else "move_up"
    first = render_clip(split=split, action=action, number=0, seed=0, size_pixels=48, fps=15, num_frames=6)
    again = render_clip(split=split, action=action, number=0, seed=0, size_pixels=48, fps=15, num_frames=6)
    other = render_clip(split=split, action=action, number=1, seed=0, size_pixels=48, fps=15, num_frames=6)
    assert first.shape == (6, 48, 48, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 5


@pytest.mark.slow
def test_files_do_not_depend_on_the_number_of_workers(tmp_path) -> None:
    options = {
        "train_per_class": 1,
        "val_per_class": 1,
        "test_per_class": 1,
        "unlabelled": 2,
        "size_pixels": 48,
    }
    for workers in (1, 2):
        summary = write_demo_videos(tmp_path / str(workers), seed=3, workers=workers, **options)
        assert summary.clips == {"train": 10, "val": 10, "test": 10, "unlabelled": 2}
    files = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*.mp4"))
    assert len(files) == 32
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()
    clip = (tmp_path / "1" / "labelled/test/recede/test_recede_0000.mp4").read_bytes()
    facts = probe(clip)
    assert (facts.codec, facts.width, facts.height, facts.fps, facts.frames) == ("h264", 48, 48, 15, 21)
    drawn = render_clip(
        split="test", action="recede", number=0, seed=3, size_pixels=48, fps=15, num_frames=21
    )
    error = decode_frames(clip, [0, 20], decoder="pyav").astype(int) - drawn[[0, 20]]
    assert np.abs(error).mean() < 12  # 4:2:0 colour on saturated texture; a wrong frame differs by far more
    json.dumps(summary.clips)


def test_a_bad_size_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="size_pixels=33"):
        write_demo_videos(tmp_path, size_pixels=33)
