"""Whole remote shards kept in a local folder shared by the processes of a node, up to a size."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cliplift.sharding.manifest import ShardFacts
from cliplift.sharding.storage import StorageError, Store, temporary_beside


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
