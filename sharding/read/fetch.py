"""Local files kept open between reads.

Whole remote shards kept in a local folder shared by the processes of a node, up to a size.

Bytes fetched by threads before they are asked for, so that the latency of a store is not waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cliplift.sharding.manifest import ShardFacts
from cliplift.sharding.storage import StorageError, Store, temporary_beside

MAX_OPEN_FILES = 256


class OpenFiles:
    """Reads at any place of local files, opening each once. Threads may read side by side; picklable, without them."""

    def __init__(self) -> None:
        self._files: dict[Path, _OpenFile] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, _: dict[str, object]) -> None:
        self._files, self._lock = {}, threading.Lock()

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file (one system call reads at most 2 GiB)."""
        file = self._opened(path)  # held while it is read
        parts = []
        while length:
            part = os.pread(file.descriptor, length, offset)
            if not part:
                break
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def announce(self, path: Path, offset: int, length: int) -> None:
        """Let the system fetch bytes into memory while other work is done."""
        with contextlib.suppress(OSError):  # reading them will say what is wrong
            os.posix_fadvise(self._opened(path).descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Let go of all files; those being read close when that is done."""
        with self._lock:
            self._files = {}

    def _opened(self, path: Path) -> _OpenFile:
        file = self._files.get(path)
        if file is None:
            file = _OpenFile(path)
            with self._lock:
                if len(self._files) >= MAX_OPEN_FILES:
                    self._files = {}
                self._files[path] = file
        return file


class _OpenFile:
    """A descriptor that closes with its last user."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardCache:
    """A bounded folder of shards; the least recently read leave first.

    Files are named by content, so a rebuilt shard never meets its old bytes. An evicted file that another process
    still reads stays readable for it: on POSIX an open file outlives its name.
    """

    def __init__(self, folder: Path, gib: float) -> None:
        self.folder, self.limit_bytes = folder, int(gib * 2**30)

    def read(self, store: Store, shard: ShardFacts, offset: int, length: int) -> bytes:
        """Bytes of a shard, fetching it whole on the first read.

        Raises:
            StorageError: the fetched shard has another size than the manifest says.
        """
        path = self.folder / f"{shard.sha256}.tar"
        for _ in range(3):  # another process may evict the file between the fetch and the open
            try:
                with path.open("rb") as file:
                    os.utime(path)
                    return os.pread(file.fileno(), length, offset)
            except FileNotFoundError:
                self._fetch(store, shard, path)
        raise StorageError(
            f"{shard.file}: evicted as fast as it is fetched; raise cache_gib above {self.limit_bytes / 2**30:g}"
        )

    def _fetch(self, store: Store, shard: ShardFacts, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(f"{shard.sha256}.lock"):
            if path.exists():
                return
            with self._lock("evict.lock"):
                self._make_room(shard.bytes)
            temporary = temporary_beside(path)
            try:
                store.fetch(shard.file, temporary)
                size = temporary.stat().st_size
                if size != shard.bytes:
                    raise StorageError(f"{shard.file}: {shard.bytes} bytes expected, {size} fetched")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def _make_room(self, needed_bytes: int) -> None:
        kept = sorted(self.folder.glob("*.tar"), key=lambda p: p.stat().st_mtime_ns)
        total = sum(p.stat().st_size for p in kept)
        while kept and total + needed_bytes > self.limit_bytes:
            oldest = kept.pop(0)
            total -= oldest.stat().st_size
            oldest.unlink(missing_ok=True)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with (self.folder / name).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class ReadAhead:
    """Reads planned samples side by side, at most ``limit`` of them read and not yet taken.

    What :meth:`take` returns does not depend on the threads: it is what reading the sample there and then would give,
    its error included. The plan is a hint: a sample that was not planned is read at once.

    Args:
        read: gives the bytes of a sample by number; called from several threads.
        limit: threads, and the most samples held.
    """

    def __init__(self, read: Callable[[int], bytes], limit: int) -> None:
        assert limit >= 1
        self._read, self._limit = read, limit
        self._planned: deque[int] = deque()
        self._running: dict[int, Future[bytes]] = {}
        self._threads = ThreadPoolExecutor(limit, thread_name_prefix="read-ahead")

    def plan(self, samples: Iterable[int]) -> None:
        """What will be taken from now on, in this order; reads of anything else are given up."""
        self._planned = deque(dict.fromkeys(samples))
        for sample in set(self._running) - set(self._planned):
            self._running.pop(sample).cancel()
        self._top_up()

    def take(self, sample: int) -> bytes:
        """The bytes of a sample; waits for them where they are on their way."""
        if sample in self._planned:
            self._planned.remove(sample)
        under_way = self._running.pop(sample, None)
        self._top_up()
        return self._read(sample) if under_way is None else under_way.result()

    def close(self) -> None:
        """Give up what is planned and end the threads; reads under way are waited for."""
        self._planned.clear()
        self._running.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _top_up(self) -> None:
        for sample in self._planned:
            if len(self._running) >= self._limit:
                return
            if sample not in self._running:
                self._running[sample] = self._threads.submit(self._read, sample)
