"""Networks built in parts: the bits of the network built whole, of every rank, whatever constructors do."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cliplift.configs.training import EngineConfig
from cliplift.models import create_model
from cliplift.models.factory import save_pretrained
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.engine import partitioned_build
from cliplift.pipelines.engine.partitioned_build import BuildInParts, built_in_parts, part_of

SMALL_VIT = {"width": 48, "depth": 2, "heads": 2, "crop": 32, "in_frames": 4}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "3D conv net": lambda: create_model("t3d_tiny", num_classes=3),
    "inflated 3D conv net": lambda: create_model("p3d_resnet50", num_classes=3),
    "video ViT": lambda: create_model("video_vit_small_16", num_classes=3, **SMALL_VIT),
    "TimeSformer": lambda: create_model("timesformer_small", num_classes=3, in_frames=4, crop=32, depth=2),
    "LSTM": lambda: create_model("lrcn_fusion", num_classes=3, pretrained=None),
}


def of_rank(rank: int, ranks: int) -> Topology:
    return Topology(rank=rank, world_size=ranks, local_rank=rank, device=torch.device("cpu"))


def whole(build: Callable[[], nn.Module]) -> tuple[dict[str, Tensor], Tensor]:
    """The network's tensors by name, and the state of the generator afterwards."""
    torch.manual_seed(7)
    module = build()
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors.items()}, torch.get_rng_state()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", ["3D conv net", "video ViT", "TimeSformer"])
def test_every_rank_holds_its_elements_of_the_network_built_whole(
    monkeypatch: pytest.MonkeyPatch, name: str, ranks: int
) -> None:
    """Bit for bit, buffers too, and the generator goes on from the same state; nothing is asked of other ranks."""

    def refused(*_: object) -> Tensor:
        raise AssertionError("these networks need nothing gathered")

    monkeypatch.setattr(partitioned_build, "all_gather_tensor", refused)
    expected, state = whole(NETWORKS[name])
    for rank in range(ranks):
        torch.manual_seed(7)
        module = built_in_parts(NETWORKS[name], EngineConfig(zero_stage=3), of_rank(rank, ranks))
        assert torch.equal(torch.get_rng_state(), state)
        for key, buffer in module.named_buffers():
            assert torch.equal(buffer, expected[key]), key
        for key, parameter in module.named_parameters():
            part, flat = part_of(parameter), expected[key].flatten()
            assert part is not None
            size = -(-len(flat) // ranks)
            assert parameter.shape == expected[key].shape
            assert part.start == min(rank * size, len(flat))
            assert torch.equal(part.values, flat[rank * size : (rank + 1) * size]), key
            assert parameter.untyped_storage().nbytes() == 4, "one number stands for all of them"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_other_stages_build_as_they_did(stage: int) -> None:
    module = built_in_parts(lambda: nn.Linear(3, 2), EngineConfig(zero_stage=stage), of_rank(0, 2))
    assert all(part_of(parameter) is None for parameter in module.parameters())


def test_parameters_that_deepspeed_cuts_twice_are_built_whole() -> None:
    engine = EngineConfig(zero_stage=3, deepspeed={"zero_optimization": {"zero_hpz_partition_size": 2}})
    module = built_in_parts(lambda: nn.Linear(3, 2), engine, of_rank(0, 2))
    assert all(part_of(parameter) is None for parameter in module.parameters())


class Late(nn.Module):
    """Does to parameters of modules it has been given whatever constructors do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7))
        self.third = nn.Conv3d(2, 3, (1, 2, 2))
        self.own = nn.Parameter(torch.randn(3, 3))
        nn.init.orthogonal_(self.first.weight)
        kept = self.second[0].weight.data  # still held while others are used
        nn.init.trunc_normal_(self.third.weight.view(3, -1), std=0.02)
        kept.uniform_()
        with torch.no_grad():
            self.second[0].bias.copy_(self.first.bias)
            self.third.bias.mul_(2)
            for gate in torch.split(kept, 3):
                gate.add_(self.first.weight.sum())
            self.first.bias[2] = 1.5
        del kept
        self.copy = copy.deepcopy(self.first)
        self.tied = nn.Linear(5, 7)
        self.tied.weight = self.first.weight
        self.apply(self._scale)
        names = list(self.state_dict())
        self.replaced = nn.Linear(len(names), 2)
        self.replaced = nn.Linear(len(names), 3)
        self.first.load_state_dict({"weight": torch.rand(7, 5), "bias": self.tied.bias.detach()})

    @staticmethod
    def _scale(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=float(module.weight.detach().abs().max()))


def test_what_constructors_do_afterwards_is_not_lost() -> None:
    """One rank, whose gathering is no communication; two are in the slow test."""
    expected, state = whole(Late)
    torch.manual_seed(7)
    module = built_in_parts(Late, EngineConfig(zero_stage=3), of_rank(0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for key, parameter in module.named_parameters():
        part = part_of(parameter)
        assert part is not None
        assert torch.equal(part.values, expected[key].flatten()), key


def test_without_it_a_later_change_would_be_an_error() -> None:
    """What stands for a parameter refuses to be written, so that nothing is lost in silence after the build."""
    module = built_in_parts(lambda: nn.Linear(3, 2), EngineConfig(zero_stage=3), of_rank(0, 1))
    for change in (
        lambda: nn.init.normal_(module.weight),  # type: ignore[arg-type]
        lambda: nn.init.uniform_(module.weight),  # type: ignore[arg-type]
        lambda: module.weight.detach().copy_(torch.ones(2, 3)),  # type: ignore[operator]
        lambda: module.weight.detach().mul_(2),  # type: ignore[operator]
    ):
        with pytest.raises(RuntimeError, match="single memory location"):
            change()
    assert bool(torch.isnan(module.weight).all()), "nor does it give a value"  # type: ignore[arg-type]


def test_one_module_is_whole_at_a_time() -> None:
    """Of eight modules, no more than the one being made and the one being changed."""
    most = 0

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList()
            for _ in range(8):
                self.layers.append(nn.Linear(64, 64, bias=False))
                count()
            for layer in self.layers:
                nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
                count()

    def count() -> None:
        nonlocal most
        most = max(most, len(parts._whole))

    with BuildInParts(of_rank(0, 1)) as parts:
        module = Tower()
    parts.finish(module)
    assert parts.gathered == 8
    assert most == 1


def test_weights_from_a_file_are_read_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank copies its own elements; nothing is gathered, and the head of another K is fresh."""

    def refused(*_: object) -> Tensor:
        raise AssertionError("nothing is gathered")

    saved = create_model("video_vit_small_16", num_classes=3, **SMALL_VIT)
    save_pretrained(saved, tmp_path, name="video_vit_small_16", options=SMALL_VIT)

    def build() -> nn.Module:
        return create_model("video_vit_small_16", num_classes=5, pretrained=str(tmp_path), **SMALL_VIT)

    expected, _ = whole(build)
    monkeypatch.setattr(partitioned_build, "all_gather_tensor", refused)
    for rank in range(2):
        torch.manual_seed(7)
        module = built_in_parts(build, EngineConfig(zero_stage=3), of_rank(rank, 2))
        for key, parameter in module.named_parameters():
            part = part_of(parameter)
            assert part is not None
            values = expected[key].flatten()[part.start : part.start + part.values.numel()]
            assert torch.equal(part.values, values), key


def test_a_teacher_beside_the_module_is_whole() -> None:
    teachers = []

    def build() -> nn.Module:
        teachers.append(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
        return nn.Sequential(nn.Linear(2, 2))

    torch.manual_seed(7)
    expected = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()
    torch.manual_seed(7)
    built_in_parts(build, EngineConfig(zero_stage=3), of_rank(0, 1))
    for name, value in teachers[0].state_dict().items():
        assert torch.equal(value, expected[name])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_hand_the_same_bits_to_deepspeed(tmp_path: Path) -> None:
    """Built in parts over gloo, given to an engine, and compared element by element with the network built whole."""
    worker = Path(__file__).with_name("partitioned_build_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(worker), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found) == 2 * 5
    for row in found:
        assert row["different"] == [], row
        assert row["same_generator"], row
        assert row["parameters"] > 5, row
        assert row["losses"][0] == row["losses"][1], row
        assert row["losses"][0] == row["losses"][0], "no NaN"
