"""Where shards lie: a local folder or an object store through fsspec, behind one small set of verbs.

Nothing half-written is ever visible under its final name: locally a temporary file is synced and renamed, on an
object store an upload appears only when it is complete.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import io
import logging
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol, TypeVar

from cliplift.sharding.redirects import PrivateRedirectError, guard_redirects

log = logging.getLogger(__name__)

TEMPORARY_SUFFIX = ".tmp"
REMOTE_ATTEMPTS = 5
REMOTE_PAUSE_SECONDS = 0.5

R = TypeVar("R")


class FileSystem(Protocol):
    """What is used of an fsspec file system; paths are absolute inside it."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes: ...
    def info(self, path: str) -> Mapping[str, object]: ...
    def find(self, path: str) -> Sequence[str]: ...
    def pipe_file(self, path: str, value: bytes) -> object: ...
    def put_file(self, lpath: str, rpath: str) -> object: ...
    def get_file(self, rpath: str, lpath: str) -> object: ...
    def rm_file(self, path: str) -> object: ...
    def invalidate_cache(self) -> object: ...


class StorageError(ValueError):
    """A file of a dataset cannot be read or written; the message names it."""


class Store(Protocol):
    """Files below one root, named by paths relative to it. ``publish`` takes a file away, ``upload`` leaves it."""

    url: str

    def read(self, name: str) -> bytes: ...
    def read_range(self, name: str, start: int, length: int) -> bytes: ...
    def size(self, name: str) -> int | None: ...
    def list(self) -> list[str]: ...
    def write(self, name: str, data: bytes) -> None: ...
    def publish(self, file: Path, name: str) -> None: ...
    def upload(self, file: Path, name: str) -> None: ...
    def fetch(self, name: str, file: Path) -> None: ...
    def remove(self, name: str) -> None: ...
    def local_path(self, name: str) -> Path | None: ...


def open_store(url: str) -> Store:
    """The store behind a local path or a ``scheme://`` URL."""
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    return RemoteStore(url) if "://" in url else LocalStore(url)


# Where the URLs of a list may lead. fsspec's other file systems open further ones, run templates or read this machine.
LISTED_SCHEMES = (
    "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "oci", "oss", "hdfs", "ftp", "sftp",
    "smb", "memory", "file",
)  # fmt: skip


