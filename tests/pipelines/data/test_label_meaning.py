"""A label means one class, whichever source it comes from and whichever reader reads it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cliplift.configs.sharding import ShardRun
from cliplift.pipelines.data.sequential import SampleError, label_of
from cliplift.sharding.build.index_tars import index_tars
from cliplift.sharding.demo.synthetic import write_demo_videos
from cliplift.sharding.manifest import REFUSED_FILE
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.sources.read import read_source

NUMBERS = list(range(12))
NAMES = ["clap", "jump", "run", "wave"]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("video")
    write_demo_videos(
        folder, seed=1, train_per_class=1, val_per_class=1, test_per_class=1, unlabelled=1, size_pixels=48,
        workers=1,
    )  # fmt: skip
    return next(iter(sorted(folder.rglob("*.mp4")))).read_bytes()


def planned(source: dict[str, object]) -> dict[str, int]:
    run = ShardRun.model_validate({"name": "s", "output": "unused", "source": source})
    return {v.source: v.label for v in read_source(run).videos}


def members(value: object, kind: str) -> dict[str, bytes]:
    if kind == "cls":
        return {"cls": f"{value}\n".encode()}
    text = str(value) if kind == "json text" else float(value) if kind == "json float" else value  # type: ignore[arg-type]
    return {"json": json.dumps({"label": text}).encode()}


def write_tar(file: Path, samples: list[dict[str, bytes]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number, sample in enumerate(samples):
            for suffix, data in sample.items():
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["csv", "parquet integers", "parquet floats", "parquet bytes"])
def test_numbers_in_lists_are_classes_in_numeric_order(tmp_path: Path, kind: str) -> None:
    for number in NUMBERS:
        (tmp_path / f"{number}.mp4").touch()
    paths = [f"{number}.mp4" for number in NUMBERS]
    if kind == "csv":
        rows = [f"{path},{number}" for path, number in zip(paths, NUMBERS, strict=True)]
        (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    else:
        make = {"integers": int, "floats": float, "bytes": lambda n: str(n).encode()}[kind.split()[1]]
        pq.write_table(
            pa.table({"path": paths, "label": [make(n) for n in NUMBERS]}), tmp_path / "list.parquet"
        )
    name = "list.csv" if kind == "csv" else "list.parquet"
    found = planned({"kind": "csv", "file": str(tmp_path / name)})
    assert found == {f"{number}.mp4": number for number in NUMBERS}


@pytest.mark.parametrize("layout", ["class", "split/class"])
def test_numbered_class_folders_are_in_numeric_order(tmp_path: Path, layout: str) -> None:
    before = "train/" if layout == "split/class" else ""
    for number in NUMBERS:
        (tmp_path / f"{before}{number}").mkdir(parents=True)
        (tmp_path / f"{before}{number}/v.mp4").touch()
    found = planned({"kind": "folder", "root": str(tmp_path), "layout": layout})
    assert found == {f"{before}{number}/v.mp4": number for number in NUMBERS}


def test_numbered_kinetics_classes_are_in_numeric_order(tmp_path: Path) -> None:
    rows = []
    for number in NUMBERS:
        (tmp_path / f"v{number}_000000_000010.mp4").touch()
        rows.append(f"{number},v{number},0,10,val")
    text = "\n".join(["label,youtube_id,time_start,time_end,split", *rows])
    (tmp_path / "val.csv").write_text(text)
    found = planned({"kind": "kinetics", "lists": [str(tmp_path / "val.csv")], "root": str(tmp_path)})
    assert found == {f"v{number}_000000_000010.mp4": number for number in NUMBERS}


@pytest.mark.parametrize("kind", ["cls", "json number", "json text", "json float"])
def test_a_number_in_a_tar_means_one_class_to_every_reader(tmp_path: Path, video: bytes, kind: str) -> None:
    told = [members(number, kind) for number in NUMBERS]
    write_tar(tmp_path / "train/a.tar", [{"mp4": video} | m for m in told])
    as_source = planned({"kind": "tars", "root": str(tmp_path)})
    assert sorted(as_source.values()) == NUMBERS
    in_order = sorted(as_source, key=lambda source: int(source.split("#")[1].split("+")[0]))
    assert [as_source[source] for source in in_order] == NUMBERS
    index_tars(str(tmp_path), name="t", workers=2)
    indexed = ShardDataset(str(tmp_path), split="train")
    assert [indexed.facts(i).label for i in NUMBERS] == NUMBERS
    classes = {name: number for number, name in enumerate(indexed.classes)}
    assert [label_of(m, "label", classes) for m in told] == NUMBERS


@pytest.mark.parametrize("kind", ["cls", "json text"])
@pytest.mark.parametrize("given", [(), tuple(reversed(NAMES))])
def test_a_name_in_a_tar_means_one_class_to_every_reader(
    tmp_path: Path, video: bytes, kind: str, given: tuple[str, ...]
) -> None:
    told = [members(name, kind) for name in NAMES]
    expected = [(given or tuple(NAMES)).index(name) for name in NAMES]
    write_tar(tmp_path / "train/a.tar", [{"mp4": video} | m for m in told])
    as_source = planned({"kind": "tars", "root": str(tmp_path), "classes": list(given)})
    in_order = sorted(as_source, key=lambda source: int(source.split("#")[1].split("+")[0]))
    assert [as_source[source] for source in in_order] == expected
    index_tars(str(tmp_path), name="t", workers=2, classes=given)
    indexed = ShardDataset(str(tmp_path), split="train")
    assert [indexed.facts(i).label for i in range(len(NAMES))] == expected
    classes = {name: number for number, name in enumerate(indexed.classes)}
    assert [label_of(m, "label", classes) for m in told] == expected


def test_numbers_count_the_classes_that_are_given_by_name(tmp_path: Path, video: bytes) -> None:
    told = [members(number, "cls") for number in (3, 0)]
    write_tar(tmp_path / "train/a.tar", [{"mp4": video} | m for m in told])
    index_tars(str(tmp_path), name="t", workers=1, classes=tuple(NAMES))
    indexed = ShardDataset(str(tmp_path), split="train")
    assert [indexed.facts(i).label for i in range(2)] == [3, 0]
    classes = {name: number for number, name in enumerate(NAMES)}
    assert [label_of(m, "label", classes) for m in told] == [3, 0]


def test_classes_that_are_numbers_are_not_counted() -> None:
    """Classes 0, 1 and 3: the number 3 is the third of them, and 2 is none."""
    classes = {"0": 0, "1": 1, "3": 2}
    assert label_of({"cls": b"3"}, "label", classes) == 2
    assert label_of({"json": b'{"label": 3.0}'}, "label", classes) == 2
    with pytest.raises(SampleError, match="'2' is not one of the 3 classes"):
        label_of({"cls": b"2"}, "label", classes)


NO_CLASS = [
    ({"cls": b" \n"}, "its label is empty"),
    ({"cls": b"caf\xe9"}, "is not UTF-8"),
    ({"json": b'{"label": [1]}'}, "its label is a list"),
    ({"json": b'{"label": NaN}'}, "its label is nan"),
    ({"json": b'{"label": "\\ud800"}'}, "cannot name a class"),
    ({"json": b'{"label": 1'}, "not whole JSON"),
    ({"json": b"[" * 200_000 + b"]" * 200_000}, "nested too deeply"),
]


@pytest.mark.parametrize(("told", "reason"), NO_CLASS, ids=[reason for _, reason in NO_CLASS])
def test_what_is_no_class_is_refused_by_every_reader(
    tmp_path: Path, video: bytes, told: dict[str, bytes], reason: str
) -> None:
    with pytest.raises(SampleError, match=reason):
        label_of(told, "label", {"a": 0, "b": 1})
    write_tar(tmp_path / "train/a.tar", [{"mp4": video} | told, {"mp4": video, "cls": b"a"}])
    dataset = index_tars(str(tmp_path), name="t", workers=1)
    assert (dataset.samples, dataset.classes, dataset.refused) == (1, ("a",), {"read": 1})
    (refused,) = [json.loads(line) for line in (tmp_path / REFUSED_FILE).read_text().splitlines()]
    assert refused["video_id"] == "00000"
    assert reason in refused["reason"]


@pytest.mark.parametrize("told", [{}, {"json": b"{}"}, {"json": b'{"label": null}'}, {"json": b"[]"}])
def test_a_sample_without_a_label_has_none_in_every_reader(
    tmp_path: Path, video: bytes, told: dict[str, bytes]
) -> None:
    assert label_of(told, "label", {"a": 0}) == -1
    write_tar(tmp_path / "train/a.tar", [{"mp4": video} | told])
    index_tars(str(tmp_path), name="t", workers=1)
    assert ShardDataset(str(tmp_path), split="train").labels.tolist() == [-1]


def test_names_and_numbers_mixed_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("10", "9", "wave"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "v.mp4").touch()
    assert planned({"kind": "folder", "root": str(tmp_path)}) == {
        "9/v.mp4": 0,
        "10/v.mp4": 1,
        "wave/v.mp4": 2,
    }
    assert "partly numbers ('9') and partly names ('wave')" in caplog.text
