"""Local files kept open between reads.

Whole remote shards, and the catalogs and tables of remote datasets, kept in a local folder shared by the processes of a
node, up to a size.

Bytes fetched by threads before they are asked for, so that the latency of a store is not waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cliplift.sharding.manifest import ShardFacts
from cliplift.sharding.storage import StorageError, Store, temporary_beside

MAX_OPEN_FILES = 256
HOST_FILES_BYTES = 64 << 30  # catalogs and tables of remote datasets kept on a host


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
        fetch_once(store, shard.file, path, size=shard.bytes, limit_bytes=self.limit_bytes)


class HostFiles:
    """Files of remote datasets that all processes of a host share: each is fetched once, the least recently used leave.

    Args:
        folder: where they are kept; None takes a folder of this user's in the system's place for temporary files.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def path(self, store: Store, name: str, *, identity: str, size: int) -> Path:
        """Where a file of a store lies on this host.

        Args:
            store: where it comes from; a local one's files are taken where they are.
            name: the file.
            identity: checksum that tells its content, so that another version is another file.
            size: its length, bytes.

        Raises:
            StorageError: it cannot be fetched, or has another length.
            FileNotFoundError: the store has no such file.
        """
        local = store.local_path(name)
        if local is not None:
            return local
        kept = self._own_folder() / f"{identity}{Path(name).suffix}"
        if kept.is_file() and kept.stat().st_size == size:
            os.utime(kept)
        else:
            fetch_once(store, name, kept, size=size, limit_bytes=HOST_FILES_BYTES)
        return kept

    def _own_folder(self) -> Path:
        if self.folder is not None:
            return self.folder
        folder = Path(tempfile.gettempdir()) / f"cliplift-catalogs-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise StorageError(f"{folder}: is another user's; name a folder as data.cache_folder")
        return folder


def fetch_once(store: Store, name: str, target: Path, *, size: int, limit_bytes: int) -> None:
    """Fetch a file of a store for all processes of this host, unless another just did.

    Files beside it with the same ending leave, the least recently read first, until all fit in ``limit_bytes``.

    Raises:
        StorageError: the fetched file has not ``size`` bytes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.parent / f"{target.stem}.lock"):
        if target.is_file() and target.stat().st_size == size:
            return
        with _lock(target.parent / "evict.lock"):
            _make_room(target, size, limit_bytes)
        temporary = temporary_beside(target)
        try:
            store.fetch(name, temporary)
            found = temporary.stat().st_size
            if found != size:
                raise StorageError(f"{name}: {size} bytes expected, {found} fetched")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def _make_room(target: Path, needed_bytes: int, limit_bytes: int) -> None:
    kept = sorted(target.parent.glob(f"*{target.suffix}"), key=lambda p: p.stat().st_mtime_ns)
    total = sum(p.stat().st_size for p in kept)
    while kept and total + needed_bytes > limit_bytes:
        oldest = kept.pop(0)
        total -= oldest.stat().st_size
        oldest.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("a") as file:
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
