"""Bytes at random in place of every file that others may have written: used, or refused by an error of ours.

Each example has ten seconds, the whole a gigabyte, and no loader may open a file outside its folder or a socket. What
FFmpeg opens in C is not seen here; `tests/sharding/video/test_containers.py` holds its lists of formats and protocols.
"""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.models import ModelError, create_model, save_pretrained
from cliplift.models.factory import read_config
from cliplift.models.state_dicts import read_state
from cliplift.pipelines.checkpoints.folder import damage
from cliplift.pipelines.runs.folder import read_json
from cliplift.pipelines.runs.records import read_history, read_predictions
from cliplift.sharding.leaks.records import LEAKS_FILE, LeakCheck, add_checks, read_checks
from cliplift.sharding.manifest import (
    FLOW_COLUMNS,
    Dataset,
    ManifestError,
    Sample,
    ShardFacts,
    check_samples,
    digest,
    dump_dataset,
    load_dataset,
    load_index,
    read_table,
)
from cliplift.sharding.read.catalog import (
    checksums_of,
    dump_head,
    layout_of,
    load_head,
    open_catalog,
    row_type,
)
from cliplift.sharding.read.columns import columns_of
from cliplift.sharding.scores.stored import (
    ColumnFacts,
    ScoresHead,
    dump_scores_head,
    load_scores_head,
    open_columns,
    write_columns,
)
from cliplift.sharding.scores.stored import layout_of as scores_layout
from cliplift.sharding.sources.lists import SourceError, read_rows
from cliplift.sharding.sources.tars import read_tar
from cliplift.sharding.sources.tfrecord import RecordError, masked_crc32c, records
from cliplift.sharding.storage import open_store
from cliplift.sharding.tables import schema_of, table_of
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames, probe
from cliplift.sharding.video.full_decode import check_clip

GIBIBYTE = 1 << 30
PATIENCE = timedelta(seconds=10)


