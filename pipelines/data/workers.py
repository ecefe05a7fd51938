"""Batches from worker processes, in the order requested; a worker that dies or hangs is an error, not a hang."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from cliplift.configs.data import DataConfig
from cliplift.pipelines.data.failures import WorkerError

PRELOADED = ["cliplift.pipelines.data.loader"]
POLL_SECONDS = 2.0

R = TypeVar("R")
B = TypeVar("B")


def batches_from_workers(
    dataset: Dataset[B],
    requests: Iterable[R],
    *,
    data: DataConfig,
    workers: int,
    describe: Callable[[R], str],
) -> Iterator[B]:
    """One batch for every request, in the same order, whichever process makes it.

    Args:
        dataset: turns a request into a batch, in a worker process.
        requests: what to make; drawn a few at a time, so that there may be any number of them.
        data: time-out and prefetching.
        workers: processes, at least 1.
        describe: what a request holds, for messages.

    Raises:
        WorkerError: no batch came for ``data.worker_timeout_seconds``, or a worker died.
    """
    issued: deque[R] = deque()
    before = set(multiprocessing.active_children())
    batches = iter(_loader(dataset, _recorded(requests, issued), data=data, workers=workers))
    processes = [p for p in multiprocessing.active_children() if p not in before]
    asked = time.monotonic()
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            died = "timed out" not in str(error)
            if not died and time.monotonic() - asked < data.worker_timeout_seconds:
                continue
            # A process that hangs in native code or in the kernel does not react to a request through its queue.
            lost = _worker_lost(describe(issued[0]), data=data, processes=processes, died=died)
            for process in processes:
                process.terminate()
            raise lost from None
        issued.popleft()
        yield batch
        asked = time.monotonic()


def _recorded(requests: Iterable[R], issued: deque[R]) -> Iterator[R]:
    for request in requests:
        issued.append(request)
        yield request


def _loader(dataset: Dataset[B], requests: Iterator[R], *, data: DataConfig, workers: int) -> DataLoader[B]:
    context = multiprocessing.get_context("forkserver")
    # The fork server imports torch and decoders once; every worker then starts in milliseconds and shares their memory.
    context.set_forkserver_preload(PRELOADED)
    return DataLoader(
        dataset,
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=data.prefetch_batches,
        # It looks for dead workers when this has passed; how long to wait in all is decided above.
        timeout=min(POLL_SECONDS, data.worker_timeout_seconds),
        # A fork would copy open remote connections and the threads of the parent; a fork server has neither.
        multiprocessing_context=context,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # A terminal and a scheduler send these to every process of a job; the trainer still needs batches to stop in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _worker_lost(what: str, *, data: DataConfig, processes: Sequence[BaseProcess], died: bool) -> WorkerError:
    """What happened to the processes while the batch with ``what`` was awaited, as the user can act on it."""
    if died:
        dead = [p for p in processes if p.exitcode not in (None, 0)]
        how = ", ".join(f"process {p.pid} {_ending(p.exitcode)}" for p in dead) or "how is not known"
        return WorkerError(
            f"a decoding process died ({how}) while waiting for the batch with {what}; killed by signal 9 usually "
            "means that the machine ran out of memory: lower data.workers, data.prefetch_batches or "
            "data.cache_decoded_mib"
        )
    return WorkerError(
        f"no batch came from the {len(processes)} decoding processes for {data.worker_timeout_seconds:g} s; the next "
        f"one holds {what}; the processes were stopped. A file system or a decoder hangs, or "
        "data.worker_timeout_seconds is too short for this machine"
    )


def _ending(code: int | None) -> str:
    assert code is not None
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
