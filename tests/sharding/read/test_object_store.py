"""Shards on an S3 API served on loopback, through a proxy that fails: nothing lost, nothing half-written visible."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import pytest

from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.build.verify import verify
from cliplift.sharding.manifest import DATASET_FILE, load_index
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.storage import StorageError, open_store

KINDS = ("503", "500", "reset", "half upload", "lost answer", "half answer", "stall")


@pytest.fixture(scope="module")
def s3(failing_s3: ModuleType) -> Iterator[Any]:
    """An S3 API behind the failing proxy; the bucket is ``shards``."""
    with failing_s3.served("shards") as faults:
        yield faults


@pytest.fixture(autouse=True)
def _calm(s3: Any) -> Iterator[None]:
    yield
    s3.calm()


def _bytes(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {name: store.read(name) for name in store.list() if name != "build.json"}


@pytest.mark.slow
def test_a_build_to_s3_equals_a_local_one(s3: Any, built: Path, make_run: Callable[..., ShardRun]) -> None:
    run_shard(make_run("s3://shards/calm"))
    assert _bytes("s3://shards/calm") == _bytes(str(built))
    assert run_shard(make_run("s3://shards/calm")).shards_built == 0
    assert verify("s3://shards/calm", decode="none").ok


@pytest.mark.slow
def test_a_build_through_faults_loses_nothing(
    s3: Any, built: Path, make_run: Callable[..., ShardRun]
) -> None:
    s3.share, s3.seen = 0.15, Counter()
    for _ in range(20):
        try:
            run_shard(make_run("s3://shards/stormy"), phases=["plan", "build", "finalize"])
            break
        except StorageError:
            continue  # an outage longer than the retries stops the build; starting it again continues
    else:
        pytest.fail("the build never got through")
    assert len(s3.seen) >= 5  # most kinds of fault really happened
    s3.share = 0.0
    assert _bytes("s3://shards/stormy") == _bytes(str(built))
    assert verify("s3://shards/stormy", decode="none").ok


@pytest.mark.slow
def test_what_is_visible_is_whole_at_any_time(
    s3: Any, make_run: Callable[..., ShardRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads of tars fail for good: no index may appear without its whole tar, and no dataset at all."""
    s3.share, s3.only = 1.0, "PUT /shards/broken/train"
    # After a lost or half answer the store has the tar: those uploads have not failed.
    monkeypatch.setattr(s3, "kinds", ("500", "503"))
    with pytest.raises(StorageError, match=r"s3://shards/broken/train/.*\.tar: cannot write"):
        run_shard(make_run("s3://shards/broken"))
    s3.share = 0.0
    store = open_store("s3://shards/broken")
    names = store.list()
    assert DATASET_FILE not in names
    assert [n for n in names if n.endswith(".tar")]
    for name in names:
        if name.endswith(".index.json"):
            index = load_index(store.read(name), file=name)
            assert store.size(index.tar) == index.tar_bytes
    run_shard(make_run("s3://shards/broken"))
    assert verify("s3://shards/broken", decode="none").ok


@pytest.mark.slow
def test_reading_through_faults(
    s3: Any, built: Path, make_run: Callable[..., ShardRun], tmp_path: Path
) -> None:
    run_shard(make_run("s3://shards/read"))
    local = ShardDataset(str(built), split="val")
    s3.share, s3.seen = 0.15, Counter()
    for options in ({}, {"cache_folder": str(tmp_path / "cache")}):
        remote = ShardDataset("s3://shards/read", split="val", **options)
        assert [remote.read(i) for i in range(len(remote))] == [local.read(i) for i in range(len(local))]
    assert sum(s3.seen.values()) > 0


@pytest.mark.slow
def test_a_source_on_s3(
    s3: Any, demo_videos: Path, built: Path, make_run: Callable[..., ShardRun], tmp_path: Path
) -> None:
    fsspec.filesystem("s3").put(str(demo_videos / "labelled"), "shards/videos", recursive=True)
    source = {"kind": "folder", "root": "s3://shards/videos", "layout": "split/class"}
    report = run_shard(make_run(tmp_path / "out", source=source))
    assert report.clips_written == 40
    tars = sorted(p.read_bytes() for p in (tmp_path / "out").rglob("*.tar"))
    assert tars == sorted(p.read_bytes() for p in built.rglob("*.tar"))


