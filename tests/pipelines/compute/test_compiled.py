"""Compiled blocks and modules: one graph each, none anew after the first steps, and the numbers they had.

The backend is torch's own ``eager``, which needs no compiler: what is tested is what is compiled, not how fast it is.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch._dynamo.utils import counters

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import EngineConfig
from cliplift.models import create_model, list_models
from cliplift.models.protocol import VideoNetwork
from cliplift.pipelines.compute import compiled
from cliplift.pipelines.compute.compiled import compile_blocks, compile_module
from cliplift.pipelines.compute.recompute import recompute_blocks
from cliplift.pipelines.stages.classification import Classifier

STEPS_UNTIL_WARM = 3
# One network of each family with its smallest input.
FAMILIES: dict[str, tuple[int, ...]] = {
    "c3d": (3, 16, 112, 112), "convlstm": (3, 3, 40, 32), "gru_rcn": (3, 3, 40, 33), "video_vit_tiny_8": (3, 4, 32, 48),
    "t3d_tiny": (3, 8, 40, 33), "densenet3d_121": (3, 8, 40, 33),
    "resnet3d_18": (3, 8, 40, 33), "fclstm": (3, 3, 64, 64), "p3d_63": (3, 16, 40, 33),
    "p3d_resnet50": (3, 8, 40, 33), "r2plus1d_18": (3, 8, 40, 33), "i3d_inception": (3, 8, 40, 33),
    "inception3d": (3, 8, 40, 33), "slowfast_r50_8x8": (3, 8, 40, 33), "resnext3d_101": (3, 16, 40, 33),
    "timesformer_small": (3, 2, 32, 32), "hiera_base": (3, 4, 64, 32), "vjepa2_large_16": (3, 4, 32, 48),
    "vjepa21_base_16": (3, 4, 32, 48), "lrcn": (3, 3, 65, 40), "multi_lstm": (3, 16, 65, 40),
    "late_temporal": (3, 8, 40, 33), "i3d_bert": (3, 8, 40, 33), "attention_lstm": (3, 3, 65, 40),
    "visual_attention": (3, 2, 224, 224), "snippets_lstm": (3, 11, 65, 40), "frame_average": (3, 3, 65, 40),
    "efficientnet_lite0_tam": (3, 8, 65, 40),
}  # fmt: skip
SMALL = ("c3d", "convlstm", "fclstm", "gru_rcn")  # a second or two; the others are for a whole evening
SHORT = {"vjepa2_large_16": {"depth": 2}}


class Graphs(list[Any]):
    """A backend that runs what it is given as it is, and keeps count."""

    def __call__(self, graph: Any, _: object) -> Any:
        self.append(graph)
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    torch._dynamo.reset()
    counters.clear()
    backend = Graphs()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    return backend


def classifier(name: str, **options: object) -> Classifier:
    torch.manual_seed(0)
    return Classifier(
        create_model(name, num_classes=3, **options), label_smoothing=0.0, multi_label=False
    ).train()


def losses(module: nn.Module, shape: tuple[int, ...], graphs: Graphs | None = None) -> list[float]:
    """Of six steps of SGD; asserts that nothing is compiled after the third."""
    inputs = {
        "clips": torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)),
        "labels": torch.tensor([0, 2]),
    }
    found = []
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    for step in range(6):
        torch.manual_seed(step)  # dropout
        loss = module(inputs)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
        if graphs is not None and step + 1 == STEPS_UNTIL_WARM:
            warm = len(graphs)
    if graphs is not None:
        assert len(graphs) == warm, "compiled anew after step 3"
        assert not counters["graph_break"], dict(counters["graph_break"])
    return found


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_table_has_every_family() -> None:
    """A folder of models/ with 3D networks, and a file of it, each has a network here."""
    rooms = {type(create_on_meta(name)).__module__ for name in FAMILIES}
    every = {type(create_on_meta(name)).__module__ for name in list_models(dims="3d")}
    assert rooms == every


def create_on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, num_classes=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SMALL else pytest.mark.exhaustive) for name in FAMILIES],
)
def test_every_family_is_one_graph(name: str, graphs: Graphs) -> None:
    """On the meta device: the whole network with its loss, forward and backward, without a break."""
    with torch.device("meta"):
        module = classifier(name, **SHORT.get(name, {}))
        inputs = {"clips": torch.empty(2, *FAMILIES[name]), "labels": torch.zeros(2, dtype=torch.int64)}
    compile_module(module)
    for _ in range(STEPS_UNTIL_WARM + 1):
        module(inputs)["loss"].backward()
    assert len(graphs) == 1
    assert not counters["graph_break"], dict(counters["graph_break"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["video_vit_tiny_8", "t3d_tiny"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_compiled_blocks_train_as_before(name: str, share: float, graphs: Graphs) -> None:
    plain, module = classifier(name), classifier(name)
    expected = losses(plain, FAMILIES[name])
    recompute_blocks(module.network, share)
    keys = module.state_dict().keys()
    compile_blocks(module.network)
    assert losses(module, FAMILIES[name], graphs) == expected
    assert graphs
    assert module.state_dict().keys() == keys == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, module.state_dict()[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("selective", [False, True])
def test_a_compiled_module_recomputes_blocks(selective: bool, graphs: Graphs) -> None:
    name = "video_vit_tiny_8"
    module = classifier(name)
    recompute_blocks(module.network, 1.0, selective=selective)
    compile_module(module)
    assert losses(module, FAMILIES[name], graphs) == losses(classifier(name), FAMILIES[name])
    assert len(graphs) == 1


def test_what_cannot_be_compiled_is_refused(graphs: Graphs) -> None:
    module = classifier("t3d_tiny")
    recompute_blocks(module.network, 0.2)
    with pytest.raises(ConfigError, match="BatchNorm are recomputed") as caught:
        compile_module(module)
    assert caught.value.key == "engine.compile"
    recompute_blocks(module.network, 0.2, selective=True)
    with pytest.raises(ConfigError, match="chooses among operations") as caught:
        compile_blocks(module.network)
    assert caught.value.key == "engine.recompute"


def test_a_network_of_many_unlike_blocks_is_compiled_whole(graphs: Graphs) -> None:
    """Torch leaves a function alone after eight forms of it, and blocks of one class are forms of one function."""

    class Block(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    class Net(VideoNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(3 + i, 4 + i) for i in range(20))

        def checkpoint_blocks(self) -> list[str]:
            return [f"blocks.{i}" for i in range(20)]

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    network = Net()
    compile_blocks(network)
    network(torch.ones(2, 3)).sum().backward()
    assert len(graphs) == 20


def test_zero_stage_3_is_refused() -> None:
    assert EngineConfig(compile="blocks", zero_stage=2).compile == "blocks"
    with pytest.raises(ValidationError, match="compile: is cut to pieces at ZeRO stage 3"):
        EngineConfig(compile="blocks", zero_stage=3)


@pytest.mark.parametrize(("written", "read"), [(False, "off"), (True, "model"), ("blocks", "blocks")])
def test_how_the_key_is_read(written: object, read: str) -> None:
    """YAML reads a bare ``off`` as false."""
    assert EngineConfig.model_validate({"compile": written}).compile == read


@pytest.mark.slow
@pytest.mark.parametrize("case", [(0, "model"), (2, "blocks")])
def test_runs_keep_their_losses_average_and_checkpoints(
    worker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: Graphs, case: tuple[int, str]
) -> None:
    stage, how = case

    class Real(worker.Task):  # type: ignore[misc, name-defined]
        def __init__(self, poison_step: int | None = None, *, run: Any = None) -> None:
            super().__init__()
            self.module = classifier("video_vit_tiny_8")

        def inputs(self, batch: Any, *, training: bool, step: int) -> dict[str, Tensor]:
            inputs = super().inputs(batch, training=training, step=step)
            inputs["clips"] = nn.functional.interpolate(inputs["clips"], size=(4, 32, 32))
            return dict(inputs)

    monkeypatch.setattr(worker, "Task", Real)

    def run(place: str, how: str) -> dict[str, Any]:
        changes = {"engine__compile": how, "engine__zero_stage": stage, "optim__average_decay": 0.9}
        found: dict[str, Any] = worker.train(worker.run_config(str(tmp_path / place), **changes))
        return found

    plain = run("plain", "off")
    assert not graphs
    assert run("compiled", how) == plain
    assert graphs
    names = [
        sorted(
            path.relative_to(tmp_path / place).as_posix()
            for path in (tmp_path / place).rglob("*.safetensors")
        )
        for place in ("plain", "compiled")
    ]
    assert names[0] == names[1]
    assert fnmatch.filter(names[0], "*parameters*")
