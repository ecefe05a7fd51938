"""The demo's clips of kinds and motions: balanced, reproducible, each class told by what is drawn and how it moves."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cliplift.sharding.demo.motions import ACROSS, DOWN, MOTIONS, OBJECT_RADIUS, OBJECT_RANGE, object_path
from cliplift.sharding.demo.objects import KINDS, VARIANTS, object_sprite
from cliplift.sharding.demo.synthetic import KIND_CLASSES, render_object, write_demo_videos
from cliplift.sharding.video.decode import probe

LABELLED = ("train", "val", "test")


def test_files_are_balanced_reproducible_and_say_what_they_show(tmp_path: Path) -> None:
    counts = {"train_per_class": 1, "val_per_class": 1, "test_per_class": 1, "unlabelled": 12}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        summary = write_demo_videos(
            folder, seed=3, workers=workers, with_kinds=True, size_pixels=32, seconds=0.4, **counts
        )
        assert summary.clips == {"train": 12, "val": 12, "test": 12, "unlabelled": 12}
        assert len(summary.classes) == 12
    rows = list(csv.DictReader((tmp_path / "1" / "clips.csv").open()))
    assert {row["path"] for row in rows} == {
        str(file.relative_to(tmp_path / "1")) for file in (tmp_path / "1").rglob("*.mp4")
    }
    for row in rows:
        first, second = ((tmp_path / name / row["path"]).read_bytes() for name in ("1", "2"))
        assert first == second
        if row["split"] != "unlabelled":
            assert Path(row["path"]).parent.name == f"{row['kind']}_{row['motion']}"
    shown = Counter((row["split"], row["kind"], row["motion"]) for row in rows)
    assert shown == dict.fromkeys(itertools.product((*LABELLED, "unlabelled"), KINDS, MOTIONS), 1)
    facts = probe((tmp_path / "1" / rows[0]["path"]).read_bytes())
    assert (facts.codec, facts.width, facts.height, facts.fps, facts.frames) == ("h264", 32, 32, 15, 6)


def test_no_variant_of_test_is_seen_in_training() -> None:
    for first, second in itertools.combinations(LABELLED, 2):
        assert not set(VARIANTS[first]) & set(VARIANTS[second])
    assert not set(VARIANTS["test"]) & set(VARIANTS["unlabelled"])


@pytest.mark.parametrize("motion", sorted(MOTIONS))
def test_a_frame_says_nothing_about_the_motion(motion: str) -> None:
    """Every coordinate is uniform over the same range at every time, whatever the motion."""
    count = 800
    paths = np.stack(
        [object_path(np.random.default_rng([n, 7]), motion, num_frames=21, fps=15) for n in range(count)]
    )
    expected = (np.arange(count) + 0.5) / count
    for (coordinate, (low, high)), time in itertools.product(OBJECT_RANGE.items(), (0, 10, 20)):
        share = np.sort(paths[:, coordinate, time] - low) / (high - low)
        # Kolmogorov-Smirnov: 2.2/sqrt(n) is passed by chance once in 8,000 for one of the 36 comparisons.
        assert np.abs(share - expected).max() < 2.2 / np.sqrt(count)


@pytest.mark.parametrize("motion", sorted(MOTIONS))
def test_the_motion_moves_its_own_coordinate_within_the_picture(motion: str) -> None:
    for seed in range(20):
        path = object_path(np.random.default_rng(seed), motion, num_frames=21, fps=15)
        travelled = {c: float(np.ptp(path[c])) / (high - low) for c, (low, high) in OBJECT_RANGE.items()}
        moving = travelled.pop(MOTIONS[motion][0])
        assert moving == 0 if motion == "rest" else moving > 0.5
        assert max(travelled.values()) == 0
        radius = OBJECT_RADIUS[1]
        assert path[[ACROSS, DOWN]].min() - radius >= 0
        assert path[[ACROSS, DOWN]].max() + radius <= 1


def _sprites(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Silhouettes (kinds x count, 24 x 24) of unseen size and turn, and their kinds."""
    found, kinds = [], []
    for number, kind in itertools.product(range(count), sorted(KINDS)):
        sprite = object_sprite(np.random.default_rng([number, 11]), kind, split)
        found.append(sprite[..., 3].reshape(24, 4, 24, 4).mean(axis=(1, 3)).ravel())
        kinds.append(sorted(KINDS).index(kind))
    return np.stack(found), np.array(kinds)


def test_outlines_tell_the_kind_of_variants_never_seen() -> None:
    train, train_kinds = _sprites("train", 12)
    test, test_kinds = _sprites("test", 12)
    means = np.stack([train[train_kinds == kind].mean(axis=0) for kind in range(len(KINDS))])
    guesses = ((test[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (guesses == test_kinds).mean() > 0.9  # chance is 0.25


def test_motions_change_the_picture_more_the_faster_they_are() -> None:
    """With noise, light and shake, in the mean over objects: at rest, slowly to and fro, fast to and fro."""
    options = {"split": "test", "seed": 0, "size_pixels": 48, "fps": 15, "num_frames": 12}
    change = {
        motion: np.mean(
            [
                np.abs(
                    np.diff(render_object(kind=kind, motion=motion, number=n, **options).astype(int), axis=0)
                )
                for kind, n in itertools.product(KINDS, range(5))
            ]
        )
        for motion in MOTIONS
    }
    assert 1.15 * change["rest"] < change["pulse"]
    assert 1.3 * change["pulse"] < change["swing"]


def test_classes_are_all_pairs() -> None:
    assert set(KIND_CLASSES) == {f"{kind}_{motion}" for kind in KINDS for motion in MOTIONS}
