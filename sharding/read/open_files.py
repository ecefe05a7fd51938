"""Local files kept open between reads."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

MAX_OPEN_FILES = 256


class OpenFiles:
    """Reads at any place of local files, opening each once. Threads may read side by side; picklable, without them."""

    def __init__(self) -> None:
        self._files: dict[Path, _OpenFile] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
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
