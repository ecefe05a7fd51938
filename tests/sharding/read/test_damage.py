"""Damaged tars: stock webdataset loses samples without a word; our reader raises and ``verify`` says what is lost.

Each damage is one line of the table in ``docs/sharding.md``; the numbers of samples that webdataset still gives are
asserted too, so the table stays true.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import webdataset

from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.build.verify import verify
from cliplift.sharding.manifest import Sample, index_file, load_index
from cliplift.sharding.read.reader import ShardDataset, ShardReadError

SAMPLES = 6


@dataclass(frozen=True)
class Damage:
    """One way to spoil a shard, and what is lost by it."""

    name: str
    spoil: Callable[[bytearray, tuple[Sample, ...]], bytes]
    lost_mp4: set[int]
    webdataset_samples: int
    webdataset_error: bool = False
    lost_json: frozenset[int] = frozenset()


def _cut(at: int) -> Callable[[bytearray, tuple[Sample, ...]], bytes]:
    return lambda data, _: bytes(data[:at])


def _padded(length: int) -> int:
    return -(-length // 512) * 512


def _cut_after_mp4(data: bytearray, samples: tuple[Sample, ...]) -> bytes:
    return bytes(data[: samples[3].mp4_offset + _padded(samples[3].mp4_bytes)])


def _cut_between_samples(data: bytearray, samples: tuple[Sample, ...]) -> bytes:
    return bytes(data[: samples[3].mp4_offset - 512])


def _cut_in_header(data: bytearray, samples: tuple[Sample, ...]) -> bytes:
    return bytes(data[: samples[3].mp4_offset - 256])


def _cut_in_payload(data: bytearray, samples: tuple[Sample, ...]) -> bytes:
    return bytes(data[: samples[3].mp4_offset + 700])


def _cut_in_json(data: bytearray, samples: tuple[Sample, ...]) -> bytes:
    return bytes(data[: samples[3].json_offset + 10])


def _flip_size_digit(data: bytearray, samples: tuple[Sample, ...]) -> bytes:
    data[samples[3].mp4_offset - 512 + 124 + 10] ^= 1
    return bytes(data)


def _zero_header(data: bytearray, samples: tuple[Sample, ...]) -> bytes:
    data[samples[3].mp4_offset - 512 : samples[3].mp4_offset] = bytes(512)
    return bytes(data)


def _flip_payload_bit(data: bytearray, samples: tuple[Sample, ...]) -> bytes:
    data[samples[3].mp4_offset + samples[3].mp4_bytes // 2] ^= 1
    return bytes(data)


def _scatter_members(data: bytearray, samples: tuple[Sample, ...]) -> bytes:
    """All mp4s first, then all jsons: legal tar, but not WebDataset's adjacency."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in sorted(old.getmembers(), key=lambda m: (m.name.endswith(".json"), m.name)):
            new.addfile(member, old.extractfile(member))
    return out.getvalue()


DAMAGES = [
    Damage("cut after a clip, before its json", _cut_after_mp4, {4, 5}, 4, lost_json=frozenset({3, 4, 5})),
    Damage("cut between samples", _cut_between_samples, {3, 4, 5}, 3, lost_json=frozenset({3, 4, 5})),
    Damage("cut inside a header", _cut_in_header, {3, 4, 5}, 3, lost_json=frozenset({3, 4, 5})),
    Damage("a digit of a size flipped", _flip_size_digit, set(), 3),
    Damage("a header zeroed", _zero_header, set(), 3),
    Damage("cut inside a clip", _cut_in_payload, {3, 4, 5}, 3, True, lost_json=frozenset({3, 4, 5})),
    Damage("cut inside a json", _cut_in_json, {4, 5}, 4, True, lost_json=frozenset({3, 4, 5})),
    Damage("a bit of a clip flipped", _flip_payload_bit, {3}, 6),
]


