"""What it costs a process to open a dataset of many clips, and to send it to a decoding worker.

    python benchmarks/catalog.py [--rows 100000 1000000] [--folder FOLDER] [--contenders catalog table] [--rounds 1]

Writes synthetic datasets of so many clips (no tars: nothing is decoded) and opens them for training, every contender in
a fresh process of its own. Of more than a few million clips the last two need some gigabytes:

* ``catalog``: cliplift's loader on a dataset with a catalog; of many shards with a small ``--clips-per-shard``.
* ``version 1``: cliplift's loader on a dataset that has no catalog yet.
* ``table``: the yardstick: the whole table in memory as Arrow columns and Python objects, and sent to each worker, as
  cliplift itself read datasets before there were catalogs.

``--stages plan finalize`` measures these instead: the plan of a Parquet list of so many URLs, and the table, catalog
and manifest of so many clips' indexes (about 600 bytes a clip on disk), with CPU seconds, peak memory over what the
imports take, and ``own_peak_mib``, the most that is no file of the page cache.

Prints one JSON object a row: CPU seconds to open, to make the first batch's requests and to plan its clips; MiB of
memory over what the imports take (``anonymous`` is this process's own, ``mapped`` the pages of files, which all
processes of a host share, ``peak`` the most of both); bytes pickled to a worker, and its CPU seconds and MiB;
microseconds of CPU to look up one clip. Memory and bytes are exact; seconds are of the CPU, since other work on the
machine hardly changes those.
"""

from __future__ import annotations

import argparse
import bisect
import gc
import itertools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cliplift.configs.data import DataConfig
from cliplift.configs.sharding import ShardRun
from cliplift.pipelines.data.clip_plan import training_plan
from cliplift.pipelines.data.loader import ClipLoader, Request, _plain_order, _Training
from cliplift.pipelines.data.order import rank_positions
from cliplift.sharding.build.finalize import finalize
from cliplift.sharding.build.plan import Plan, PlannedShard, load_plan, plan_once
from cliplift.sharding.manifest import (
    CATALOG_FILE,
    CATALOG_ROWS_FILE,
    DATASET_FILE,
    PLAN_FILE,
    PLAN_FORMAT,
    SAMPLES_FILE,
    Dataset,
    ShardFacts,
    ShardIndex,
    SplitFacts,
    canonical,
    check_samples,
    dataset_fingerprint,
    digest,
    dump_dataset,
    dump_index,
    index_file,
    load_dataset,
    read_table,
    shard_file,
)
from cliplift.sharding.read.catalog import BLOCK_ROWS, CatalogHead, checksums_of, dump_head, row_type
from cliplift.sharding.read.reader import ClipShape
from cliplift.sharding.storage import open_store
from cliplift.sharding.tables import TableFile

CLASSES = 400
CLIPS_PER_SHARD = 1000
CLIPS_PER_VIDEO = 5
VAL_SHARE = 20  # one shard in so many
ROW_GROUP = 1 << 20  # as pyarrow writes a table at once
MEMBER_BYTES, TAR_BYTES = 200_000, CLIPS_PER_SHARD * 202_000
GLOBAL_BATCH, RANKS = 256, 8
LOOKUPS = 20_000


