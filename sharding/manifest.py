"""What is written beside the tars: the plan, one index per shard, the table of samples and ``dataset.json``.

An index is written after its tar, so its presence says that the shard is whole. ``dataset.json``, ``samples.parquet``
and the catalog (``read/catalog.py``) are written by ``finalize`` and are all a reader needs. Version 1 of the format is
a dataset without a catalog.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")
FORMAT = "cliplift-shards/1"
FORMAT_WITH_CATALOG = "cliplift-shards/2"
FORMAT_WITH_GENERATIONS = "cliplift-shards/3"
FORMAT_WITH_SCORES = "cliplift-shards/4"
FORMAT_WITH_VECTORS = "cliplift-shards/5"
INDEX_FORMAT = "cliplift-index/1"
PLAN_FORMAT = "cliplift-plan/1"
DATASET_FILE = "dataset.json"
SAMPLES_FILE = "samples.parquet"
CATALOG_FILE = "catalog.json"
CATALOG_ROWS_FILE = "catalog.bin"
SCORES_FILE = "scores.json"
SCORES_VALUES_FILE = "scores.bin"
VECTORS_FILE = "vectors.json"
REFUSED_FILE = "refused.jsonl"
MISSING_FILE = "missing.jsonl"
LEFT_OUT_FILE = "left_out.jsonl"
PLAN_FILE = "plan/plan.json"
PLAN_VIDEOS_FILE = "plan/videos.parquet"
DUPLICATES_FILE = "duplicates.jsonl"
REMOVED_FILE = "removed.txt"
BUILD_FILE = "build.json"
DUPLICATE = "duplicate"  # stage of a clip that was removed because another video already gave it
RETRIED_STAGES = (
    "read",
    "timeout",
    "crash",
)  # refusals whose cause may be gone, which --retry-failed tries again
NO_LABEL = -1
# Members of a sample, in the order they stand in the tar: kind, and what the name has after the key. Flow is optional.
MEMBERS = {"mp4": "mp4", "json": "json", "flow": "flow.mp4"}
FOREIGN = "foreign:"  # plan_id of tars that were indexed, not built


class ManifestError(ValueError):
    """A dataset's own files are missing, damaged or contradict each other."""


@dataclass(frozen=True)
class SourceVideo:
    """One video of the plan. ``source`` is the path as the list gives it, below the source's root."""

    video_id: str
    source: str
    split: str
    label: int = NO_LABEL
    labels: tuple[int, ...] = ()
    folds: tuple[str, ...] = ()
    group: str | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None


@dataclass(frozen=True)
class Sample:
    """One clip of a shard: where its members lie and what it shows."""

    key: str
    mp4_offset: int
    mp4_bytes: int
    mp4_crc32: int
    json_offset: int
    json_bytes: int
    json_crc32: int
    video_id: str
    source: str
    split: str
    label: int
    labels: tuple[int, ...]
    folds: tuple[str, ...]
    group: str | None
    start_seconds: float
    end_seconds: float
    num_frames: int
    fps: float
    width: int
    height: int
    keyframes: tuple[int, ...]
    source_sha256: str
    flow_offset: int = 0
    flow_bytes: int = 0  # 0 where no flow is stored
    flow_crc32: int = 0


class SampleRow(TypedDict):
    """The fields of a :class:`Sample` that do not say where its members lie."""

    key: str
    video_id: str
    source: str
    split: str
    label: int
    labels: tuple[int, ...]
    folds: tuple[str, ...]
    group: str | None
    start_seconds: float
    end_seconds: float
    num_frames: int
    fps: float
    width: int
    height: int
    keyframes: tuple[int, ...]
    source_sha256: str


@dataclass(frozen=True)
class Refused:
    """A clip or video that is not in the shards, and why."""

    video_id: str
    source: str
    clip: int
    stage: str
    reason: str


@dataclass(frozen=True)
class ShardIndex:
    """All that is known of one finished shard."""

    shard: int
    split: str
    tar: str
    tar_bytes: int
    tar_sha256: str
    plan_id: str
    samples: tuple[Sample, ...]
    refused: tuple[Refused, ...]
    picture_hashes: tuple[tuple[int, ...], ...] = ()  # of every sample's key frames; () where unknown


