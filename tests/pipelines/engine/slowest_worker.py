"""Run by torchrun: a training of fifty steps in which rank 1 gets its data late, or computes more slowly.

Not a test itself; argv: the run's folder, and data or compute.
"""

from __future__ import annotations

import os
import sys
import time

import training_worker as worker  # beside this file
from torch import Tensor

from cliplift.pipelines.distributed.collectives import leave

SLOW_SECONDS = 0.1  # far more than a step of this small network takes


def main(folder: str, cause: str) -> None:
    if os.environ["RANK"] == "1" and cause == "data":
        worker.FixedLoader.slow_seconds = SLOW_SECONDS
    if os.environ["RANK"] == "1" and cause == "compute":
        quick = worker.Net.forward

        def slow(self: worker.Net, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            time.sleep(SLOW_SECONDS)
            return quick(self, inputs)

        worker.Net.forward = slow  # type: ignore[method-assign]
    worker.train(
        worker.run_config(
            folder,
            schedule__steps=50,
            track__every_steps=10,
            engine__zero_stage=1,
            checkpoint__every_steps=50,
        )
    )
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
