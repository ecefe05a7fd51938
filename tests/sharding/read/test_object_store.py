"""Shards on an S3 API served on loopback, through a proxy that fails: nothing lost, nothing half-written visible."""

from __future__ import annotations

import functools
import http.client
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from cliplift.configs.sharding import ShardRun
from cliplift.sharding import storage
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.build.verify import verify
from cliplift.sharding.manifest import DATASET_FILE, load_index
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.storage import StorageError, open_store

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


KINDS = ("503", "500", "reset", "half upload", "lost answer", "half answer", "stall")
BEFORE_THE_STORE = ("503", "500", "reset", "half upload", "slow upload", "stall")
CLIENT_PATIENCE_SECONDS = 1  # set in the clients below; a stalled request must outlast it


class Faults:
    """What the proxy does to requests: the share that fails, and what failed so far."""

    def __init__(self) -> None:
        self.share = 0.0
        self.kinds: tuple[str, ...] = KINDS
        self.uploading = threading.Event()
        self.left = sys.maxsize  # faults still to come
        self.draw = random.Random(0)
        self.seen: Counter[str] = Counter()
        self.only: str | None = None

    def next(self, method: str, path: str) -> str | None:
        if self.draw.random() >= self.share or (
            self.only is not None and self.only not in f"{method} {path}"
        ):
            return None
        if self.left == 0:
            return None
        self.left -= 1
        kind = self.draw.choice(self.kinds)
        self.seen[kind] += 1
        return kind


def _proxy(target_port: int, faults: Faults) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            fault = faults.next(self.command, self.path)
            if fault in BEFORE_THE_STORE:
                self._fail_before(fault, length)
            else:
                self._pass_on(fault, length)

        def _fail_before(self, fault: str, length: int) -> None:
            if fault in ("half upload", "slow upload"):  # the connection dies in the middle of a body
                self.rfile.read(length // 2)
                if fault == "slow upload" and length:  # until the client is killed
                    faults.uploading.set()
                    self.rfile.read(length - length // 2)
            else:
                self.rfile.read(length)
            if fault in ("500", "503"):
                self._answer(int(fault), [], b"")
                return
            if fault == "stall":  # the client must give up by itself
                time.sleep(2.5 * CLIENT_PATIENCE_SECONDS)
            if fault == "reset":  # not the orderly end of a connection but an RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._hang_up()

        def _pass_on(self, fault: str | None, length: int) -> None:
            body = self.rfile.read(length)
            upstream = http.client.HTTPConnection("127.0.0.1", target_port, timeout=30)
            upstream.request(self.command, self.path, body=body, headers=dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            if fault == "half answer":  # the connection dies in the middle of a download
                self._answer(answer.status, answer.getheaders(), content, sent=len(content) // 2)
                self._hang_up()
                return
            if fault == "lost answer":  # the store did it, the client never hears
                self._hang_up()
                return
            self._answer(answer.status, answer.getheaders(), content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

        def _answer(
            self, status: int, headers: list[tuple[str, str]], content: bytes, *, sent: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in (
                    "connection",
                    "transfer-encoding",
                    "content-length",
                    "date",
                    "server",
                ):
                    self.send_header(name, value)
            stated = {n.lower(): v for n, v in headers}.get("content-length")
            self.send_header(
                "Content-Length", stated if self.command == "HEAD" and stated else str(len(content))
            )
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:sent])

        def _hang_up(self) -> None:
            self.close_connection = True
            self.connection.close()

        def log_message(self, *_: object) -> None:
            return

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture(scope="module")
def s3() -> Iterator[Faults]:
    """An S3 API behind the failing proxy; the bucket is ``shards``."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    faults = Faults()
    proxy = _proxy(port, faults)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setattr(storage, "REMOTE_PAUSE_SECONDS", 0.01)
        patch.setattr(s3fs.S3FileSystem, "read_timeout", CLIENT_PATIENCE_SECONDS)
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        fsspec.filesystem("s3").mkdir("shards")
        yield faults
    proxy.shutdown()
    server.stop()


@pytest.fixture(autouse=True)
def _calm(s3: Faults) -> Iterator[None]:
    yield
    s3.share, s3.only, s3.kinds, s3.left = 0.0, None, KINDS, sys.maxsize


def _bytes(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {name: store.read(name) for name in store.list() if name != "build.json"}


def test_a_build_to_s3_equals_a_local_one(s3: Faults, built: Path, make_run: Callable[..., ShardRun]) -> None:
    run_shard(make_run("s3://shards/calm"))
    assert _bytes("s3://shards/calm") == _bytes(str(built))
    assert run_shard(make_run("s3://shards/calm")).shards_built == 0
    assert verify("s3://shards/calm", decode="none").ok


def test_a_build_through_faults_loses_nothing(
    s3: Faults, built: Path, make_run: Callable[..., ShardRun]
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


def test_what_is_visible_is_whole_at_any_time(
    s3: Faults, make_run: Callable[..., ShardRun], monkeypatch: pytest.MonkeyPatch
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


def test_reading_through_faults(
    s3: Faults, built: Path, make_run: Callable[..., ShardRun], tmp_path: Path
) -> None:
    run_shard(make_run("s3://shards/read"))
    local = ShardDataset(str(built), split="val")
    s3.share, s3.seen = 0.15, Counter()
    for options in ({}, {"cache_folder": str(tmp_path / "cache")}):
        remote = ShardDataset("s3://shards/read", split="val", **options)
        assert [remote.read(i) for i in range(len(remote))] == [local.read(i) for i in range(len(local))]
    assert sum(s3.seen.values()) > 0


def test_a_source_on_s3(
    s3: Faults, demo_videos: Path, built: Path, make_run: Callable[..., ShardRun], tmp_path: Path
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
def test_every_kind_of_fault_on_its_own_is_survived(s3: Faults, kind: str, tmp_path: Path) -> None:
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


def test_an_outage_that_lasts_names_the_file(s3: Faults) -> None:
    store = open_store("s3://shards/gone")
    for kind in ("reset", "503"):
        s3.share, s3.kinds = 1.0, (kind,)
        with pytest.raises(StorageError, match=r"s3://shards/gone/a: cannot write"):
            store.write("a", b"x")
    s3.share = 0.0
    assert store.list() == []


@pytest.mark.slow
def test_a_build_killed_in_the_middle_of_an_upload(
    s3: Faults, built: Path, make_run: Callable[..., ShardRun]
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
    s3: Faults, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
