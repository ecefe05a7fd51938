"""One clip stays of each group: by rank, never by a chain, the same on any order of the work, and between two sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cliplift.sharding.similar import groups, pairs
from cliplift.sharding.similar.exact import ArrayVectors
from cliplift.sharding.similar.groups import Grouped, group_clips, same_clips
from cliplift.sharding.similar.kmeans import centroids_of


class Clips(ArrayVectors):
    """Vectors, and sketches: clips of one kind show the same."""

    def __init__(self, values: np.ndarray, kinds: list[int]) -> None:
        super().__init__(values)
        self.kinds = kinds

    def sketch(self, row: int) -> tuple[float, np.ndarray]:
        rng = np.random.default_rng(self.kinds[row])
        return 0.5, rng.integers(0, 255, (6, 32, 32)).astype(np.float32)


def grouped(
    clips: Clips, folder: Path, *, rank: list[int] | None = None, video: list[int] | None = None
) -> Grouped:
    return group_clips(
        clips,
        centroids_of(clips, clusters=2, seed=0),
        rank=np.array(rank or range(clips.rows)),
        video=np.array(video or range(clips.rows)),
        folder=folder,
    )


@pytest.fixture
def by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sketches are compared by the kinds of the clips."""

    class Kind:
        def __init__(self, pictures: np.ndarray) -> None:
            self.first = pictures[0].tolist()

        def same(self, other: Kind) -> float | None:
            return 1.0 if self.first == other.first else None

    monkeypatch.setattr("cliplift.sharding.similar.sketches.Sketch", lambda _, pictures: Kind(pictures))


def near(rows: int, seed: int = 0) -> np.ndarray:
    """Vectors of a cosine of some .97 to each other."""
    rng = np.random.default_rng(seed)
    return 1 + 0.18 * rng.normal(size=(rows, 64))


def test_the_clip_of_lowest_rank_stays(tmp_path: Path) -> None:
    clips = Clips(near(6), [7, 7, 8, 7, 8, 9])
    assert grouped(clips, tmp_path).of.tolist() == [-1, 0, -1, 0, 2, -1]
    assert grouped(clips, tmp_path, rank=[5, 3, 4, 0, 1, 2]).of.tolist() == [3, 3, 4, -1, -1, -1]


def test_clips_of_one_video_are_no_duplicates(tmp_path: Path) -> None:
    clips = Clips(near(4), [7, 7, 7, 8])
    assert grouped(clips, tmp_path, video=[0, 0, 1, 1]).of.tolist() == [-1, -1, 0, -1]
    same = Clips(np.ones((4, 8)), [7, 7, 7, 8])
    assert grouped(same, tmp_path, video=[0, 0, 1, 1]).of.tolist() == [-1, -1, 0, -1], "also of equal vectors"


def test_clips_without_a_vector_are_left_alone(tmp_path: Path) -> None:
    values = near(4)
    values[1:3] = np.nan
    found = grouped(Clips(values, [7, 7, 7, 7]), tmp_path)
    assert found.of.tolist() == [-1, -1, -1, 0]
    assert (found.cluster < 0).tolist() == [False, True, True, False]


def test_a_chain_removes_nothing_that_resembles_no_kept_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 is like 0, 2 is like 1 and not like 0."""
    alike = {(1, 0), (2, 1)}
    monkeypatch.setattr(groups._Search, "_same", lambda _, row, other: 1.0 if (row, other) in alike else None)
    assert grouped(Clips(near(3), [0, 0, 0]), tmp_path).of.tolist() == [-1, 0, -1]


@pytest.mark.usefixtures("by_kind")
@pytest.mark.parametrize("most", [1, 2, 5])
def test_more_alike_than_are_listed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(groups, "MOST_PER_CLIP", most)
    monkeypatch.setattr(pairs, "KEPT_BEFORE_CUT", 30)
    kinds = [n % 3 for n in range(40)]
    found = grouped(Clips(near(40, seed=2), kinds), tmp_path)
    kept = np.flatnonzero(found.of < 0).tolist()
    for row, of in enumerate(found.of.tolist()):
        assert of < 0 or (of in kept and kinds[of] == kinds[row]), "each shows what a kept clip shows"
    if most == 5:
        assert kept == [0, 1, 2]


@pytest.mark.usefixtures("by_kind")
def test_many_equal_vectors_are_not_compared_with_each_other(tmp_path: Path) -> None:
    found = grouped(Clips(np.ones((400, 8)), [0] * 400), tmp_path)
    assert found.of.tolist() == [-1] + [0] * 399
    assert found.compared < 800


def test_clips_of_one_set_that_another_set_has() -> None:
    values = near(30)
    train = Clips(values[:20], list(range(20)))
    test = Clips(values[18:], [18, 5, 100, 101, *range(102, 110)])
    found = {(pair.first, pair.second) for pair in same_clips(train, test, threshold=0.9)}
    assert found == {(18, 0), (5, 1)}
