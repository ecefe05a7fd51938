"""An S3 API served on loopback behind a proxy that fails as it is told to. No test; loaded by those that need it."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
import s3fs
from moto.moto_api._internal.models import moto_api_backend
from moto.server import ThreadedMotoServer

from cliplift.sharding import storage

KINDS = ("503", "500", "reset", "half upload", "lost answer", "half answer", "stall")
BEFORE_THE_STORE = ("403", "503", "500", "reset", "half upload", "slow upload", "stall")
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

    def calm(self) -> None:
        """No faults from here on."""
        self.share, self.only, self.kinds, self.left = 0.0, None, KINDS, sys.maxsize

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
            if fault in ("403", "500", "503"):
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


@contextmanager
def served(bucket: str) -> Iterator[Faults]:
    """The API with one empty bucket, named to this process and its children by the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
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
        # Another server of this process would share its buckets, and an earlier client knows the earlier address.
        moto_api_backend.reset()
        s3fs.S3FileSystem.clear_instance_cache()
        # At its first request the server imports what it needs: that one is waited for as long as it takes.
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
        patch.setattr(storage, "REMOTE_PAUSE_SECONDS", 0.01)
        patch.setattr(s3fs.S3FileSystem, "read_timeout", CLIENT_PATIENCE_SECONDS)
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        yield faults
    proxy.shutdown()
    server.stop()