class Watch:
    """What Python opens and connects to while ``folder`` is set, beside its own modules."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.found: list[str] = []
        ours = Path(__file__).resolve().parents[1]
        self.quiet = tuple(
            map(str, (sys.prefix, sys.base_prefix, ours, "/proc/self", "/dev/null", "/sys", "/etc/localtime"))
        )
        sys.addaudithook(self.see)

    def see(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder is None:
            return
        if event in (
            "socket.connect",
            "socket.bind",
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
        ):
            self.found.append(f"{event} {arguments[1:]!r}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith((str(self.folder), *self.quiet)):
                self.found.append(f"open {path}")


WATCH = Watch()


@dataclass(frozen=True)
class Loader:
    """A whole file, what reads it, and the errors by which it may refuse another."""

    name: str
    whole: Callable[[Path], bytes]
    load: Callable[[Path], object]
    refusals: tuple[type[Exception], ...] = ()


def film(ending: str, *options: str) -> Callable[[Path], bytes]:
    def whole(folder: Path) -> bytes:
        source = ["-f", "lavfi", "-i", "testsrc=s=32x32:r=10:d=1", "-pix_fmt", "yuv420p", *options]
        subprocess.run(["ffmpeg", "-v", "error", *source, f"{folder}/whole.{ending}"], check=True)
        return (folder / f"whole.{ending}").read_bytes()

    return whole


def decode(path: Path) -> None:
    probe(path)
    check_clip(path.read_bytes())
    decode_frames(path.read_bytes(), [0], decoder="pyav")


def tar(_: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("a.mp4", b"v" * 900), ("a.json", b'{"label": "x"}'), ("é" * 80 + ".cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


SAMPLE = Sample(
    key="000000-00000-00000", mp4_offset=512, mp4_bytes=100, mp4_crc32=1, json_offset=1536, json_bytes=10,
    json_crc32=2, video_id="a", source="a.mp4", split="train", label=0, labels=(), folds=(), group=None,
    start_seconds=0.0, end_seconds=1.0, num_frames=25, fps=25.0, width=32, height=32, keyframes=(0, 16),
    source_sha256="0" * 64,
)  # fmt: skip
DATASET = Dataset(
    name="x", classes=("a", "b"), shards=(ShardFacts(0, "train/x.tar", "train", 1, 4096, "0" * 64),), samples=1,
    samples_sha256="0" * 64, splits={"train": {"samples": 1, "seconds": 1.0}}, folds=0, refused={}, missing=0,
    plan_id="0", settings={}, versions={}, fingerprint="0",
)  # fmt: skip


def index(_: Path) -> bytes:
    sample = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(SAMPLE).items()}
    return json.dumps(
        {"format": "cliplift-index/1", "shard": 0, "split": "train", "tar": "train/x.tar", "tar_bytes": 4096,
         "tar_sha256": "0", "plan_id": "0", "samples": [sample], "refused": [], "looks": ["0" * 32]}
    ).encode()  # fmt: skip


def parquet(_: Path) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"path": ["a.mp4", "b.mp4"], "label": ["x", "y"]}), out)
    return out.getvalue()


def predictions(_: Path) -> bytes:
    out = io.BytesIO()
    columns = {
        "key": ["a"],
        "video_id": ["a"],
        "shard_url": ["s"],
        "sample_index": [0],
        "label": [0],
        "predicted": [1],
    }
    pq.write_table(pa.table({**columns, "probabilities": [[0.25, 0.75]]}), out)
    return out.getvalue()


MODEL = nn.Linear(2, 2)


def export(name: str) -> Callable[[Path], bytes]:
    def whole(folder: Path) -> bytes:
        model = create_model("t3d_tiny", num_classes=2, in_frames=4)
        return (save_pretrained(model, folder / "e", name="t3d_tiny", options={}) / name).read_bytes()

    return whole


def pickled(folder: Path) -> bytes:
    torch.save({"state_dict": {"weight": torch.zeros(2, 2)}}, folder / "whole.pt")
    return (folder / "whole.pt").read_bytes()


def seal(_: Path) -> bytes:
    files = {"state.json": {"bytes": 2, "crc32": zlib.crc32(b"{}")}}
    return json.dumps({"format": 2, "files": files}).encode()


def record(_: Path) -> bytes:
    length, data = struct.pack("<Q", 8), b"12345678"
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (length, data))


def table_of_samples(path: Path) -> None:
    check_samples(read_table(path.read_bytes(), file="samples.parquet"), DATASET, file="samples.parquet")


def samples_file(samples: list[Sample]) -> bytes:
    out = io.BytesIO()
    table = table_of(samples, schema_of(Sample, "shard"), extra={"shard": [0] * len(samples)})
    pq.write_table(table.drop_columns(sorted(FLOW_COLUMNS)), out, compression="zstd")
    return out.getvalue()


COLUMNS = columns_of(
    pq.ParquetFile(io.BytesIO(samples_file([replace(SAMPLE, labels=(0, 1))] * 40))),
    replace(DATASET, samples=40, shards=(replace(DATASET.shards[0], samples=40),)),
    samples_bytes=1,
)
CHECKSUMS = checksums_of(COLUMNS.head, COLUMNS.rows, COLUMNS.labels)
HEAD = replace(COLUMNS.head, checksums_sha256=digest(CHECKSUMS.tobytes()))


def catalogued(head: bytes) -> Dataset:
    shards = (replace(DATASET.shards[0], samples=40),)
    return replace(DATASET, samples=40, shards=shards, catalog_sha256=digest(head))


def head_of_catalog(path: Path) -> None:
    """The manifest agrees with whatever it says; the rows beside it are those of the whole one."""
    data = path.read_bytes()
    head = load_head(data, catalogued(data), file="catalog.json")
    (path.parent / "catalog.bin").write_bytes(rows_of_catalog(path))
    open_catalog(path.parent / "catalog.bin", head, catalogued(data), file="catalog.bin").check_everything()


def rows_of_catalog(_: Path) -> bytes:
    return COLUMNS.rows.tobytes() + COLUMNS.labels.tobytes() + CHECKSUMS.tobytes()


def whole_catalog(path: Path) -> None:
    """The checksums agree with whatever the rows are."""
    data = path.read_bytes()
    layout = layout_of(HEAD)
    if len(data) == layout.end:
        rows = np.frombuffer(data, dtype=row_type(HEAD), count=HEAD.rows)
        labels = np.frombuffer(data, dtype=np.int32, count=HEAD.label_values, offset=layout.labels)
        sums = checksums_of(HEAD, rows, labels)
        path.write_bytes(data[: layout.checksums] + sums.tobytes())
        head = replace(HEAD, checksums_sha256=digest(sums.tobytes()))
    else:
        head = HEAD
    catalog = open_catalog(path, head, catalogued(dump_head(head)), file="catalog.bin")
    catalog.check_everything()
    catalog.label_set(HEAD.rows - 1)


def checks_of_leaks(folder: Path) -> bytes:
    check = LeakCheck(
        "0", "tested", "1", "2", ("test",), 0, "looks-1", clips=9, against_clips=3, videos=("a", "b")
    )
    add_checks(open_store(str(folder)), [check])
    return (folder / LEAKS_FILE).read_bytes()


SCORES = (np.arange(40, dtype=np.float32), np.arange(40, dtype=np.uint8) % 2)
SCORED = ScoresHead(
    DATASET.samples_sha256,
    rows=40,
    block_rows=16,
    columns=(ColumnFacts("motion", "number", 1), ColumnFacts("duplicate", "boolean", 1)),
)


def columns_of_scores(folder: Path) -> bytes:
    write_columns(folder / "whole.bin", SCORED, SCORES)
    return (folder / "whole.bin").read_bytes()


def head_of_scores(folder: Path) -> bytes:
    return dump_scores_head(write_columns(folder / "whole.bin", SCORED, SCORES))


def list_of_scores(path: Path) -> None:
    """The manifest agrees with whatever it says; the values beside it are those of the whole one."""
    data = path.read_bytes()
    dataset = replace(DATASET, samples=40, scores_sha256=digest(data))
    head = load_scores_head(data, dataset, file="scores.json")
    columns_of_scores(path.parent)
    open_columns(path.parent / "whole.bin", head, file="scores.bin").check_everything()


def whole_scores(path: Path) -> None:
    """The checksums agree with whatever the values are."""
    data = path.read_bytes()
    starts, _, end = scores_layout(SCORED)
    if len(data) == end:
        values = [
            np.frombuffer(data, column.dtype, 40, start) for column, start in zip(SCORES, starts, strict=True)
        ]
        head = write_columns(path, SCORED, values)
    else:
        head = SCORED
    open_columns(path, head, file="scores.bin").check_everything()


def rows(path: Path) -> None:
    for row in read_rows(str(path), needed=("path", "label")):
        row.text("path")


LISTS = (ConfigError, SourceError, ManifestError)
MP4 = film("mp4", "-c:v", "libx264", "-g", "5")
LOADERS = [
    Loader("x.mp4", MP4, decode, (VideoDecodeError,)),
    Loader("x.mkv", film("mkv", "-c:v", "libx264"), decode, (VideoDecodeError,)),
    Loader("x.avi", film("avi", "-c:v", "mpeg4", "-bf", "2"), decode, (VideoDecodeError,)),
    Loader("x.ts", film("ts", "-c:v", "mpeg2video"), decode, (VideoDecodeError,)),
    Loader("x.flv", film("flv", "-c:v", "flv1"), decode, (VideoDecodeError,)),
    Loader("x.gif", film("gif", "-pix_fmt", "rgb8"), decode, (VideoDecodeError,)),
    Loader("x.tar", tar, lambda path: read_tar(path, label_key="label")),
    Loader("dataset.json", lambda _: dump_dataset(DATASET), lambda p: load_dataset(p.read_bytes(), file="d"),
           (ManifestError,)),
    Loader("x.index.json", index, lambda p: load_index(p.read_bytes(), file="i"), (ManifestError,)),
    Loader("samples.parquet", lambda _: samples_file([SAMPLE]), table_of_samples, (ManifestError,)),
    Loader("catalog.json", lambda _: dump_head(HEAD), head_of_catalog, (ManifestError,)),
    Loader("catalog.bin", rows_of_catalog, whole_catalog, (ManifestError,)),
    Loader("scores.json", head_of_scores, list_of_scores, (ManifestError,)),
    Loader("scores.bin", columns_of_scores, whole_scores, (ManifestError,)),
    Loader("leaks.json", checks_of_leaks, lambda p: read_checks(open_store(str(p.parent))), (ManifestError,)),
    Loader("list.csv", lambda _: b'path,label\n"a, b.mp4",x\nc.mp4,"y ""z"""\n', rows, LISTS),
    Loader("list.parquet", parquet, rows, LISTS),
    Loader("x.tfrecord", record, lambda p: list(records(p.read_bytes(), file="x")), (RecordError,)),
    Loader("run.yaml", lambda _: b"stage: shard\nname: t\noutput: o\nsource: {kind: folder, root: &r v}\nbase: []\n",
           lambda p: load_run(p, RUNS), (ConfigError,)),
    Loader("config.json", export("config.json"), lambda p: read_config(p.parent), (ModelError,)),
    Loader("x.safetensors", export("model.safetensors"), lambda p: read_state(MODEL, p), (ModelError,)),
    Loader("x.pt", pickled, lambda p: read_state(MODEL, p), (ModelError,)),
    Loader("COMPLETE.json", seal, lambda p: damage(p.parent)),
    Loader("run.json", lambda _: b'{"stage": "finetune", "starts": ["x"]}', read_json),
    Loader("metrics.jsonl", lambda _: b'{"step": 1, "train/loss": 0.5}\n' * 4, read_history),
    Loader("predictions.parquet", predictions, read_predictions, (ConfigError, ManifestError)),
]  # fmt: skip