def require_plain_url(url: str) -> None:
    """Refuse a URL of a list that is a chain of file systems, or of a scheme that is none of LISTED_SCHEMES.

    Raises:
        StorageError: with the scheme.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return
    if "::" in scheme or "::" in re.split(r"[?#]", rest)[0]:
        raise StorageError(f"{without_secrets(url)}: a list may not chain file systems (::)")
    if scheme.lower() not in LISTED_SCHEMES:
        raise StorageError(f"{without_secrets(url)}: a list may not name {scheme}:// URLs")


def join(root: str, name: str) -> str:
    """``name`` below ``root``, unless it is absolute or a URL itself."""
    if not root or "://" in name or name.startswith("/"):
        return name
    return f"{root.rstrip('/')}/{name}"


class LocalStore:
    """A folder on a mounted file system."""

    def __init__(self, folder: str) -> None:
        self.url = folder
        self._root = Path(folder)

    def local_path(self, name: str) -> Path | None:
        return self._root / name

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        with (self._root / name).open("rb") as file:
            return os.pread(file.fileno(), length, start)

    def size(self, name: str) -> int | None:
        try:
            return (self._root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self) -> list[str]:
        return sorted(p.relative_to(self._root).as_posix() for p in self._root.rglob("*") if p.is_file())

    def write(self, name: str, data: bytes) -> None:
        target = self._root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(target)
        try:
            with temporary.open("wb") as file:
                hold(file)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                self._rename(temporary, target)
        except OSError:
            temporary.unlink(missing_ok=True)  # a full disk stays full otherwise
            raise

    def publish(self, file: Path, name: str) -> None:
        target = self._root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.stat().st_dev != target.parent.stat().st_dev:
            temporary = temporary_beside(target)
            try:
                shutil.copyfile(file, temporary)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            file.unlink()
            file = temporary
        with file.open("rb") as synced:
            os.fsync(synced.fileno())
        self._rename(file, target)

    def upload(self, file: Path, name: str) -> None:
        target = self._root / name
        with whole_file(target) as temporary:
            shutil.copyfile(file, temporary)
            with temporary.open("rb") as synced:
                os.fsync(synced.fileno())

    def fetch(self, name: str, file: Path) -> None:
        shutil.copyfile(self._root / name, file)

    def remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def _rename(self, temporary: Path, target: Path) -> None:
        temporary.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)


class RangeFile(io.RawIOBase):
    """A file of a store that is read by range."""

    def __init__(self, store: Store, name: str) -> None:
        size = store.size(name)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{store.url}/{name}")
        self._store, self._name, self._size, self._place = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), max(0, self._size - self._place))
        data = self._store.read_range(self._name, self._place, length) if length else b""
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


_OPENING = threading.Lock()


class RemoteStore:
    """An object store or any other fsspec file system."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opened: tuple[int, FileSystem, str] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"url": self.url, "_opened": None}

    def _fs(self) -> tuple[FileSystem, str]:
        # fsspec's asynchronous file systems do not survive a fork: each process opens its own.
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            import fsspec

            with _OPENING:  # threads that read side by side share one
                opened = self._opened
                if opened is None or opened[0] != os.getpid():
                    guard_redirects()
                    try:
                        fs, root = fsspec.core.url_to_fs(self.url)
                    except (ValueError, ImportError) as error:  # no such protocol, or its package is missing
                        raise StorageError(f"{without_secrets(self.url)}: {error}") from error
                    opened = (os.getpid(), fs, root)
                    self._opened = opened
        return opened[1], opened[2]

    def local_path(self, name: str) -> Path | None:
        return None

    def read(self, name: str) -> bytes:
        fs, root = self._fs()
        return self._retried("read", name, lambda: fs.cat_file(f"{root}/{name}"))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        fs, root = self._fs()
        return self._retried(
            "read", name, lambda: fs.cat_file(f"{root}/{name}", start=start, end=start + length)
        )

    def size(self, name: str) -> int | None:
        fs, root = self._fs()

        def ask() -> int | None:
            fs.invalidate_cache()
            try:
                return int(str(fs.info(f"{root}/{name}")["size"]))
            except FileNotFoundError:
                return None

        return self._retried("look up", name, ask)

    def list(self) -> list[str]:
        fs, root = self._fs()

        def ask() -> list[str]:
            fs.invalidate_cache()
            try:
                return sorted(path[len(root) :].lstrip("/") for path in fs.find(root))
            except FileNotFoundError:
                return []

        return self._retried("list", "", ask)

    def write(self, name: str, data: bytes) -> None:
        fs, root = self._fs()
        self._retried("write", name, lambda: fs.pipe_file(f"{root}/{name}", data))
        self._require_whole(name, len(data))

    def publish(self, file: Path, name: str) -> None:
        self.upload(file, name)
        file.unlink()

    def upload(self, file: Path, name: str) -> None:
        fs, root = self._fs()
        size = file.stat().st_size
        self._retried("write", name, lambda: fs.put_file(str(file), f"{root}/{name}"))
        self._require_whole(name, size)

    def fetch(self, name: str, file: Path) -> None:
        fs, root = self._fs()
        self._retried("read", name, lambda: fs.get_file(f"{root}/{name}", str(file)))

    def remove(self, name: str) -> None:
        fs, root = self._fs()

        def delete() -> None:
            try:
                fs.rm_file(f"{root}/{name}")
            except FileNotFoundError:
                return

        self._retried("remove", name, delete)

    def _require_whole(self, name: str, size: int) -> None:
        found = self.size(name)
        if found != size:
            raise StorageError(
                f"{without_secrets(self.url)}/{name}: {size} bytes were written, {found} arrived"
            )

    def _retried(self, verb: str, name: str, action: Callable[[], R]) -> R:
        for attempt in range(REMOTE_ATTEMPTS):
            try:
                return action()
            except FileNotFoundError:
                raise
            except _connection_errors() as error:
                # aiohttp wraps what refuses a connection.
                refused = isinstance(getattr(error, "os_error", error), PermissionError)
                if attempt + 1 == REMOTE_ATTEMPTS or refused:
                    raise StorageError(_describe_failure(self.url, name, verb, error)) from error
                time.sleep(REMOTE_PAUSE_SECONDS * 2**attempt)
        raise AssertionError("unreachable")


