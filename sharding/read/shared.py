"""Arrays that other processes of this host map into memory, where each would otherwise be sent a copy."""

from __future__ import annotations

import atexit
import contextlib
import os
import uuid
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from cliplift.sharding.scratch import scratch_folder

SENT_BYTES = 1 << 16  # smaller ones are sent

T = TypeVar("T", bound=np.generic)


class SharedArray(Generic[T]):
    """An array that is pickled as the name of a file in a scratch folder, which lives as long as this process.

    Args:
        array: it is not to be changed any more.
    """

    def __init__(self, array: npt.NDArray[T]) -> None:
        self.array = array
        self._file: Path | None = None

    def __getstate__(self) -> dict[str, object]:
        if self.array.nbytes <= SENT_BYTES:
            return {"array": np.array(self.array)}
        if self._file is None:
            self._file = _folder() / f"{uuid.uuid4().hex}.npy"
            np.save(self._file, self.array, allow_pickle=False)
            weakref.finalize(self, _remove, self._file, os.getpid())
        return {"file": self._file}

    def __setstate__(self, state: dict[str, object]) -> None:
        self._file = None
        if isinstance(state.get("file"), Path):
            self._file = Path(str(state["file"]))  # a process that is sent it can send it on
            self.array = np.asarray(np.load(self._file, mmap_mode="r", allow_pickle=False))
        else:
            array = state["array"]
            assert isinstance(array, np.ndarray)
            self.array = array


def _remove(file: Path, owner: int) -> None:
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


_FOLDERS: dict[int, Path] = {}


def _folder() -> Path:
    """The scratch folder of this process; a killed one's is removed by whoever makes the next."""
    own = os.getpid()  # a child of a fork is another process than the one that has the folder
    if own not in _FOLDERS:
        stack = ExitStack()
        _FOLDERS[own] = stack.enter_context(scratch_folder())
        atexit.register(lambda: stack.close() if os.getpid() == own else None)
    return _FOLDERS[own]