@pytest.fixture(scope="module")
def six(
    tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., ShardRun], demo_videos: Path
) -> Path:
    """A dataset of one shard with six samples."""
    folder = tmp_path_factory.mktemp("six")
    source = {"kind": "folder", "root": str(demo_videos / "labelled/train"), "layout": "class"}
    listing = sorted((demo_videos / "labelled/train").rglob("*.mp4"))[:SAMPLES]
    rows = "\n".join(f"{p},{p.parent.name}" for p in listing)
    (folder / "list.csv").write_text(f"path,label\n{rows}\n")
    source = {"kind": "csv", "file": str(folder / "list.csv")}
    run_shard(make_run(folder / "set", source=source, shards={"videos_per_shard": SAMPLES}))
    return folder / "set"


def _spoiled(six: Path, tmp_path: Path, spoil: Callable[[bytearray, tuple[Sample, ...]], bytes]) -> Path:
    import shutil

    copy = Path(shutil.copytree(six, tmp_path / "set"))
    tar = next(copy.rglob("*.tar"))
    index = load_index((copy / index_file(str(tar.relative_to(copy)))).read_bytes(), file="index")
    tar.write_bytes(spoil(bytearray(tar.read_bytes()), index.samples))
    return copy


def _stock(tar: Path, *, skip: bool) -> tuple[list[dict[str, bytes]], Exception | None]:
    handler = webdataset.warn_and_continue if skip else webdataset.reraise_exception
    samples: list[dict[str, bytes]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for sample in webdataset.WebDataset(str(tar), handler=handler, shardshuffle=False):
                samples.append(sample)
        except Exception as error:
            return samples, error
    return samples, None


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.name)
def test_our_reader_raises_for_exactly_what_is_lost(six: Path, tmp_path: Path, damage: Damage) -> None:
    copy = _spoiled(six, tmp_path, damage.spoil)
    dataset, whole = ShardDataset(str(copy)), ShardDataset(str(six))
    assert len(dataset) == SAMPLES  # the loss is never hidden by a shorter dataset
    for i in range(SAMPLES):
        for lost, read, intact in (
            (damage.lost_mp4, dataset.read, whole.read),
            (damage.lost_json, dataset.read_json, whole.read_json),
        ):
            if i in lost:
                with pytest.raises(ShardReadError) as caught:
                    read(i)
                assert caught.value.member.startswith(whole.facts(i).key)
                assert caught.value.file.endswith(".tar")
            else:
                assert read(i) == intact(i)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.name)
def test_verify_names_the_lost_members(six: Path, tmp_path: Path, damage: Damage) -> None:
    copy = _spoiled(six, tmp_path, damage.spoil)
    report = verify(str(copy), decode="none")
    assert not report.ok
    lost = {p.detail.split(":")[0] for p in report.problems if p.kind == "lost"}
    keys = [ShardDataset(str(six)).facts(i).key for i in range(SAMPLES)]
    assert lost == {f"{keys[i]}.mp4" for i in damage.lost_mp4} | {f"{keys[i]}.json" for i in damage.lost_json}
    assert any(p.kind in ("checksum", "size") for p in report.problems)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.name)
def test_stock_webdataset_is_silent_or_loses_the_rest(six: Path, tmp_path: Path, damage: Damage) -> None:
    tar = next(_spoiled(six, tmp_path, damage.spoil).rglob("*.tar"))
    samples, error = _stock(tar, skip=False)
    assert (error is not None) == damage.webdataset_error
    skipped, error = _stock(tar, skip=True)
    assert error is None
    assert len(skipped) == damage.webdataset_samples
    if not damage.webdataset_error:
        assert len(samples) == damage.webdataset_samples


def test_scattered_members_are_found_by_verify(six: Path, tmp_path: Path) -> None:
    copy = _spoiled(six, tmp_path, _scatter_members)
    samples, error = _stock(next(copy.rglob("*.tar")), skip=False)
    assert error is None
    assert (
        sum("mp4" in s and "json" in s for s in samples) < SAMPLES
    )  # stock webdataset gives halves, in silence
    report = verify(str(copy), decode="none")
    assert {"checksum", "headers"} <= {p.kind for p in report.problems}
    with pytest.raises(ShardReadError, match="crc32"):
        ShardDataset(str(copy)).read(3)


