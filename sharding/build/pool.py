"""A pool of isolated worker processes: results in task order, a bounded look-ahead, and a hard time limit per clip.

A worker that dies or overruns is replaced. The clip it was on is tried again, then refused; the video goes on with
its next clip, so one bad clip costs that clip alone.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar, cast

from cliplift.sharding.build.worker import ClipFacts, Message, WorkerSettings, receive, send
from cliplift.sharding.scratch import scratch_folder

LOOK_AHEAD_PER_WORKER = 4
START_SECONDS = 60.0  # importing the libraries on a busy machine

# One thread per library: parallelism comes from the number of workers, and it keeps the bytes reproducible.
# Some clips encode differently after other allocations, as if libx264 read memory that nobody wrote. Memory
# that is always zeroed (the complement of 255), with no per-thread cache around that, makes a clip a function of its
# frames alone again.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.perturb=255:glibc.malloc.tcache_count=0",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Job(Generic[T]):
    """A video to cut: the task as it is sent to a worker, and whatever the caller wants back with the result."""

    message: Mapping[str, object]
    context: T


@dataclass
class VideoResult:
    """Everything that came of one video."""

    sha256: str = ""
    clips: list[tuple[ClipFacts, bytes]] = field(default_factory=list)
    refused: list[tuple[int, str, str]] = field(default_factory=list)


class _Worker(Generic[T]):
    def __init__(self, settings: WorkerSettings, scratch: Path) -> None:
        self.scratch = scratch
        scratch.mkdir()
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cliplift.sharding.build.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # decoders write to it what the ledger says better
                env=os.environ | ENVIRONMENT | {"TMPDIR": str(scratch)},
            )
        self.link = ours
        self.link.settimeout(START_SECONDS)
        send(ours, settings)
        self.slot: _Slot[T] | None = None
        self.deadline = 0.0
        self.fresh = True
        self.fatal_reason = ""

    def end(self) -> str:
        """Kill the process and remove its temporary files; how it ended, for the ledger."""
        died = self.process.poll()
        if died is None:
            try:  # a closed socket may be seen a moment before the process is gone
                died = self.process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.link.close()
        shutil.rmtree(self.scratch, ignore_errors=True)
        if died is None:
            return "killed"
        return f"signal {signal.Signals(-died).name}" if died < 0 else f"exit status {died}"


@dataclass
class _Slot(Generic[T]):
    """A job under way."""

    job: Job[T]
    result: VideoResult = field(default_factory=VideoResult)
    next_clip: int = 0
    clips: int | None = None
    failures: int = 0
    done: bool = False


class WorkerPool(Generic[T]):
    """Run jobs in isolated processes.

    Args:
        workers: processes.
        settings: sent to each worker at its start.
        clip_timeout_seconds: time without a finished clip after which a worker is killed.
        attempts: times a clip is tried when its worker died or was killed.
    """

    def __init__(
        self, *, workers: int, settings: WorkerSettings, clip_timeout_seconds: float, attempts: int
    ) -> None:
        self._count, self._settings = workers, settings
        self._timeout, self._attempts = clip_timeout_seconds, attempts
        self._workers: list[_Worker[T]] = []
        self._selector = selectors.DefaultSelector()
        self._held = ExitStack()
        self._scratch = Path()
        self._started = 0

    def __enter__(self) -> WorkerPool[T]:
        self._scratch = self._held.enter_context(scratch_folder())
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._selector.close()
        self._held.close()

    def run(self, jobs: Iterable[Job[T]]) -> Iterator[tuple[Job[T], VideoResult]]:
        """Results in the order of the jobs. At most a few jobs per worker are held in memory."""
        source = iter(jobs)
        window: deque[_Slot[T]] = deque()
        waiting: deque[_Slot[T]] = deque()
        exhausted = False
        while True:
            while not exhausted and len(window) < LOOK_AHEAD_PER_WORKER * self._count:
                job = next(source, None)
                if job is None:
                    exhausted = True
                    break
                slot = _Slot(job)
                window.append(slot)
                waiting.append(slot)
            while window and window[0].done:
                slot = window.popleft()
                yield slot.job, slot.result
            if not window and exhausted:
                return
            if window and not window[0].done:
                self._dispatch(waiting)
                self._wait(waiting)

    def _dispatch(self, waiting: deque[_Slot[T]]) -> None:
        idle = [w for w in self._workers if w.slot is None]
        while waiting and (idle or len(self._workers) < self._count):
            worker = idle.pop() if idle else self._start()
            worker.slot = waiting.popleft()
            # A new worker's first answer includes the time its libraries take to load.
            worker.deadline = time.monotonic() + self._timeout + (START_SECONDS if worker.fresh else 0.0)
            try:
                send(worker.link, {**worker.slot.job.message, "first_clip": worker.slot.next_clip})
            except OSError:
                self._worker_lost(worker, waiting, stage="crash")

    def _start(self) -> _Worker[T]:
        self._started += 1
        worker: _Worker[T] = _Worker(self._settings, self._scratch / f"worker-{self._started}")
        self._workers.append(worker)
        self._selector.register(worker.link, selectors.EVENT_READ, worker)
        return worker

    def _wait(self, waiting: deque[_Slot[T]]) -> None:
        busy = [w for w in self._workers if w.slot is not None]
        if not busy:
            return
        patience = max(0.0, min(w.deadline for w in busy) - time.monotonic())
        for key, _ in self._selector.select(patience):
            worker: _Worker[T] = key.data
            try:
                worker.link.settimeout(max(0.01, worker.deadline - time.monotonic()))
                message, payload = receive(worker.link)
            except TimeoutError:
                self._worker_lost(worker, waiting, stage="timeout")
            except (EOFError, OSError):
                self._worker_lost(worker, waiting, stage="crash")
            else:
                self._handle_message(worker, message, payload)
        for worker in [w for w in busy if w.slot is not None and time.monotonic() > w.deadline]:
            self._worker_lost(worker, waiting, stage="timeout")

    def _handle_message(self, worker: _Worker[T], message: Message, payload: bytes) -> None:
        slot = worker.slot
        assert slot is not None, "a worker spoke without a job"
        worker.fresh = False
        worker.deadline = time.monotonic() + self._timeout
        if "fatal" in message:
            worker.fatal_reason = message["fatal"]
        elif "working" in message:
            return  # only the deadline moves
        elif "done" in message:
            slot.done = True
            worker.slot = None
        elif "clips" in message:
            slot.clips = message["clips"]
            slot.result.sha256 = message["sha256"]
        else:
            refused = message.get("refused")
            number = message["clip"] if refused is None else refused
            if refused is None:
                slot.result.clips.append((cast(ClipFacts, message), payload))
            else:
                slot.result.refused.append((number, message["stage"], message["reason"]))
            slot.next_clip, slot.failures = number + 1, 0

    def _worker_lost(self, worker: _Worker[T], waiting: deque[_Slot[T]], *, stage: str) -> None:
        """A worker is gone or must go; its clip is tried again or refused."""
        slot = worker.slot
        self._selector.unregister(worker.link)
        self._workers.remove(worker)
        if stage == "timeout":
            worker.process.kill()
        how = worker.end()
        if slot is None:
            return
        slot.failures += 1
        if slot.failures >= self._attempts:
            reason = (
                f"not done in {self._timeout:g} s"
                if stage == "timeout"
                else f"the worker process ended: {worker.fatal_reason or how}"
            )
            slot.result.refused.append((slot.next_clip, stage, reason))
            slot.next_clip, slot.failures = slot.next_clip + 1, 0
            if slot.clips is None or slot.next_clip >= slot.clips:
                slot.done = True
                return
        waiting.appendleft(slot)
