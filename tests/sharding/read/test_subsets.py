"""Validation carved by group and few-label subsets: properties over random data, and on the true ARID list."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cliplift.configs.sections import ConfigError
from cliplift.sharding.read.subsets import Subset, few_labels, held_out

SAMPLES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=30, max_size=120)


@settings(max_examples=60)
@given(samples=SAMPLES, share=st.sampled_from([0.1, 0.2, 0.5]), seed=st.integers(0, 5))
def test_groups_stay_whole_and_no_class_is_lost(
    samples: list[tuple[int, int]], share: float, seed: int
) -> None:
    labels = [label for label, _ in samples]
    groups = [f"{label}-{group}" for label, group in samples]  # groups within a class
    if min(len({g for g in groups if g.startswith(f"{k}-")}) for k in set(labels)) < 3:
        return
    try:
        out = held_out(labels, groups, share=share, seed=seed)
    except ConfigError:
        largest = min(Counter(groups).values())
        assert largest > 2 * share * max(Counter(labels).values()), "only where every group is too large"
        return
    for group in set(groups):
        assert len({bool(o) for o, g in zip(out, groups, strict=True) if g == group}) == 1
    for label, total in Counter(labels).items():
        mine = [bool(o) for o, k in zip(out, labels, strict=True) if k == label]
        assert sum(mine) < total
        biggest = max(Counter(g for g, k in zip(groups, labels, strict=True) if k == label).values())
        assert sum(mine) <= share * total + biggest / 2
    order = np.random.default_rng(seed).permutation(len(samples))
    again = held_out([labels[i] for i in order], [groups[i] for i in order], share=share, seed=seed)
    assert again.tolist() == out[order].tolist(), "the order of the samples does not matter"


def test_both_sides_are_the_whole() -> None:
    labels = [i % 3 for i in range(60)]
    groups = [f"scene{i % 12}" for i in range(60)]  # scenes that every class may share
    ids = [f"v{i}" for i in range(60)]
    train, val = (
        Subset(held_out_share=0.25, held_out=side).mask(labels=labels, groups=groups, video_ids=ids)
        for side in (False, True)
    )
    assert (train ^ val).all()
    assert not {g for g, t in zip(groups, train, strict=True) if t} & {
        g for g, v in zip(groups, val, strict=True) if v
    }
    assert 0.1 < val.mean() < 0.4
    other = Subset(held_out_share=0.25, held_out=True, seed=1).mask(
        labels=labels, groups=groups, video_ids=ids
    )
    assert other.tolist() != val.tolist()


def test_one_group_cannot_be_cut() -> None:
    with pytest.raises(ConfigError, match="cannot be cut"):
        held_out([0, 0, 1, 1], ["a", "a", "b", "b"], share=0.5, seed=0)


def test_few_labels_are_nested_and_cover_every_class() -> None:
    labels = [i % 5 for i in range(500)]
    ids = [f"v{i // 2}" for i in range(500)]  # two clips of a video, of two classes
    every = np.ones(500, dtype=bool)
    masks = {s: few_labels(labels, ids, keep=every, share=s, seed=3) for s in (0.01, 0.1, 0.5, 1.0)}
    assert {labels[i] for i in np.flatnonzero(masks[0.01])} == set(range(5))
    assert masks[0.01].sum() == 5, "one of a class's hundred videos each"
    assert masks[0.1].sum() == 50
    for smaller, larger in ((0.01, 0.1), (0.1, 0.5), (0.5, 1.0)):
        assert not (masks[smaller] & ~masks[larger]).any()
    assert masks[1.0].all()


def test_subset_of_a_carved_split_leaves_validation_alone() -> None:
    labels, groups = [i % 2 for i in range(80)], [f"g{i % 20}" for i in range(80)]
    ids = [f"v{i}" for i in range(80)]
    whole = Subset(held_out_share=0.2).mask(labels=labels, groups=groups, video_ids=ids)
    few = Subset(held_out_share=0.2, label_share=0.1).mask(labels=labels, groups=groups, video_ids=ids)
    assert not (few & ~whole).any()
    assert 2 <= few.sum() <= 8


def test_real_groups_are_never_cut(repository: Path) -> None:
    listed = repository.parent / "shared/data/arid6/train.txt"
    if not listed.is_file():
        pytest.skip("the real clips are not beside the repository")
    names = [
        line.split()[-1].rsplit("/", 1)[-1].removesuffix(".mp4") for line in listed.read_text().splitlines()
    ]
    parts = [name.split("_") for name in names if name.count("_") >= 2]
    classes = sorted({p[0] for p in parts})
    labels, scenes = [classes.index(p[0]) for p in parts], [p[1] for p in parts]
    out = held_out(labels, scenes, share=0.2, seed=0)
    assert not {s for s, o in zip(scenes, out, strict=True) if o} & {
        s for s, o in zip(scenes, out, strict=True) if not o
    }
    assert {k for k, o in zip(labels, out, strict=True) if not o} == set(range(len(classes)))
