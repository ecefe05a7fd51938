"""The host does not wait for the device inside a step: no value is read from a tensor, and a GPU would say so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cliplift.configs.data import AugmentConfig
from cliplift.models.protocol import InputSpec
from cliplift.pipelines.data.augment import DeviceAugment, mix_clips
from cliplift.pipelines.data.batch import NUM_DRAWS, ClipBatch
from cliplift.pipelines.distributed.collectives import start
from cliplift.pipelines.engine import loop
from cliplift.pipelines.engine.optim import Lamb, Sgd, leave_out
from cliplift.pipelines.runs.tracking import Tracker

WORKER = Path(__file__).with_name("training_worker.py")
READS = ("item", "tolist", "cpu", "__float__", "__int__", "__bool__", "__index__")
OURS = ("configs", "models", "sharding", "pipelines", "launch")


@contextmanager
def reads_of_ours(repository: Path) -> Iterator[Counter[str]]:
    """Counts values that our code, not torch's or DeepSpeed's, reads from tensors."""
    found: Counter[str] = Counter()
    before = {name: getattr(Tensor, name) for name in READS}

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Tensor, *args: Any, **words: Any) -> Any:
            file = Path(sys._getframe(1).f_code.co_filename).resolve()
            if file.is_relative_to(repository) and file.relative_to(repository).parts[0] in OURS:
                found[f"{file.relative_to(repository)}: {name}"] += 1
            return method(self, *args, **words)

        return call

    for name, method in before.items():
        setattr(Tensor, name, counting(name, method))
    try:
        yield found
    finally:
        for name, method in before.items():
            setattr(Tensor, name, method)


@pytest.fixture(scope="module")
def worker(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    return load_module(WORKER)


def fitting(worker: ModuleType, folder: Path, **changes: Any) -> Any:
    run = worker.run_config(str(folder), track__every_steps=1, **changes)
    topology = start(run.engine)
    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(run, stage="pretrain", folder=folder, topology=topology)
    loader = worker.FixedLoader(run, topology)
    return loop.Trainer(worker.Task(), run, loader, topology, tracker)


def test_the_counter_sees_a_read(repository: Path, tmp_path: Path) -> None:
    code = compile("value = float(x)", str(repository / "pipelines" / "made_up.py"), "exec")
    with reads_of_ours(repository) as found:
        exec(code, {"x": torch.tensor(1.0)})
    assert found == {"pipelines/made_up.py: __float__": 1}


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_no_value_is_read_inside_a_step(
    worker: ModuleType, repository: Path, tmp_path: Path, stage: int, optimizer: str
) -> None:
    fit = fitting(worker, tmp_path, engine={
        "device": "cpu", "global_batch": 8, "micro_batch": 4, "zero_stage": stage, "loss_spike_factor": 3.0,
    }, optim={"name": optimizer, "lr": 0.01, "clip_grad_norm": 1.0, "average_decay": 0.9})  # fmt: skip
    fit._train_step()
    with reads_of_ours(repository) as found:
        fit._train_step()
        fit._train_step()  # reads of the step before
    assert found == {}
    assert fit.state.step == 3
    fit._settle()
    assert len(worker.losses(tmp_path)) == 3, "every step was logged"


def test_augmentation_and_mixing_read_nothing_from_the_clips(repository: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(4)
    batch = ClipBatch(
        clips=torch.randint(0, 256, (4, 2, 16, 16, 3), dtype=torch.uint8, generator=generator),
        labels=index,
        sample_index=index,
        video_index=index,
        views=index,
        draws=torch.rand(4, NUM_DRAWS, generator=generator),
        epochs=torch.zeros_like(index),
        positions=index,
    )
    augment = AugmentConfig.model_validate({
        "flip": True, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "grayscale_probability": 0.3,
        "erase_probability": 0.5, "rand_augment_ops": 4, "mixup_alpha": 0.8, "cutmix_alpha": 1.0,
    })  # fmt: skip
    views = DeviceAugment(augment, InputSpec(mean=(0.4,) * 3, std=(0.2,) * 3), training=True)
    with reads_of_ours(repository) as found:
        clips = views(batch.to(torch.device("cpu")))
        mix_clips(clips, batch.labels, num_classes=5, augment=augment, draws=batch.draws)
    assert found == {}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("make", [
    lambda p, fused: torch.optim.AdamW(p, lr=0.1, fused=True),
    lambda p, fused: Sgd(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, fused=fused),
    lambda p, fused: Lamb([{"params": p}], lr=0.1, weight_decay=0.1),
], ids=["adamw", "sgd", "lamb"])  # fmt: skip
def test_a_bad_update_is_left_out_and_the_next_is_as_if_it_had_not_been(
    make: Callable[[list[Tensor], bool], Any], device: str
) -> None:
    def trained(gradients: list[float], bad: list[int]) -> Tensor:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 8, device=device))
        optimizer = make([weight], device == "cuda")
        for number, gradient in enumerate(gradients):
            weight.grad = torch.full_like(weight, gradient)
            leave_out(optimizer, torch.tensor(number in bad, device=device))
            optimizer.step()
        return weight.detach().cpu()

    nan = float("nan")
    plain = trained([1.0, 0.5, 2.0], [])
    torch.testing.assert_close(trained([nan, 1.0, nan, 0.5, nan, 2.0], [0, 2, 4]), plain, rtol=0, atol=0)
    assert not torch.equal(plain, torch.linspace(-1, 1, 8)), "good updates do change the weights"


@pytest.mark.gpu
@pytest.mark.parametrize(("stage", "precision"), [(0, "tf32"), (0, "autocast_bf16"), (1, "bf16")])
def test_a_gpu_is_not_waited_for_outside_deepspeeds_calls(
    repository: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    words = [
        sys.executable,
        str(Path(__file__).with_name("gpu_step.py")),
        str(tmp_path),
        str(stage),
        precision,
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "steps done: 4" in done.stdout
