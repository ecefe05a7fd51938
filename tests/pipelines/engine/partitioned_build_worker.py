"""Run by torchrun: networks built in parts and whole, and engines of both, compared; JSON from rank 0.

Not a test itself. Called by test_partitioned_build.py with a folder for results and runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import test_partitioned_build as tests  # beside this file
import torch
import training_worker as worker
from torch import Tensor, nn

from cliplift.pipelines.distributed.collectives import Topology, gather_objects, leave, start
from cliplift.pipelines.engine.deepspeed_setup import build_engine
from cliplift.pipelines.engine.partitioned_build import built_in_parts
from cliplift.pipelines.engine.zero_state import parameter_slices


class Trained(nn.Module):
    """A network whose loss is the mean square of what it says of the clips."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.network(inputs["clips"]).square().mean()}


class Pixels(nn.Module):
    """``Late`` on five numbers of a clip."""

    def __init__(self) -> None:
        super().__init__()
        self.late = tests.Late()

    def forward(self, clips: Tensor) -> Tensor:
        late = self.late
        rows = clips.flatten(1)[:, :5]
        hidden = late.second(late.first(rows)) + late.copy(rows) + late.tied(rows)
        unused = late.own.sum() + late.replaced.weight.sum() + late.replaced.bias.sum()
        return hidden.sum(1) + unused + late.third(clips[:, :2]).mean()


def frozen_stem() -> nn.Module:
    module = tests.NETWORKS["video ViT"]()
    for parameter in module.patch_embed.parameters():  # type: ignore[union-attr, operator]
        parameter.requires_grad_(False)
    return module


BUILDS = {name: tests.NETWORKS[name] for name in ("3D conv net", "video ViT", "TimeSformer")} | {
    "late": Pixels, "frozen": frozen_stem,
}  # fmt: skip


def compare(name: str, place: Path, topology: Topology) -> dict[str, Any]:
    def build() -> nn.Module:
        torch.manual_seed(7)
        return Trained(BUILDS[name]())

    run = worker.run_config(str(place / name), engine__zero_stage=3)
    expected, losses = {}, []
    whole = build()
    after = torch.get_rng_state()
    expected = {key: value.detach().clone() for key, value in whole.named_parameters()}
    module = built_in_parts(build, run.engine, topology)
    same_generator = torch.equal(torch.get_rng_state(), after)
    different = []
    for made in (module, whole):
        engine = build_engine(made, run, folder=place / name, saved=None, topology=topology)
        for key, part in parameter_slices(engine).items():
            values = expected[key].flatten()[part.start : part.start + part.values.numel()]
            if not torch.equal(part.values, values):
                different.append(key)
        losses.append(steps(engine, topology.rank))
        engine.destroy()
    return {"name": name, "different": different, "same_generator": same_generator, "losses": losses,
            "parameters": len(expected)}  # fmt: skip


def steps(engine: Any, rank: int) -> list[float]:
    """Losses of three steps on this rank's clips."""
    found = []
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        loss = engine({"clips": torch.randn(4, 3, 4, 32, 32)})["loss"]
        engine.backward(loss)
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-3
        engine.step()
        found.append(float(loss))
    return found


def main(place: Path) -> None:
    topology = start(worker.run_config(str(place)).engine)
    rows = [compare(name, place, topology) for name in BUILDS]
    rows = gather_objects(rows, topology)
    if topology.is_main:
        (place / "results.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