@dataclass(frozen=True)
class ShardFacts:
    """One shard as ``dataset.json`` lists it."""

    shard: int
    file: str
    split: str
    samples: int
    bytes: int
    sha256: str


class SplitFacts(TypedDict, total=False):
    """One split as ``dataset.json`` lists it; ``shards`` came later than the others."""

    samples: int
    seconds: float
    shards: int


@dataclass(frozen=True)
class Dataset:
    """``dataset.json``."""

    name: str
    classes: tuple[str, ...]
    shards: tuple[ShardFacts, ...]
    samples: int
    samples_sha256: str
    splits: Mapping[str, SplitFacts]
    folds: int
    refused: Mapping[str, int]
    missing: int
    plan_id: str
    settings: Mapping[str, object]
    versions: Mapping[str, str]
    fingerprint: str
    catalog_sha256: str = ""  # of catalog.json; "" where there is no catalog
    generation: int = 1  # from the second on, its files stand in a folder of their own
    removed_sha256: str = ""  # of the list of all videos removed so far; "" where none was
    scores_sha256: str = ""  # of scores.json; "" where this generation has no columns of scores
    vectors_sha256: str = ""  # of vectors.json; "" where this generation has no embeddings

    def file(self, name: str) -> str:
        """Where a file of this generation stands below the root."""
        return name if self.generation == 1 else generation_file(self.generation, name)


def generation_file(generation: int, name: str) -> str:
    """Path below the root of a file of a generation that has a folder of its own."""
    return f"generations/{generation:06d}/{name}"


def shard_file(name: str, split: str, shard: int) -> str:
    """Path of a shard's tar below the root."""
    return f"{split}/{name}-{split}-{shard:06d}.tar"


def index_file(tar: str) -> str:
    """Path of the index that belongs to a tar."""
    return tar.removesuffix(".tar") + ".index.json"


def canonical(tree: object) -> bytes:
    """JSON in one fixed form, for hashing and for reproducible files."""
    return json.dumps(
        tree, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    ).encode()


def digest(data: bytes) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def dump_index(index: ShardIndex) -> bytes:
    """An index as the bytes of its file."""
    tree = {"format": INDEX_FORMAT, **dataclasses.asdict(index)}
    tree["samples"] = [_stored(sample) for sample in tree["samples"]]
    # As text: other languages' JSON numbers do not hold 64 bits.
    tree["looks"] = ["".join(f"{picture:016x}" for picture in row) for row in tree.pop("picture_hashes")]
    return canonical(tree) + b"\n"


def load_index(data: bytes, *, file: str) -> ShardIndex:
    """Read an index.

    Raises:
        ManifestError: the file is not a whole index of this format.
    """
    tree = parsed_json(data, file, INDEX_FORMAT)
    try:
        hashes = tuple(
            tuple(int(row[i : i + 16], 16) for i in range(0, len(row), 16)) for row in tree.pop("looks", ())
        )
    except (TypeError, ValueError) as error:
        raise ManifestError(f"{file}: not an index of this version: looks: {error}") from error
    index = typed(ShardIndex, tree, file, "an index")
    _require_inside(file, index.tar)
    return dataclasses.replace(index, picture_hashes=hashes)


