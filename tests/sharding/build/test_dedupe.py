"""Duplicates over all shards: found exactly and by look, reported or removed, the same bytes whatever interrupts it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cliplift.configs.sharding import ShardRun, TranscodeConfig
from cliplift.sharding.build import dedupe
from cliplift.sharding.build.dedupe import find_duplicates
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.build.verify import verify
from cliplift.sharding.manifest import BUILD_FILE, DUPLICATES_FILE, NO_LABEL, REFUSED_FILE, Sample, ShardIndex
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.storage import LocalStore, StorageError
from cliplift.sharding.video import likeness
from cliplift.sharding.video.picture_hash import ALIKE_BITS
from cliplift.sharding.video.transcode import encode_array

MakeRun = Callable[..., ShardRun]


def film(seed: int, *, frames: int = 32, side: int = 128) -> np.ndarray:
    """Smooth blobs that drift, unlike those of any other seed, (T, side, side, 3)."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(6, 2)) * 7
    phase = rng.uniform(0, 6, 6)
    axis = np.linspace(0, 1, side)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    out = []
    for t in range(frames):
        field = sum(np.sin(a * x + b * y + p + t / 12) for (a, b), p in zip(waves, phase, strict=True))
        out.append(np.clip(128 + 40 * field, 0, 255))
    return np.repeat(np.stack(out)[..., None], 3, axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six films; one copied into test and under another class, one stored again smaller and worse."""
    root = tmp_path_factory.mktemp("films")
    for split, label, seeds in (
        ("train", "a", (0, 1, 2)),
        ("train", "b", (3,)),
        ("test", "a", (4,)),
        ("test", "b", (5,)),
    ):
        for seed in seeds:
            path = root / split / label / f"film{seed}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_array(film(seed), fps=Fraction(16), config=TranscodeConfig(crf=15)))
    shutil.copy(root / "train/a/film0.mp4", root / "test/a/again0.mp4")
    shutil.copy(root / "train/a/film1.mp4", root / "train/b/again1.mp4")
    smaller = film(2).reshape(32, 64, 2, 64, 2, 3).mean(axis=(2, 4)).astype(np.uint8)
    (root / "train/a/small2.mp4").write_bytes(
        encode_array(smaller, fps=Fraction(16), config=TranscodeConfig(crf=26))
    )
    return root


@pytest.fixture
def run_of(make_run: MakeRun, videos: Path) -> MakeRun:
    source = {"kind": "folder", "root": str(videos), "layout": "split/class"}
    return lambda output, **changes: make_run(
        output, source=source, shards={"videos_per_shard": 2}, **changes
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != BUILD_FILE
    }


def sources(output: Path) -> set[str]:
    dataset = ShardDataset(str(output))
    return {dataset.facts(i).source for i in range(len(dataset))}


ALL = {
    "train/a/film0.mp4", "train/a/film1.mp4", "train/a/film2.mp4", "train/b/film3.mp4", "test/a/film4.mp4",
    "test/b/film5.mp4", "test/a/again0.mp4", "train/b/again1.mp4", "train/a/small2.mp4",
}  # fmt: skip


def test_duplicates_are_reported(run_of: MakeRun, tmp_path: Path) -> None:
    report = run_shard(run_of(tmp_path / "out"))
    assert sources(tmp_path / "out") == ALL
    record = json.loads((tmp_path / "out" / BUILD_FILE).read_text())["duplicates"]
    assert record == {
        "action": "report", "exact": 2, "look": 1, "removed": 0, "across_splits": 1, "across_labels": 1
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out" / DUPLICATES_FILE).read_text().splitlines()]
    assert {(row["source"], row["kind"]) for row in rows} >= {("train/a/film0.mp4", "exact")}
    assert report.verified is not None
    assert not report.verified.ok  # the same video in train and test is a leak


def test_duplicates_are_removed(run_of: MakeRun, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = run_shard(run_of(output, duplicates="remove", verify_decode="full"))
    left = sources(output)
    assert "test/a/again0.mp4" in left  # the evaluation split keeps its copy
    assert "train/a/film0.mp4" not in left
    assert len({"train/a/film1.mp4", "train/b/again1.mp4"} & left) == 1
    assert len({"train/a/film2.mp4", "train/a/small2.mp4"} & left) == 1
    assert len(left) == 6
    assert report.duplicates is not None
    assert (report.duplicates.exact, report.duplicates.look, report.duplicates.removed) == (2, 1, 3)
    assert report.verified is not None
    assert report.verified.problems == ()
    ledger = [json.loads(line) for line in (output / REFUSED_FILE).read_text().splitlines()]
    assert {entry["stage"] for entry in ledger} == {"duplicate"}
    told = {entry["source"]: entry["reason"] for entry in ledger}
    assert told["train/a/film0.mp4"].startswith("same content as test/a/again0.mp4 (")
    assert told["train/a/film0.mp4"].endswith("), in another split")
    once = contents(output)
    again = run_shard(run_of(output, duplicates="remove"))
    assert (again.shards_built, again.duplicates) == (0, report.duplicates)
    assert contents(output) == once


@pytest.mark.slow
def test_only_exact_ones_are_removed_when_asked(run_of: MakeRun, tmp_path: Path) -> None:
    report = run_shard(run_of(tmp_path / "out", duplicates="remove_exact"))
    assert {"train/a/film2.mp4", "train/a/small2.mp4"} <= sources(tmp_path / "out")
    assert report.duplicates is not None
    assert (report.duplicates.exact, report.duplicates.look, report.duplicates.removed) == (2, 1, 2)
    (row,) = (json.loads(line) for line in (tmp_path / "out" / DUPLICATES_FILE).read_text().splitlines())
    assert row["kind"] == "look"


@pytest.mark.slow
@pytest.mark.parametrize("when", ["publish", "write"])
def test_a_removal_that_is_interrupted_ends_in_the_same_bytes(
    run_of: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    run_shard(run_of(tmp_path / "whole", duplicates="remove"))
    run = run_of(tmp_path / "out", duplicates="remove")
    run_shard(run, phases=["build"])
    original = getattr(LocalStore, when)
    calls: list[object] = []

    def second_fails(self: LocalStore, first: object, second: object) -> None:
        if when == "publish" or str(first).endswith(".index.json"):
            calls.append(first)
        if len(calls) == 2:
            raise StorageError("the disk is gone")
        original(self, first, second)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, when, second_fails)
        with pytest.raises(StorageError):
            run_shard(run, phases=["finalize"])
    report = run_shard(run)
    assert (
        report.shards_built == 1
    )  # the shard that was being written again has no index, so it is built again
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_removed_shard_can_be_rebuilt(run_of: MakeRun, tmp_path: Path) -> None:
    run = run_of(tmp_path / "out", duplicates="remove")
    run_shard(run)
    whole = contents(tmp_path / "out")
    for tar in sorted((tmp_path / "out").rglob("*.tar"))[::2]:
        tar.write_bytes(tar.read_bytes()[:-1])
    assert run_shard(run).shards_built >= 2
    assert contents(tmp_path / "out") == whole
    assert run_shard(run, retry_failed=True).shards_built >= 1
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_shards_on_an_object_store(run_of: MakeRun, tmp_path: Path) -> None:
    import fsspec

    run_shard(run_of(tmp_path / "out", duplicates="remove"))
    run_shard(run_of("memory://dedupe/out", duplicates="remove"))
    fs = fsspec.filesystem("memory")
    tars = {
        name: fs.cat(f"/dedupe/out/{name}") for name in contents(tmp_path / "out") if name.endswith(".tar")
    }
    assert tars == {n: d for n, d in contents(tmp_path / "out").items() if n.endswith(".tar")}
    assert verify("memory://dedupe/out", decode="none").ok
    fs.rm("/dedupe", recursive=True)


SAMPLE = Sample(
    key="0", mp4_offset=0, mp4_bytes=1, mp4_crc32=1, json_offset=0, json_bytes=0, json_crc32=0, video_id="v",
    source="s", split="train", label=NO_LABEL, labels=(), folds=(), group=None, start_seconds=0.0,
    end_seconds=1.0, num_frames=8, fps=8.0, width=8, height=8, keyframes=(0,), source_sha256="x",
)  # fmt: skip


def sample(name: str, *, content: str | None = None, split: str = "train") -> Sample:
    number = int.from_bytes(name.encode(), "big")
    return replace(
        SAMPLE, video_id=name, source=name, split=split, source_sha256=content or name, mp4_crc32=number
    )


LOOK = 0x0F1E2D3C4B5A6978


def test_likeness_is_not_passed_on_through_removed_clips() -> None:
    """b is like a, c is like b but not like a: b goes, c stays, and a second pass finds nothing."""
    looks = [(LOOK,), (LOOK ^ 0b111,), (LOOK ^ 0b111111,)]
    clips = [sample(name) for name in "abc"]
    assert [(d.number, d.of, d.kind) for d in find_duplicates(clips, looks)] == [(1, 0, "look")]
    assert find_duplicates([clips[0], clips[2]], [looks[0], looks[2]]) == []


def test_windows_of_one_video_are_not_duplicates() -> None:
    clips = [replace(sample("a"), start_seconds=float(n), mp4_crc32=7) for n in range(3)]
    assert find_duplicates(clips, [(LOOK,)] * 3) == []


def test_a_clip_without_contrast_or_look_is_compared_by_content_only() -> None:
    clips = [sample("a"), sample("b"), sample("c", content="a"), sample("d")]
    found = find_duplicates(clips, [(0,), (0,), (0,), ()])
    assert [(d.number, d.of, d.kind) for d in found] == [(2, 0, "exact")]


@pytest.mark.slow
def test_a_damaged_member_is_not_copied(run_of: MakeRun, tmp_path: Path) -> None:
    run = run_of(tmp_path / "out", duplicates="remove")
    run_shard(run, phases=["build"])
    for tar in (tmp_path / "out").rglob("*.tar"):
        data = bytearray(tar.read_bytes())
        data[700] ^= 1
        tar.write_bytes(data)
    with pytest.raises(dedupe.BuildError, match=r"\.tar, .*\.mp4: crc32 differs; build again"):
        run_shard(run, phases=["finalize"])
    assert run_shard(run).dataset is not None


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), clips=st.integers(1, 60), buffered=st.sampled_from([1, 9, 1000]))
def test_clips_that_are_held_are_those_that_matter(seed: int, clips: int, buffered: int) -> None:
    """The duplicates among the clips that are held are those among all, and strangers are not held."""
    draw = np.random.default_rng(seed)
    looks = [int(draw.integers(1, 2**63)) for _ in range(4)]
    made, pictures = [], []
    for number in range(clips):
        name, split = f"{draw.integers(0, 40)}", ("train", "val")[draw.integers(0, 2)]
        content = f"c{draw.integers(0, 30)}" if draw.random() < 0.4 else f"own{number}"
        made.append(replace(sample(name, content=content, split=split), mp4_crc32=number))
        look = looks[draw.integers(0, 4)] if draw.random() < 0.5 else int(draw.integers(1, 2**63))
        for bit in draw.integers(0, 63, draw.integers(0, 5)).tolist():
            look ^= 1 << bit
        pictures.append((look, *looks[: draw.integers(0, 2)])[: draw.integers(0, 3)])
    per_shard = int(draw.integers(1, 9))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(likeness, "BUFFERED", buffered)
        patch.setattr(likeness, "PAIRS", 7)
        survey = dedupe._Survey(Path(folder))
        for first in range(0, clips, per_shard):
            mine = slice(first, first + per_shard)
            survey.add(ShardIndex(0, "s", "t", 0, "", "p", tuple(made[mine]), (), tuple(pictures[mine])))
        held = survey.possible().tolist()
    assert survey.ends.tolist() == [min(clips, n + per_shard) for n in range(0, clips, per_shard)]
    found = find_duplicates([made[n] for n in held], [pictures[n] for n in held])
    assert [(held[d.number], held[d.of], d.kind) for d in found] == [
        (d.number, d.of, d.kind) for d in find_duplicates(made, pictures)
    ]
    for number in held:
        mine = made[number], pictures[number]
        others = [n for n in range(clips) if made[n].video_id != mine[0].video_id]
        assert any(
            made[n].source_sha256 == mine[0].source_sha256
            or (
                len(pictures[n]) == len(mine[1]) > 0
                and (pictures[n][0] ^ mine[1][0]).bit_count() <= ALIKE_BITS
            )
            for n in others
        )
