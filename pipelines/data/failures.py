"""What a loader does about samples that cannot be read, and how it says that its worker processes have failed."""

from __future__ import annotations

import logging

from cliplift.configs.data import DataConfig
from cliplift.pipelines.data.batch import ClipBatch

ENOUGH_SAMPLES = 100  # fewer say little of a share, except where there will be no more

log = logging.getLogger(__name__)


class WorkerError(ValueError):
    """The decoding processes died or fell silent; the message says over which samples, and what to do."""


class TooManyFailuresError(ValueError):
    """More samples were unreadable than the config tolerates."""


class FailureCount:
    """Unreadable samples so far, and when they are too many."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self._read = self._failed = self._in_row = 0
        self._last = ""

    def count(self, batch: ClipBatch, *, judge: bool = False) -> None:
        """Add a batch.

        Args:
            batch: it may name samples for which others stand in.
            judge: an epoch or the run ends here: the share counts, however few samples were read.

        Raises:
            TooManyFailuresError: above ``max_failed_in_row`` or ``max_failed_share``.
        """
        self._read += len(batch.labels) // self.data.clips_per_sample
        self._failed += len(batch.failed)
        self._in_row = self._in_row + len(batch.failed) if batch.failed else 0
        for message in batch.failed:
            log.warning("another sample stands in for %s", message)
            self._last = message
        enough = judge or self._read >= ENOUGH_SAMPLES
        too_many = enough and self._failed > self.data.max_failed_share * self._read
        if self._in_row > self.data.max_failed_in_row or too_many:
            read_from = self.data.sequential.tars if self.data.sequential else self.data.urls
            raise TooManyFailuresError(
                f"{self._failed} of {self._read} samples could not be read (the last: {self._last}); "
                f"run `cliplift verify` on {', '.join(read_from)}, or raise data.max_failed_share"
            )