def _connection_errors() -> tuple[type[Exception], ...]:
    """What a failing connection raises: OSError by fsspec's rule, but the libraries below let their own through."""
    found: list[type[Exception]] = [OSError]
    for module, name in (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError")):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


EXPIRED = ("expiredtoken", "token has expired", "bad request", "invalidtoken")
DENIED = ("forbidden", "accessdenied", "access denied", "permission")


def _describe_failure(url: str, name: str, verb: str, error: Exception) -> str:
    """What failed, in the words of the service, and what to do about it."""
    error = getattr(error, "os_error", error)
    message = str(error).replace(url, without_secrets(url)) or type(error).__name__
    code = _service_code(error)
    message += f" ({code})" if code and code not in message else ""
    lower = message.lower()
    advice = ""
    if any(word in lower for word in EXPIRED):
        advice = (
            "; the credentials may have expired: fetch new ones and start again, finished shards are kept"
        )
    elif isinstance(error, PrivateRedirectError):
        pass  # it says itself what to do
    elif isinstance(error, PermissionError) or any(word in lower for word in DENIED):
        advice = "; check the credentials of this process and their rights to this place"
    return f"{without_secrets(url)}/{name}: cannot {verb}: {message}{advice}"


def _service_code(error: BaseException | None) -> str:
    """The code of an answer of S3 or alike (``SlowDown``, ``AccessDenied``), which fsspec's errors keep as a cause."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, Mapping) and isinstance(response.get("Error"), Mapping):
            return str(response["Error"].get("Code", ""))
        error = error.__cause__
    return ""


def without_secrets(url: str) -> str:
    """A URL as it may be stored or shown: without user and password, and over HTTP without the query, which may sign.

    Paths stay as they are, and so do the keys of object stores, in which ``?`` is a character like others.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    authority, slash, path = rest.partition("/")
    authority = authority.rpartition("@")[2]
    if scheme.rpartition("::")[2].lower() in ("http", "https", "ftp"):
        authority, path = (part.partition("?")[0].partition("#")[0] for part in (authority, path))
    return f"{scheme}://{authority}{slash}{path}"


def file_sha256(path: Path) -> str:
    """sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_beside(target: Path) -> Path:
    """A new name in the same folder, recognisable as unfinished by ``verify``."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")


def is_out_of_space(error: BaseException) -> bool:
    """Whether an error tells of this machine's disks and not of the file that is read."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A new file beside ``target`` to write to, which takes its place at the end; on an error nothing is left."""
    if not target.name or target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    try:
        temporary.touch()
        yield temporary
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def remove_temporaries_of(target: Path) -> None:
    """Remove what :func:`temporary_beside` named for this target and a killed process left: what nobody holds."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*{TEMPORARY_SUFFIX}"):
        with suppress(FileNotFoundError), path.open("rb") as file:
            if hold(file):
                path.unlink(missing_ok=True)


def hold(file: IO[bytes]) -> bool:
    """Mark an open file as in use until it is closed, also by ``kill -9``; False where another process holds it.

    On a file system without locks (some network mounts) every file counts as held: nothing is removed there.
    """
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            log.warning(
                "%s: this file system has no locks (%s); unfinished files of killed builds stay there and may be "
                "removed by hand when no build runs", file.name, error.strerror,
            )  # fmt: skip
        return False
    return True
