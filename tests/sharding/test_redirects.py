"""Lists of URLs: where a redirect, or a scheme of fsspec's, may not lead."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from cliplift.configs.sharding import ShardRun
from cliplift.sharding import redirects
from cliplift.sharding.build.run import BuildReport, run_shard
from cliplift.sharding.manifest import REFUSED_FILE
from cliplift.sharding.redirects import is_public
from cliplift.sharding.storage import LISTED_SCHEMES, RemoteStore, StorageError, open_store, require_plain_url

pytest.importorskip("aiohttp")


class Web:
    """A server on this machine: a film at /film.mp4, and /to?URL redirects to the URL."""

    def __init__(self, film: bytes) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                asked.append(self.path)
                content = b"" if self.path.startswith("/to") else film
                self.send_response(302 if self.path.startswith("/to") else 200)
                if self.path.startswith("/to"):
                    self.send_header("Location", self.path.partition("?")[2])
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("film") / "x.mp4"
    source = ["-f", "lavfi", "-i", "testsrc=s=64x48:r=25:d=1", "-pix_fmt", "yuv420p"]
    subprocess.run(["ffmpeg", "-v", "error", *source, str(path)], check=True)
    return path.read_bytes()


@pytest.fixture
def outside(film: bytes) -> Iterator[Web]:
    """The server that a list names."""
    web = Web(film)
    yield web
    web.server.shutdown()
    web.server.server_close()


@pytest.fixture
def inside(film: bytes) -> Iterator[Web]:
    """A server that only this machine reaches."""
    web = Web(film)
    yield web
    web.server.shutdown()
    web.server.server_close()


@pytest.fixture(autouse=True)
def fresh_file_systems() -> Iterator[None]:
    fsspec.filesystem("http").clear_instance_cache()
    yield
    for scheme in ("http", "https"):
        fsspec.config.conf.pop(scheme, None)
    fsspec.filesystem("http").clear_instance_cache()


def build(folder: Path, urls: list[str], *, private_redirects: bool = False) -> tuple[BuildReport, list[str]]:
    """A build of a list in one worker, and the reasons in its ledger."""
    (folder / "list.csv").write_text("path\n" + "".join(f'"{url}"\n' for url in urls))
    run = ShardRun.model_validate(
        {
            "name": "x",
            "output": str(folder / "out"),
            "source": {"kind": "csv", "file": str(folder / "list.csv"), "label_column": None},
            "limits": {
                "max_refused_share": 1.0,
                "max_missing_share": 1.0,
                "private_redirects": private_redirects,
            },
            "workers": 1,
        }
    )
    report = run_shard(run)
    lines = (folder / "out" / REFUSED_FILE).read_text().splitlines()
    return report, [json.loads(line)["reason"] for line in lines]


def test_a_redirect_into_this_machine_is_refused_in_the_ledger(
    tmp_path: Path, outside: Web, inside: Web
) -> None:
    # The second row opens a connection to the same server, which a redirect may not use either.
    urls = [
        f"{outside.url}/to?{inside.url}/film.mp4",
        f"{inside.url}/film.mp4",
        f"{outside.url}/to?http://localhost:{inside.port}/film.mp4",
        f"{outside.url}/to?{inside.url}/again.mp4",
    ]
    report, reasons = build(tmp_path, urls)
    assert report.clips_written == 1
    assert inside.asked == ["/film.mp4"]
    assert len(reasons) == 3
    assert all(
        "not on the public internet" in reason and "limits.private_redirects" in reason for reason in reasons
    )


def test_the_setting_lets_redirects_through(tmp_path: Path, outside: Web, inside: Web) -> None:
    report, reasons = build(tmp_path, [f"{outside.url}/to?{inside.url}/film.mp4"], private_redirects=True)
    assert (report.clips_written, reasons) == (1, [])


def test_public_redirects_are_followed(
    outside: Web, inside: Web, film: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redirects, "is_public", lambda host: True)
    assert open_store(outside.url).read(f"to?{inside.url}/film.mp4") == film


def test_shards_and_chains_behind_http_are_guarded_too(outside: Web, inside: Web) -> None:
    with pytest.raises(StorageError, match="not on the public internet"):
        open_store(outside.url).read(f"to?{inside.url}/film.mp4")
    with pytest.raises(
        (FileNotFoundError, StorageError)
    ):  # this cache says of every failure that there is no file
        RemoteStore(f"simplecache::{outside.url}").read(f"to?{inside.url}/film.mp4")
    assert inside.asked == []


# IANA's special-purpose registries, and IPv4 addresses inside IPv6 ones.
@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
        "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    ],
)  # fmt: skip
def test_private_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::101:101"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "reference://::http://host/refs.json", "simplecache::http://host/x.mp4", "s3://bucket/a::http://host/x.mp4",
        "zip://x.mp4::http://host/a.zip", "local:///etc/passwd", "dask://x", "jupyter://host/x", "rtp://host:5004",
        "data://text/plain,x", "crypto+http://host/x", "rtsp://host/x", "github://a:b@c/x",
    ],
)  # fmt: skip
def test_other_schemes_of_a_list_are_refused(url: str) -> None:
    with pytest.raises(StorageError, match="a list may not"):
        require_plain_url(url)


@pytest.mark.parametrize("scheme", LISTED_SCHEMES)
def test_usual_schemes_of_a_list(scheme: str) -> None:
    require_plain_url(f"{scheme}://host/a.mp4?signature=a::b")


def test_schemes_in_the_ledger(tmp_path: Path, outside: Web) -> None:
    urls = [
        f"{outside.url}/film.mp4",
        "reference://::memory://refs.json",
        "rtp://127.0.0.1:5004/x.mp4",
        "data:video/mp4;base64,AAAA",
    ]
    _, reasons = build(tmp_path, urls)
    assert sum("a list may not" in reason for reason in reasons) == 2