def test_memory_file_system(built: Path, make_run: Callable[..., ShardRun]) -> None:
    run_shard(make_run("memory://built/tiny"))
    assert _bytes("memory://built/tiny") == _bytes(str(built))


@pytest.mark.parametrize(
    "kind",
    [k if k in ("reset", "half answer", "500") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
def test_every_kind_of_fault_on_its_own_is_survived(s3: Any, kind: str, tmp_path: Path) -> None:
    """The first requests of every verb fail: writing, reading and listing still give the right bytes."""
    data = random.Random(kind).randbytes(300_000)
    (tmp_path / "file").write_bytes(data)
    store = open_store(f"s3://shards/each/{kind.replace(' ', '-')}")
    s3.kinds, s3.seen = (kind,), Counter()
    actions: list[Callable[[], object]] = [
        lambda: store.write("a", data),
        lambda: store.publish(tmp_path / "file", "b"),
        lambda: store.fetch("b", tmp_path / "back"),
        store.list,
    ]
    for action in actions:
        s3.share, s3.left = 1.0, 1 if kind == "stall" else 2
        action()
    assert s3.seen[kind] >= 4
    s3.share = 0.0
    assert (tmp_path / "back").read_bytes() == store.read("a") == store.read("b") == data
    assert store.read_range("b", 1000, 50) == data[1000:1050]
    assert store.list() == ["a", "b"]


def test_an_outage_that_lasts_names_the_file(s3: Any) -> None:
    store = open_store("s3://shards/gone")
    for kind in ("reset", "503"):
        s3.share, s3.kinds = 1.0, (kind,)
        with pytest.raises(StorageError, match=r"s3://shards/gone/a: cannot write"):
            store.write("a", b"x")
    s3.share = 0.0
    assert store.list() == []


@pytest.mark.slow
def test_a_build_killed_in_the_middle_of_an_upload(
    s3: Any, built: Path, make_run: Callable[..., ShardRun]
) -> None:
    run = make_run("s3://shards/killed")
    run_shard(run, phases=["plan"])
    s3.share, s3.kinds, s3.only = 1.0, ("slow upload",), ".tar"
    s3.uploading.clear()
    script = (
        "import sys; from cliplift.configs.sharding import ShardRun; "
        "from cliplift.sharding.build.run import run_shard; "
        "run_shard(ShardRun.model_validate_json(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, run.model_dump_json()], stderr=subprocess.DEVNULL
    )
    assert s3.uploading.wait(timeout=60)
    process.kill()
    process.wait()
    s3.share, s3.only = 0.0, None
    store = open_store("s3://shards/killed")
    assert [n for n in store.list() if n.endswith((".tar", ".index.json"))] == []
    run_shard(run)
    assert _bytes("s3://shards/killed") == _bytes(str(built))
    assert verify("s3://shards/killed", decode="none").ok


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["half upload", "503", "reset"])
def test_an_upload_in_parts_that_dies_is_not_visible(
    s3: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("s3")
    monkeypatch.setattr(fs, "put_file", functools.partial(fs.put_file, chunksize=5 * 2**20))
    data = random.Random(1).randbytes(16 * 2**20)
    (tmp_path / "file").write_bytes(data)
    store = open_store(f"s3://shards/parts-{kind[0]}")
    s3.share, s3.kinds, s3.only, s3.seen = 1.0, (kind,), "partNumber=2", Counter()
    with pytest.raises(StorageError, match="cannot write"):
        store.publish(tmp_path / "file", "big")
    assert s3.seen[kind] >= 5
    assert store.list() == []
    s3.share = 0.0
    store.publish(tmp_path / "file", "big")
    assert store.read("big") == data