def chunk(first: int, stop: int) -> pa.Table:
    """Rows ``first`` to ``stop`` of the table of samples."""
    number = np.arange(first, stop)
    shard, inside = number // CLIPS_PER_SHARD, number % CLIPS_PER_SHARD
    rng = np.random.default_rng(first)
    video = pc.binary_join_element_wise("video", pa.array(number // CLIPS_PER_VIDEO).cast(pa.string()), "-")
    empty = pa.ListArray.from_arrays(np.zeros(len(number) + 1, dtype=np.int32), pa.array([], type=pa.int64()))
    texts = pa.ListArray.from_arrays(
        np.zeros(len(number) + 1, dtype=np.int32), pa.array([], type=pa.string())
    )
    keyframes = pa.ListArray.from_arrays(
        np.arange(len(number) + 1, dtype=np.int32) * 4, np.tile(np.arange(4) * 16, len(number))
    )
    zeros = np.zeros(len(number))
    columns = {
        "key": pc.binary_join_element_wise(
            pc.utf8_lpad(pa.array(shard).cast(pa.string()), 6, "0"),
            pc.utf8_lpad(pa.array(inside).cast(pa.string()), 6, "0"),
            "-",
        ),
        "mp4_offset": inside * 202_000 + 512,
        "mp4_bytes": MEMBER_BYTES - rng.integers(0, 50_000, len(number)),
        "mp4_crc32": rng.integers(0, 1 << 32, len(number)),
        "json_offset": inside * 202_000 + 201_000,
        "json_bytes": np.full(len(number), 400),
        "json_crc32": rng.integers(0, 1 << 32, len(number)),
        "video_id": video,
        "source": pc.binary_join_element_wise(video, "mp4", "."),
        "split": np.where(shard % VAL_SHARE, "train", "val"),
        "label": rng.integers(0, CLASSES, len(number)),
        "labels": empty,
        "folds": texts,
        "group": pa.nulls(len(number), pa.string()),
        "start_seconds": zeros,
        "end_seconds": zeros + 10,
        "num_frames": rng.integers(40, 301, len(number)),
        "fps": np.full(len(number), 25.0),
        "width": np.full(len(number), 340),
        "height": np.full(len(number), 256),
        "keyframes": keyframes,
        "source_sha256": pa.array(np.repeat([digest(b"")], len(number))),
        "shard": shard,
    }
    return pa.table(columns)


def write_synthetic(folder: Path, rows: int) -> None:
    """A dataset of version 1 without its tars."""
    folder.mkdir(parents=True)
    write_table(folder, rows)
    data = (folder / SAMPLES_FILE).read_bytes()
    (folder / DATASET_FILE).write_bytes(dump_dataset(manifest(rows, samples_sha256=digest(data))))


def write_table(folder: Path, rows: int) -> None:
    """``samples.parquet``, as finalizing writes it."""
    writer = None
    for first in range(0, rows, ROW_GROUP):
        table = chunk(first, min(rows, first + ROW_GROUP))
        writer = writer or pq.ParquetWriter(
            folder / SAMPLES_FILE, table.schema, compression="zstd", store_schema=False
        )
        writer.write_table(table)
    assert writer is not None
    writer.close()


def manifest(rows: int, *, samples_sha256: str, per_shard: int = CLIPS_PER_SHARD) -> Dataset:
    """``dataset.json`` of version 1."""
    shards, splits = [], {"train": SplitFacts(samples=0, seconds=0), "val": SplitFacts(samples=0, seconds=0)}
    for number in range(-(-rows // per_shard)):
        split = "train" if number % VAL_SHARE else "val"
        samples = min(per_shard, rows - number * per_shard)
        splits[split]["samples"] += samples
        shards.append(
            ShardFacts(
                shard=number, file=shard_file("s", split, number), split=split, samples=samples,
                bytes=TAR_BYTES, sha256=digest(str(number).encode()),
            )
        )  # fmt: skip
    classes = tuple(f"class {k}" for k in range(CLASSES))
    return Dataset(
        name="synthetic", classes=classes, shards=tuple(shards), samples=rows, samples_sha256=samples_sha256,
        splits=splits, folds=0, refused={}, missing=0, plan_id="synthetic", settings={}, versions={},
        fingerprint=dataset_fingerprint("synthetic", classes, shards, samples_sha256),
    )  # fmt: skip


def write_catalog_alone(folder: Path, rows: int, *, per_shard: int) -> None:
    """A dataset of version 2 whose table of names is empty: none is read before a name is asked for."""
    folder.mkdir(parents=True)
    dataset = manifest(rows, samples_sha256=digest(b""), per_shard=per_shard)
    videos = -(-rows // CLIPS_PER_VIDEO)
    codes = [("train", "val").index(shard.split) for shard in dataset.shards]
    head = CatalogHead(
        samples_sha256=digest(b""), samples_bytes=0, rows=rows, block_rows=BLOCK_ROWS, videos=videos, groups=videos,
        flow=False, most_labels=0, label_values=0, splits=("train", "val"),
        counts=(tuple(dataset.splits[name]["samples"] for name in ("train", "val")),), split_labels=((0, 0),),
        shard_splits=(tuple((code, len(list(run))) for code, run in itertools.groupby(codes)),), folded=False,
    )  # fmt: skip
    number, rng = np.arange(rows), np.random.default_rng(0)
    data = np.zeros(rows, dtype=row_type(head))
    data["mp4_offset"] = number % per_shard * 202_000 + 512
    data["mp4_bytes"] = MEMBER_BYTES - rng.integers(0, 50_000, rows)
    data["mp4_crc32"] = rng.integers(0, 1 << 32, rows)
    data["label"], data["num_frames"] = rng.integers(0, CLASSES, rows), rng.integers(40, 301, rows)
    data["fps"], data["width"], data["height"] = 25.0, 340, 256
    data["video"] = data["group"] = number // CLIPS_PER_VIDEO
    data["splits"][:, 0] = np.array(codes)[number // per_shard]
    checksums = checksums_of(head, data, np.zeros(0, dtype=np.int32))
    with (folder / CATALOG_ROWS_FILE).open("wb") as file:
        data.tofile(file)
        checksums.tofile(file)
    (folder / SAMPLES_FILE).touch()
    written = dump_head(replace(head, checksums_sha256=digest(checksums.tobytes())))
    (folder / CATALOG_FILE).write_bytes(written)
    (folder / DATASET_FILE).write_bytes(dump_dataset(replace(dataset, catalog_sha256=digest(written))))


class Opened(NamedTuple):
    """What a contender gives: training's requests, what is sent to workers, and the two steps of fetching a clip."""

    requests: Iterator[Request]
    sent: object
    clips: int
    plan: Callable[[Any, int, int], object]
    lookup: Callable[[Any, int], object]


def config(url: str) -> DataConfig:
    return DataConfig.model_validate({"shards": url, "workers": 0})


def open_loader(url: str) -> Opened:
    """cliplift's own loader."""
    loader = ClipLoader(
        config(url), seed=0, global_batch=GLOBAL_BATCH, micro_batch=GLOBAL_BATCH // RANKS, rank=0, world_size=RANKS
    )  # fmt: skip
    return Opened(
        loader.requests(start_step=0, stop_step=1000),
        _Training(loader.dataset, loader.order),
        len(loader.dataset),
        lambda sent, epoch, position: sent.source.plan(*sent.order.draw(epoch, position)),
        lambda sent, index: sent.source.shape(index),
    )


class TableInMemory:
    """The training split as columns of a table and Python objects, all of them in every process."""

    def __init__(self, url: str) -> None:
        folder = Path(url)
        dataset = load_dataset((folder / DATASET_FILE).read_bytes(), file=DATASET_FILE)
        data = (folder / SAMPLES_FILE).read_bytes()
        assert digest(data) == dataset.samples_sha256
        whole = read_table(data, file=SAMPLES_FILE)
        check_samples(whole, dataset, file=SAMPLES_FILE)
        splits = np.asarray(whole.column("split").to_pylist(), dtype=object)
        chosen = np.flatnonzero(splits == "train")
        self.table, self.splits = whole.take(chosen), splits[chosen]
        shards = self.table.column("shard").to_numpy()
        numbers = [int(n) for n in dict.fromkeys(shards.tolist())]
        by_number = {facts.shard: facts for facts in dataset.shards}
        self.shards = tuple(by_number[n] for n in numbers)
        counts = dict(zip(*map(list, np.unique(shards, return_counts=True)), strict=True))
        stops = list(itertools.accumulate(int(counts[n]) for n in numbers))
        self.ranges = list(zip([0, *stops[:-1]], stops, strict=True))
        self.starts = [start for start, _ in self.ranges]
        names = ("mp4_offset", "mp4_bytes", "mp4_crc32")
        self.places = np.stack([self.table.column(name).to_numpy() for name in names])
        self.shapes = [self.table.column(n).to_numpy() for n in ("num_frames", "fps", "height", "width")]
        self.labels = self.table.column("label").to_numpy().astype(np.int64)
        coded = self.table.column("video_id").combine_chunks().dictionary_encode()
        numbered: dict[tuple[str, str], int] = {}
        own = [numbered.setdefault((url, video), len(numbered)) for video in coded.dictionary.to_pylist()]
        self.videos = np.array(own, dtype=np.int64)[coded.indices.to_numpy()]

    def shape(self, index: int) -> ClipShape:
        frames, fps, height, width = (values[index] for values in self.shapes)
        return ClipShape(int(frames), float(fps), int(height), int(width))


def open_table(url: str) -> Opened:
    """The yardstick."""
    data, table = config(url), TableInMemory(url)
    order = _plain_order(data, table.ranges, len(table.labels), 0)
    step = rank_positions(step=0, global_batch=GLOBAL_BATCH, rank=0, world_size=RANKS)
    return Opened(
        (Request(0, tuple(step)) for _ in range(1000)),
        (table, order),
        len(table.labels),
        lambda sent, epoch, at: training_plan(data, sent[0].shape(sent[1].draw(epoch, at).sample), 0, epoch, at),
        lambda sent, index: (sent[0].shape(index), bisect.bisect_right(sent[0].starts, index)),
    )  # fmt: skip


CONTENDERS: dict[str, Callable[[str], Opened]] = {
    "catalog": open_loader,
    "version 1": open_loader,
    "table": open_table,
}


def memory_mib() -> dict[str, float]:
    """Resident memory of this process, MiB: its own, and that of mapped files."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, shared, files = (int(fields[f"Rss{kind}"].split()[0]) / 1024 for kind in ("Anon", "Shmem", "File"))
    return {"anonymous": own + shared, "mapped": files}


def peak_mib() -> float:
    """The most memory that was resident, MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


class OwnMemory:
    """The most memory of this process's own, looked at twenty times a second."""

    def __init__(self) -> None:
        self._most, self._stopped = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.05):
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self._most = max(self._most, int(fields["RssAnon"].split()[0]) / 1024)

    def stop(self) -> float:
        self._stopped.set()
        self._thread.join()
        return self._most


def write_list(folder: Path, rows: int) -> None:
    """A list of URLs, which a plan takes as they are, with labels, splits and groups."""
    folder.mkdir(parents=True, exist_ok=True)
    file = TableFile(folder / "list.parquet", LIST)
    for first in range(0, rows, ROW_GROUP):
        number = np.arange(first, min(first + ROW_GROUP, rows))
        text = pa.array(number).cast(pa.string())
        columns = [
            pc.binary_join_element_wise("https://example.org/videos/", text, ".mp4", ""),
            pc.binary_join_element_wise("class", pa.array(number % CLASSES).cast(pa.string()), " "),
            pa.array(np.where(number % VAL_SHARE, "train", "val")),
            pc.binary_join_element_wise("channel", pa.array(number // 50).cast(pa.string()), "-"),
        ]
        file.add(pa.Table.from_arrays(columns, schema=LIST))
    file.close()


LIST = pa.schema([(name, pa.string()) for name in ("path", "label", "split", "group")])


def plan_list(folder: Path) -> None:
    """The plan of a list, as ``cliplift shard --phase plan`` makes it."""
    source = {
        "kind": "csv",
        "file": str(folder / "list.parquet"),
        "split_column": "split",
        "group_column": "group",
    }
    run = ShardRun.model_validate({"name": "n", "output": str(folder), "source": source})
    plan_once(run, open_store(str(folder)))


def write_indexes(folder: Path, rows: int) -> None:
    """A plan and the indexes of its shards; the tars are holes of the right length."""
    shards = []
    for number in range(rows // CLIPS_PER_SHARD):
        split = "train" if number % VAL_SHARE else "val"
        tar = shard_file("n", split, number)
        samples = chunk(number * CLIPS_PER_SHARD, (number + 1) * CLIPS_PER_SHARD).drop_columns("shard")
        index = ShardIndex(number, split, tar, TAR_BYTES, f"{number:064d}", "p", (), ())
        tree = json.loads(dump_index(index)) | {"samples": samples.to_pylist()}
        path = folder / index_file(tar)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(canonical(tree) + b"\n")
        with (folder / tar).open("wb") as file:
            file.truncate(TAR_BYTES)
        shards.append(PlannedShard(number, split, tar, number, number + 1))
    plan = Plan("p", "n", "", tuple(map(str, range(CLASSES))), 0, 0, {}, tuple(shards), ())
    tree = {field: value for field, value in vars(plan).items() if field not in ("shards", "videos")}
    tree |= {"format": PLAN_FORMAT, "shards": [vars(shard) for shard in shards]}
    (folder / PLAN_FILE).parent.mkdir(parents=True, exist_ok=True)
    (folder / PLAN_FILE).write_text(json.dumps(tree))


def finalize_indexes(folder: Path) -> None:
    """Table, catalog and manifest, as ``cliplift shard --phase finalize`` writes them after looking for duplicates."""
    store = open_store(str(folder))
    plan = load_plan(store)
    assert plan is not None
    finalize(plan, store, max_refused_share=0.0)


STAGES: dict[str, Callable[[Path], None]] = {"plan": plan_list, "finalize": finalize_indexes}
WRITERS: dict[str, Callable[[Path, int], None]] = {"plan": write_list, "finalize": write_indexes}


def measure(contender: str, url: str, worker_of: str | None) -> dict[str, float]:
    """One process: a rank that opens a dataset, or a worker that was sent one."""
    before, began = memory_mib(), time.process_time()
    if contender in STAGES:
        watched = OwnMemory()
        STAGES[contender](Path(url))
        seconds = time.process_time() - began
        return {
            "seconds": seconds,
            "peak_mib": peak_mib() - sum(before.values()),
            "own_peak_mib": watched.stop() - before["anonymous"],
        }
    if worker_of is not None:
        with Path(worker_of).open("rb") as file:
            sent = pickle.load(file)
        found = {"worker_seconds": time.process_time() - began}
        after = memory_mib()
        del sent
        return found | {f"worker_{name}_mib": after[name] - before[name] for name in before}
    opened = CONTENDERS[contender](url)
    found = {"open_seconds": time.process_time() - began}
    began = time.process_time()
    request = next(opened.requests)
    found["first_requests_seconds"] = time.process_time() - began
    for position in request.positions:
        opened.plan(opened.sent, request.epoch, position)
    found["first_plans_seconds"] = time.process_time() - began
    after = memory_mib()
    found |= {f"{name}_mib": after[name] - before[name] for name in before}
    found["peak_mib"] = peak_mib() - sum(before.values())
    pickled = pickle.dumps(opened.sent)
    found["worker_pickle_bytes"] = len(pickled)
    with tempfile.NamedTemporaryFile() as file:
        file.write(pickled)
        file.flush()
        found |= in_a_process(contender, url, worker_of=file.name)
    draw = random.Random(0)
    indices = [draw.randrange(opened.clips) for _ in range(LOOKUPS)]
    for again in (False, True):  # the second time nothing is checked for the first time
        began = time.process_time()
        for index in indices:
            opened.lookup(opened.sent, index)
        name = "lookup_us" if again else "first_lookup_us"
        found[name] = (time.process_time() - began) / LOOKUPS * 1e6
    return found


def in_a_process(contender: str, url: str, *, worker_of: str | None = None) -> dict[str, float]:
    """:func:`measure` in a fresh process."""
    words = [sys.executable, __file__, "--measure", contender, url, *([worker_of] if worker_of else [])]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where the datasets are made, and kept")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="measure these in place of opening")
    parser.add_argument("--clips-per-shard", type=int, default=CLIPS_PER_SHARD, help="of the catalog")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        contender, url, *worker_of = arguments.measure
        print(json.dumps(measure(contender, url, worker_of[0] if worker_of else None)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for rows, stage in itertools.product(arguments.rows, arguments.stages or ()):
            place = folder / f"{rows}-{stage}"
            WRITERS[stage](place, rows)
            print(json.dumps({"rows": rows, "stage": stage} | in_a_process(stage, str(place))), flush=True)
            shutil.rmtree(place)
        rounds = 0 if arguments.stages else arguments.rounds
        for rows, _ in itertools.product(arguments.rows, range(rounds)):
            for contender in arguments.contenders:
                place = folder / (f"{rows}-catalog" if contender == "catalog" else f"{rows}")
                if not (place / DATASET_FILE).is_file():
                    if contender == "catalog":
                        write_catalog_alone(place, rows, per_shard=arguments.clips_per_shard)
                    else:
                        write_synthetic(place, rows)
                found = in_a_process(contender, str(place))
                print(json.dumps({"rows": rows, "contender": contender} | found), flush=True)


if __name__ == "__main__":
    main()
