"""Run by torchrun: saves at every ZeRO stage and reads it back; what each rank wrote and read, as JSON from rank 0.

Not a test itself. Called by test_state_slices.py with a results file and a folder for the runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import training_worker as worker  # beside this file

from cliplift.pipelines.checkpoints.saved import open_checkpoint
from cliplift.pipelines.distributed.collectives import Topology, gather_objects, leave, start
from cliplift.pipelines.engine.deepspeed_setup import build_engine
from cliplift.pipelines.engine.ema import WeightAverage
from cliplift.pipelines.engine.zero_state import fragments, local_masters


def frozen_part(module: torch.nn.Module) -> None:
    """The second convolution is not trained: its 520 values have no optimizer state."""
    for parameter in module.body[3].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)


def read_back(output: str, stage: int, topology: Topology, *, frozen: bool) -> dict[str, Any]:
    """Open the last checkpoint in a new engine of another start, and compare with what was saved."""
    run = worker.run_config(output, engine__zero_stage=stage, optim__average_decay=0.9)
    module = worker.Net()
    if frozen:
        frozen_part(module)
    saved = open_checkpoint(Path(output) / "checkpoints/step_00000008", topology=topology)
    engine = build_engine(module, run, folder=Path(output), saved=saved, topology=topology)
    average = WeightAverage(engine, decay=0.9)
    average.restore(saved.average, saved.average_buffers, updates=8)
    tensors = worker.engine_tensors(engine)
    expected = {name: saved.parameters.whole(name) for name in saved.parameters}
    found = {
        "rank": topology.rank,
        "share": sum(part.length for part in fragments(engine)),
        "masters": sum(master.numel() for master in local_masters(engine)),
        "equal": all(torch.equal(tensors[name], value) for name, value in expected.items()),
    }
    engine.destroy()
    return found


def main(results: Path, place: Path) -> None:
    cases = []
    for stage in range(4):
        for frozen in (False, True):
            output = str(place / f"zero{stage}{'-frozen' if frozen else ''}")
            run = worker.run_config(output, engine__zero_stage=stage, optim__average_decay=0.9)
            whole = worker.Net.__init__

            def started(self: Any, *given: Any, whole: Any = whole, frozen: bool = frozen) -> None:
                whole(self, *given)
                if frozen:
                    frozen_part(self)

            worker.Net.__init__ = started
            try:
                trained = worker.train(run)
            finally:
                worker.Net.__init__ = whole
            topology = start(run.engine)
            counts = counted(lambda: read_back(output, stage, topology, frozen=frozen))  # noqa: B023
            cases.append({"stage": stage, "frozen": frozen, "losses": trained["losses"],
                          "ranks": gather_objects([counts], topology)})  # fmt: skip
    if start(run.engine).is_main:
        results.write_text(json.dumps(cases))


def counted(read: Any) -> dict[str, Any]:
    """What ``read`` returns, with the bytes that loading (not the comparison) took from the slices."""
    from cliplift.pipelines.checkpoints import slices

    total = {"bytes": 0}
    whole, some = slices.SliceReader.whole, slices.SliceReader.read

    def counting(self: Any, name: str, start: int, length: int) -> torch.Tensor:
        values = some(self, name, start, length)
        total["bytes"] += values.numel() * values.element_size()
        return values

    def aside(self: Any, name: str) -> torch.Tensor:
        before = total["bytes"]
        values = whole(self, name)
        total["bytes"] = before
        return values

    slices.SliceReader.read, slices.SliceReader.whole = counting, aside  # type: ignore[method-assign]
    try:
        found: dict[str, Any] = read()
    finally:
        slices.SliceReader.read, slices.SliceReader.whole = some, whole  # type: ignore[method-assign]
    return found | {"read": total["bytes"]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