EDITS = st.lists(
    st.tuples(st.integers(0, 3), st.floats(0, 1), st.integers(1, 600), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=6,
)


def edited(whole: bytes, edits: list[tuple[int, float, int, bytes]]) -> bytes:
    """Some bytes replaced, runs left out or repeated, or the end cut off."""
    data = bytearray(whole)
    for kind, place, length, new in edits:
        at = int(place * len(data))
        if kind == 0:
            data[at : at + len(new)] = new
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path.resolve()
    WATCH.folder = None


def hold(loader: Loader, folder: Path, data: bytes) -> None:
    """Load the bytes as the loader's file; any error but its refusals is raised."""
    path = folder / loader.name
    path.write_bytes(data)
    WATCH.found.clear()
    WATCH.folder = folder
    try:
        loader.load(path)
    except loader.refusals:
        pass
    finally:
        WATCH.folder = None
    assert WATCH.found == []


def fuzz(loader: Loader, folder: Path, examples: int) -> None:
    whole = loader.whole(folder)
    hold(loader, folder, whole)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=examples, deadline=PATIENCE, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip
    @given(EDITS)
    def damaged(edits: list[tuple[int, float, int, bytes]]) -> None:
        hold(loader, folder, edited(whole, edits))

    @settings(max_examples=examples // 4, deadline=PATIENCE, database=None, derandomize=True)
    @given(st.binary(max_size=300))
    def anything(data: bytes) -> None:
        hold(loader, folder, data)

    damaged()
    anything()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown << 10 < GIBIBYTE


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.name)
def test_a_few_damaged_files(loader: Loader, folder: Path) -> None:
    fuzz(loader, folder, 20)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.name)
def test_many_damaged_files(loader: Loader, folder: Path) -> None:
    fuzz(loader, folder, 1000)


def test_the_watch_sees_files_and_sockets(folder: Path) -> None:
    def outside(path: Path) -> None:
        (path.parent.parent / "outside").write_bytes(b"")

    with pytest.raises(AssertionError, match="outside"):
        hold(Loader("x", lambda _: b"", outside), folder, b"")