def dump_dataset(dataset: Dataset) -> bytes:
    """``dataset.json`` as bytes, indented for people."""
    tree = dataclasses.asdict(dataset)
    if (
        not dataset.catalog_sha256
    ):  # a manifest without a catalog is the manifest it was before there were any
        del tree["catalog_sha256"]
    tree["format"] = FORMAT_WITH_CATALOG if dataset.catalog_sha256 else FORMAT
    if dataset.generation == 1:  # the manifest it was before there were generations
        del tree["generation"], tree["removed_sha256"]
    else:  # an earlier version would return what was removed
        tree["format"] = FORMAT_WITH_SCORES if dataset.scores_sha256 else FORMAT_WITH_GENERATIONS
    if dataset.vectors_sha256:
        tree["format"] = FORMAT_WITH_VECTORS
    for name in ("scores_sha256", "vectors_sha256"):
        if not tree[name]:
            del tree[name]
    return (json.dumps(tree, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def load_dataset(data: bytes, *, file: str) -> Dataset:
    """Read ``dataset.json``.

    Raises:
        ManifestError: it is damaged or of another format.
    """
    formats = (
        FORMAT,
        FORMAT_WITH_CATALOG,
        FORMAT_WITH_GENERATIONS,
        FORMAT_WITH_SCORES,
        FORMAT_WITH_VECTORS,
    )
    dataset = typed(Dataset, parsed_json(data, file, *formats), file, "a dataset")
    if not 1 <= dataset.generation < 10**6:
        raise ManifestError(f"{file}: generation {dataset.generation} cannot be")
    _require_inside(file, *(shard.file for shard in dataset.shards))
    for split, facts in dataset.splits.items():
        for name in ("samples", "seconds"):
            if not isinstance(facts.get(name), (int, float)):
                raise ManifestError(
                    f"{file}: not a dataset of this version: split {split!r} states no {name}"
                )
    return dataset


def check_samples(table: pa.Table, dataset: Dataset, *, file: str, first: int = 0) -> None:
    """Raise ManifestError unless a table of samples has the columns of :class:`Sample` with values that can be true.

    Every member lies inside its shard, every label is one of the dataset's classes or NO_LABEL. ``first`` is the row of
    the file at which the table begins.
    """
    check_columns(table.schema, file=file)
    kinds = _column_kinds()
    for name, kind in kinds.items():
        if name in table.column_names and table.column(name).null_count and "None" not in kind:
            raise ManifestError(f"{file}: column {name!r} has empty cells")
    columns = {name: table.column(name).to_numpy() for name, kind in kinds.items() if kind in ("int", "float")
               and name in table.column_names}  # fmt: skip
    bytes_of = {shard.shard: shard.bytes for shard in dataset.shards}
    if unknown := set(columns["shard"].tolist()) - bytes_of.keys():
        raise ManifestError(f"{file}: shard {min(unknown)} is none of the dataset's")
    room = np.array([bytes_of[number] for number in columns["shard"].tolist()], dtype=np.int64)
    right = {"label": (columns["label"] >= NO_LABEL) & (columns["label"] < max(1, len(dataset.classes)))}
    right |= {name: columns[name] > 0 for name in ("num_frames", "fps", "width", "height")}
    for kind in ("mp4", "json", "flow"):
        if f"{kind}_bytes" in columns:
            # Compared without a sum, which could overflow for a damaged offset.
            offset, size = columns[f"{kind}_offset"], columns[f"{kind}_bytes"]
            right[f"{kind}_bytes"] = (offset >= 0) & (size >= 0) & (offset <= room) & (size <= room - offset)
    for name, good in right.items():
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise ManifestError(f"{file}: row {first + row}: {name} is {columns[name][row]}, which cannot be")


def check_columns(schema: pa.Schema, *, file: str) -> None:
    """Raise ManifestError unless a table of samples has the columns of :class:`Sample` with their types."""
    for name, kind in _column_kinds().items():
        if name in FLOW_COLUMNS and name not in schema.names:
            continue
        if name not in schema.names or schema.field(name).type.id != arrow_type(kind).id:
            raise ManifestError(f"{file}: has no column {name!r} of type {kind}")


def _column_kinds() -> dict[str, str]:
    return {field.name: str(field.type) for field in dataclasses.fields(Sample)} | {"shard": "int"}


_TYPED: dict[type[Any], TypeAdapter[Any]] = {}


def typed(kind: type[R], tree: dict[str, Any], file: str, what: str) -> R:
    """A dataclass from JSON, whose every value has the type that the class states. Raises ManifestError."""
    if unknown := tree.keys() - {field.name for field in dataclasses.fields(kind)}:
        raise ManifestError(f"{file}: not {what} of this version: {min(unknown)!r} is unknown")
    adapter = _TYPED.setdefault(kind, TypeAdapter(kind))
    try:
        found: R = adapter.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ManifestError(f"{file}: not {what} of this version: {place}: {first['msg']}") from error
    return found


def require_true(facts: Mapping[str, bool], file: str) -> None:
    """Raise ManifestError, with its name, for the first thing a file says that is not so."""
    for name, so in facts.items():
        if not so:
            raise ManifestError(f"{file}: {name} cannot be true")


def map_file(path: Path, length: int, *, told_by: str, file: str, cut: str, gone: str) -> mmap.mmap:
    """Map a file into memory, which must have the length that another one tells of.

    Args:
        path: the file.
        length: bytes it must have.
        told_by: the file that says so.
        file: how messages call it.
        cut: what to do where the length is another.
        gone: what to do where it is missing.

    Raises:
        ManifestError: it is missing, or of another length.
    """
    try:
        with path.open("rb") as opened:
            size = opened.seek(0, 2)
            if size != length:
                raise ManifestError(f"{file}: {length} bytes expected by {told_by}, {size} found; {cut}")
            return mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ManifestError(f"{file}: does not exist; {gone}") from None


def require_uncut(mapped: mmap.mmap, *, file: str) -> None:
    """Raise ManifestError where a mapped file was cut short since.

    Touching what it no longer has would end the process with a signal and without a word.
    """
    if mapped.size() < len(mapped):
        raise ManifestError(
            f"{file}: was cut short while it was read; copy it again, and start the run again"
        )


def _require_inside(file: str, *names: str) -> None:
    """The files that a manifest names lie below it. Raises ManifestError."""
    for name in names:
        if name.startswith("/") or ".." in name.split("/") or "://" in name or "\0" in name:
            raise ManifestError(f"{file}: names {name!r}, which does not lie below it")


def dataset_fingerprint(
    name: str, classes: Sequence[str], shards: Sequence[ShardFacts], samples_sha256: str
) -> str:
    """What a checkpoint remembers of the data: it changes when any byte of any shard or any class name does."""
    return digest(
        canonical(
            [FORMAT, name, list(classes), [[s.file, s.samples, s.sha256] for s in shards], samples_sha256]
        )
    )


# Beyond these a Parquet file is made to fill the memory: a list has a name in every row, and names differ.
MIN_ROWS, MAX_ROWS_PER_BYTE = 1_000_000, 16
MIN_UNPACKED_BYTES, MAX_UNPACKING = 256 << 20, 200


def read_table(data: bytes, *, file: str) -> pa.Table:
    """A Parquet file as an Arrow table.

    Raises:
        ManifestError: the file is damaged, or unpacks to far more than it holds.
    """
    import pyarrow.parquet as pq

    with whole_parquet(file):
        check_unpacking(pq.read_metadata(io.BytesIO(data)), len(data), file=file)
        return pq.read_table(io.BytesIO(data))


@contextmanager
def whole_parquet(file: str) -> Iterator[None]:
    """Raise ManifestError where the Parquet file that is read within is damaged."""
    import pyarrow as pa

    try:
        yield
    # Arrow does not check that the names of columns are UTF-8.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{file}: not a whole Parquet file: {error}") from error


def check_unpacking(facts: pq.FileMetaData, size: int, *, file: str) -> None:
    """Raise ManifestError where a Parquet file of ``size`` bytes says that it unpacks to far more than it can hold."""
    unpacked = sum(facts.row_group(k).total_byte_size for k in range(facts.num_row_groups))
    if facts.num_rows > max(MIN_ROWS, MAX_ROWS_PER_BYTE * size) or unpacked > max(
        MIN_UNPACKED_BYTES, MAX_UNPACKING * size
    ):
        raise ManifestError(
            f"{file}: {size} bytes unpack to {unpacked} bytes in {facts.num_rows} rows, which no list does"
        )


FLOW_COLUMNS = frozenset(("flow_offset", "flow_bytes", "flow_crc32"))


def _stored(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample of an index without the places of a member it has not."""
    return sample if sample["flow_bytes"] else {k: v for k, v in sample.items() if k not in FLOW_COLUMNS}


def arrow_type(annotation: str) -> pa.DataType:
    """The Arrow type of a field of a row, by the annotation."""
    import pyarrow as pa

    kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
    if annotation.startswith("tuple["):
        return pa.list_(kinds[annotation[6:].split(",", maxsplit=1)[0]])
    return kinds[annotation.split(" | ", maxsplit=1)[0]]


def parsed_json(data: bytes, file: str, *formats: str) -> dict[str, Any]:
    """A JSON object of one of these formats, without its format. Raises ManifestError."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{file}: not whole JSON: {error}") from error
    found = tree.pop("format", None) if isinstance(tree, dict) else None
    if found not in formats:
        raise ManifestError(
            f"{file}: format is {found!r}, this version reads {' and '.join(map(repr, formats))}"
        )
    return dict(tree)