def test_every_cut_at_a_tar_block_is_found(six: Path, tmp_path: Path) -> None:
    copy = _spoiled(six, tmp_path, lambda data, _: bytes(data))
    tar = next(copy.rglob("*.tar"))
    data = tar.read_bytes()
    ends = [
        (s.mp4_offset + s.mp4_bytes, s.json_offset + s.json_bytes)
        for s in load_index(
            (copy / index_file(str(tar.relative_to(copy)))).read_bytes(), file="index"
        ).samples
    ]
    for size in itertools.chain(range(0, len(data), 512 * 7), (1, len(data) - 1)):
        tar.write_bytes(data[:size])
        dataset = ShardDataset(str(copy))
        for i, (mp4_end, json_end) in enumerate(ends):
            for end, read in ((mp4_end, dataset.read), (json_end, dataset.read_json)):
                if end <= size:
                    read(i)
                else:
                    with pytest.raises(ShardReadError):
                        read(i)
        dataset.close()


@pytest.mark.parametrize(
    ("file", "kind"),
    [("samples.parquet", "checksum"), ("*.index.json", "damaged"), ("*.tar", "missing")],
)
def test_verify_finds_damage_beside_the_tars(six: Path, tmp_path: Path, file: str, kind: str) -> None:
    copy = _spoiled(six, tmp_path, lambda data, _: bytes(data))
    target = next(copy.rglob(file))
    if kind == "missing":
        target.unlink()
    else:
        data = bytearray(target.read_bytes())
        data[0 if kind == "damaged" else len(data) // 2] ^= 0x40
        target.write_bytes(data)
    report = verify(str(copy), decode="none")
    assert not report.ok
    assert kind in {p.kind for p in report.problems}


def test_verify_decodes_what_a_checksum_cannot_judge(six: Path, tmp_path: Path) -> None:
    """A shard whose index agrees with its bytes, but whose clip does not decode."""
    import hashlib
    import zlib

    from cliplift.sharding.build.finalize import describe
    from cliplift.sharding.manifest import dump_dataset, dump_index
    from cliplift.sharding.read.generations import read_dataset
    from cliplift.sharding.storage import open_store

    copy = _spoiled(six, tmp_path, lambda data, _: bytes(data))
    tar = next(copy.rglob("*.tar"))
    name = str(tar.relative_to(copy))
    index = load_index((copy / index_file(name)).read_bytes(), file="index")
    bad = index.samples[2]
    data = bytearray(tar.read_bytes())
    data[bad.mp4_offset + bad.mp4_bytes - 900 : bad.mp4_offset + bad.mp4_bytes - 100] = bytes(800)
    tar.write_bytes(data)
    from dataclasses import replace

    crc = zlib.crc32(data[bad.mp4_offset : bad.mp4_offset + bad.mp4_bytes])
    samples = tuple(replace(s, mp4_crc32=crc) if s is bad else s for s in index.samples)
    index = replace(index, samples=samples, tar_sha256=hashlib.sha256(data).hexdigest())
    (copy / index_file(name)).write_bytes(dump_index(index))
    old = read_dataset(open_store(str(copy)))
    dataset = describe(
        [index], table=copy / "samples.parquet", name=old.name, classes=old.classes, folds=0, missing=0,
        plan_id=old.plan_id, settings={},
    )  # fmt: skip
    (copy / "dataset.json").write_bytes(dump_dataset(dataset))
    assert verify(str(copy), decode="none").ok
    report = verify(str(copy), decode="full", workers=1)
    assert report.decoded == SAMPLES
    assert [(p.kind, p.detail.split(".")[0]) for p in report.problems] == [("decode", bad.key)]
    assert json.dumps(report.labels)
