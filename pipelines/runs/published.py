"""A run's folder at a URL (``checkpoint.url``): its records with every checkpoint, its result at the end.

A start on another host, whose own folder is empty, takes the records up from there, so that the history goes on.
What belongs to one host stays there: the lock, W&B's and TensorBoard's files, stacks and profiles.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.distributed.collectives import Topology, barrier, broadcast_object, gather_objects
from cliplift.pipelines.runs.folder import CONFIG, HISTORY, LOCK, RESULT, RUN, WEIGHTS
from cliplift.sharding.storage import StorageError, join, open_store, whole_file, without_secrets

RECORDS = (CONFIG, RUN, HISTORY, "wandb.json")
FAILURES = (OSError, StorageError)
SEEN_SECONDS = 10.0


def require_common_folder(folder: Path, topology: Topology) -> None:
    """Check that all ranks see the run's folder of rank 0: where it is of each host alone, checkpoints are in pieces.

    Collective.

    Raises:
        ConfigError: on all ranks; names the host of one that does not.
    """
    sign = folder / f".seen-{broadcast_object(secrets.token_hex(4), topology)}"
    if topology.is_main:
        sign.touch()
    barrier(topology)
    deadline = time.monotonic() + SEEN_SECONDS
    while not (seen := sign.is_file()) and time.monotonic() < deadline:
        time.sleep(0.2)  # a network mount may take a moment
    blind = [] if seen else [f"rank {topology.rank} on {socket.gethostname()}"]
    problems = gather_objects(blind, topology)
    if topology.is_main:
        sign.unlink()
    if problems:
        raise ConfigError(
            f"{problems[0]} does not see the folder {str(folder)!r} of rank 0",
            key="output",
            value=str(folder),
            hint="give a folder on a disk that all hosts share, or have each rank upload its part: checkpoint.url",
        )


class PublishedRun:
    """The copy of a run's folder at a URL; without a URL there is none, and nothing is done."""

    def __init__(self, url: str | None, folder: Path) -> None:
        self.url, self._folder = url, folder

    def require_writable(self, topology: Topology) -> None:
        """Write and read a small file from every rank, before anything is trained. Collective.

        Raises:
            ConfigError: on all ranks, in the words of the store.
        """
        if self.url is None:
            return
        problem: list[str] = []
        name = f".writable-rank{topology.rank}"
        try:
            store = open_store(self.url)
            store.write(name, b"cliplift")
            if store.read(name) != b"cliplift":
                raise StorageError(
                    f"{without_secrets(self.url)}/{name}: other bytes are read than were written"
                )
            store.remove(name)
        except FAILURES as error:
            problem.append(f"rank {topology.rank} cannot write there: {error}")
        self._stop_together(problem, topology, hint="look at the URL and at this machine's credentials")

    def take_up(self, topology: Topology) -> None:
        """Fetch the records over those in rank 0's folder, and the result where the run is finished. Collective."""
        if self.url is None:
            return
        problem: list[str] = []
        if topology.is_main:
            try:
                store = open_store(self.url)
                there = set(store.list())
                for name in (*RECORDS, RESULT):
                    if name in there:
                        with whole_file(self._folder / name) as file:
                            file.write_bytes(store.read(name))
            except FAILURES as error:
                problem.append(f"the run's records cannot be read: {error}")
        self._stop_together(problem, topology, hint="start again when they can")

    def _stop_together(self, problem: list[str], topology: Topology, *, hint: str) -> None:
        problems = gather_objects(problem, topology)
        if problems:
            assert self.url is not None
            raise ConfigError(problems[0], key="checkpoint.url", value=without_secrets(self.url), hint=hint)

    def publish_records(self) -> None:
        """Upload the small files that say what the run is and how far it came. Called on rank 0.

        Raises:
            OSError, StorageError: the store does not take them.
        """
        self._upload(name for name in RECORDS if (self._folder / name).is_file())

    def publish_result(self, topology: Topology) -> None:
        """Upload records, weights and predictions, the result last, unless it is there. Collective.

        Raises:
            ConfigError: on all ranks. The run is finished all the same, and the next start only uploads.
        """
        if self.url is None:
            return
        problem: list[str] = []
        if topology.is_main:
            try:
                if open_store(self.url).size(RESULT) is None:
                    self._upload(self._of_result())
            except FAILURES as error:
                problem.append(f"the run is finished, but cannot be uploaded: {error}")
        self._stop_together(problem, topology, hint="start it again to upload it")

    def _of_result(self) -> list[str]:
        top = {path.name for path in self._folder.iterdir() if path.is_file()} - {RESULT, LOCK}
        inside = (path for path in (self._folder / WEIGHTS).rglob("*") if path.is_file())
        weights = {path.relative_to(self._folder).as_posix() for path in inside}
        return [*sorted(weights), *sorted(name for name in top if not name.startswith(".")), RESULT]

    def _upload(self, names: Iterable[str]) -> None:
        if self.url is None:
            return
        store = open_store(self.url)
        for name in names:
            if name == HISTORY:  # another thread may be adding to it
                store.write(name, (self._folder / name).read_bytes())
            else:
                store.upload(self._folder / name, name)

    def place_of(self, path: Path) -> str:
        """Where a file or folder of the run is found: at the URL, else on this disk."""
        return str(path) if self.url is None else join(self.url, path.relative_to(self._folder).as_posix())
