"""What the plan says before a run against what real processes use: two ranks, real DeepSpeed, resident memory."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.models import create_model
from cliplift.pipelines.cost.activation_memory import make_fake, measure_activations
from cliplift.pipelines.cost.memory_plan import parts, plan_memory
from cliplift.pipelines.engine.task import as_trained
from cliplift.pipelines.stages.run import stage_of

WORKER = Path(__file__).with_name("memory_worker.py")
CLASSES = 400
# A 3D residual net, a dense net (many small maps) and a transformer; SGD and AdamW.
MODELS = {
    "resnet3d_18": ["data.sampling.frames=16", "data.crop_pixels=112", "data.resize_short_side_pixels=128",
                    "engine.global_batch=8"],
    "t3d_121": ["data.sampling.frames=8", "data.crop_pixels=112", "data.resize_short_side_pixels=128",
                "engine.global_batch=4"],
    "timesformer_small": ["data.sampling.frames=8", "data.crop_pixels=224", "data.resize_short_side_pixels=224",
                          "engine.global_batch=4", "optim.name=adamw", "optim.lr=0.001",
                          "engine.channels_last=false"],
}  # fmt: skip


def run_of(repository: Path, *words: str) -> Any:
    return load_run(repository / "configs" / "pretrain" / "demo.yaml", RUNS, words).run


def off_by(repository: Path, name: str, words: list[str]) -> tuple[float, dict[str, float]]:
    """How far the plan is above what two ranks use, as a share of that; and the plan's parts, MiB."""
    plan, _ = plan_memory(run_of(repository, *words), classes=CLASSES, world_size=2, on_gpu=False)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # Freed blocks go back to the system at once, so that what is resident is what is alive.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*launch, str(WORKER), json.dumps(words), str(CLASSES)],
        env=os.environ | malloc | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    grown = json.loads(done.stdout.strip().splitlines()[-1])["grown_bytes"]
    off = plan.total / grown - 1
    print(f"{name}: planned {plan.total / 2**20:.0f} MiB, used {grown / 2**20:.0f} ({off:+.1%})")
    return off, {part: size / 2**20 for part, size in parts(plan)}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "zero_stage"),
    [
        pytest.param(name, stage, marks=() if (name, stage) == ("resnet3d_18", 1) else pytest.mark.exhaustive)
        for name in MODELS
        for stage in (1, 3)
    ],
)
def test_the_plan_is_within_15_percent_of_resident_memory(
    repository: Path, name: str, zero_stage: int
) -> None:
    words = [f"model.name={name}", *MODELS[name], f"engine.zero_stage={zero_stage}"]
    off, planned = off_by(repository, f"{name} ZeRO {zero_stage}", words)
    assert abs(off) <= 0.15, planned


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("more", [[], ["masked.decoder_mask=running_cell"]], ids=["tube", "dual"])
def test_the_plan_of_masked_pretraining_counts_the_tokens_that_are_computed(
    repository: Path, more: list[str]
) -> None:
    """ViT-S/16 on 16 x 224 x 224: 160 of 1568 tokens in the encoder, all or half of them in the decoder."""
    words = [
        "objective=masked", "label_smoothing=0", "model.name=video_vit_small_16", "data.sampling.frames=16",
        "data.crop_pixels=224", "data.resize_short_side_pixels=224", "engine.global_batch=16", "engine.zero_stage=1",
        "engine.channels_last=false", "optim.name=adamw", "optim.lr=0.001", *more,
    ]  # fmt: skip
    off, planned = off_by(repository, " ".join(["masked", *more]), words)
    assert abs(off) <= 0.05, planned


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_plan_of_latent_prediction_counts_context_predictor_and_teacher(repository: Path) -> None:
    """ViT-S's width on 16 x 128 x 128: two masks of 128 and 32 of 512 tokens, the teacher on all, forward only."""
    small = {"width": 384, "depth": 6, "heads": 6, "hidden": 1536}
    words = [
        "objective=latent", "label_smoothing=0", "data.sampling.frames=16", "data.crop_pixels=128",
        "data.resize_short_side_pixels=128", f"model={json.dumps({'name': 'vjepa2_large_16', 'options': small})}",
        "latent.predictor_width=192", "latent.predictor_depth=4", "latent.predictor_heads=6",
        "engine.global_batch=16", "engine.zero_stage=1", "engine.channels_last=false", "optim.name=adamw",
        "optim.lr=0.001",
    ]  # fmt: skip
    off, planned = off_by(repository, "latent", words)
    assert abs(off) <= 0.05, planned


def test_saved_activations_are_counted_as_by_hand() -> None:
    """Two layers whose saved tensors can be written down: the input and the ReLU's output, each once."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(10, 20, bias=False), nn.Linear(20, 5, bias=False)

        def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"loss": self.second(torch.relu(self.first(inputs["clips"]))).sum()}

    with torch.device("meta"):
        module: nn.Module = Small()
    with FakeTensorMode():
        make_fake(module)
        measured = measure_activations(module, {"clips": torch.zeros(8, 10)}, autocast=False)
    assert measured.input_bytes == 8 * 10 * 4
    # relu(h) (8, 20) is saved by the ReLU and by the second layer: one storage.
    assert measured.saved_bytes == 8 * 20 * 4
    # At the end only the gradients (10*20 + 20*5) and the loss are alive.
    activations, gradients = measured.timeline[-1]
    assert gradients <= (200 + 100) * 4
    assert max(g for _, g in measured.timeline) >= 100 * 4
    assert activations < 8 * 20 * 4 * 3


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["everything", "selective"])
@pytest.mark.parametrize("name", MODELS)
def test_the_plan_of_recomputed_blocks_is_within_10_percent(repository: Path, name: str, how: str) -> None:
    words = [f"model.name={name}", *MODELS[name], "engine.zero_stage=1", "engine.checkpoint_blocks_share=1"]
    off, planned = off_by(repository, f"{name} {how}", [*words, f"engine.recompute={how}"])
    assert abs(off) <= 0.10, planned


def test_selective_recomputation_lies_between(repository: Path) -> None:
    """A transformer: the outputs of its products and of attention are kept, 10 of the some 20 widths of a token."""
    words = ["model.name=video_vit_tiny_8", "engine.zero_stage=1", "engine.channels_last=false"]
    share = "engine.checkpoint_blocks_share=1"
    plain, whole, chosen = (
        plan_memory(run_of(repository, *words, *more), classes=10, world_size=1, on_gpu=False)[0].backward
        for more in ([], [share], [share, "engine.recompute=selective"])
    )
    assert whole < chosen < plain


def test_recomputation_takes_less(repository: Path) -> None:
    words = ["model.name=t3d_tiny", "engine.zero_stage=1"]
    plain, sizes = plan_memory(run_of(repository, *words), classes=CLASSES, world_size=1, on_gpu=False)
    words.append("engine.checkpoint_blocks_share=1")
    saved, _ = plan_memory(run_of(repository, *words), classes=CLASSES, world_size=1, on_gpu=False)
    assert saved.saved_activations < 0.5 * plain.saved_activations
    assert saved.backward < plain.backward
    assert (saved.weights, saved.masters, saved.optimizer) == (plain.weights, plain.masters, plain.optimizer)
    assert sizes.trained == sizes.parameters


def test_states_follow_the_zero_stage(repository: Path) -> None:
    """ZeRO's table (arXiv:1910.02054, figure 1) for fp32 AdamW on 4 ranks, with DeepSpeed's fp32 masters."""

    def plan(*words: str) -> Any:
        run = run_of(repository, "optim.name=adamw", "engine.global_batch=16", *words)
        return plan_memory(run, classes=10, world_size=4, on_gpu=True)

    (zero0, sizes), (zero1, _), (zero3, _) = (plan(f"engine.zero_stage={stage}") for stage in (0, 1, 3))
    P = sizes.parameters
    own = -(-P // 4)
    assert (zero0.masters, zero0.optimizer) == (0, 8 * P)
    assert (zero1.masters, zero1.optimizer) == (4 * own, 8 * own)
    assert zero1.weights == zero0.weights == 4 * P + sizes.buffer_bytes
    assert zero3.weights == 4 * own + sizes.buffer_bytes
    assert zero3.gradient_buffers == 4 * own + 4 * 500_000_000
    averaged, _ = plan("engine.zero_stage=1", "optim.average_decay=0.999")
    assert averaged.optimizer == zero1.optimizer + 4 * own


@pytest.mark.slow
def test_half_precision_halves_weights_and_not_masters(repository: Path) -> None:
    words = ["model.name=timesformer_small", "data.crop_pixels=224", "data.resize_short_side_pixels=224",
             "engine.global_batch=2", "engine.zero_stage=2", "data.sampling.frames=2"]  # fmt: skip
    full, sizes = plan_memory(run_of(repository, *words), classes=10, world_size=2, on_gpu=True)
    words.append("engine.precision=bf16")
    half, _ = plan_memory(run_of(repository, *words), classes=10, world_size=2, on_gpu=True)
    assert full.weights == 4 * sizes.parameters + sizes.buffer_bytes
    assert 2 * sizes.parameters <= half.weights <= 2 * sizes.parameters + sizes.buffer_bytes
    assert half.masters == full.masters == 4 * -(-sizes.trained // 2)
    assert half.saved_activations < 0.7 * full.saved_activations


def test_a_bucket_is_memory_on_a_gpu(repository: Path) -> None:
    words = ["engine.global_batch=16", "engine.zero_stage=2"]
    gpu, _ = plan_memory(run_of(repository, *words), classes=10, world_size=4, on_gpu=True)
    cpu, _ = plan_memory(run_of(repository, *words), classes=10, world_size=4, on_gpu=False)
    assert gpu.total - cpu.total > 1.8e9, "500 million values of 4 bytes"
    words.append("engine.deepspeed={zero_optimization: {reduce_bucket_size: 1000000}}")
    small, _ = plan_memory(run_of(repository, *words), classes=10, world_size=4, on_gpu=True)
    assert gpu.total - small.total == 4 * (500_000_000 - 1_000_000)


def test_the_teacher_counts(repository: Path) -> None:
    words = ["teacher.name=resnet_50", "model.name=t3d_tiny"]
    transfer = load_run(repository / "configs" / "transfer" / "demo.yaml", RUNS, words).run
    plan, sizes = plan_memory(transfer, classes=0, world_size=1, on_gpu=False)
    teacher = 23_508_032  # ResNet-50 without its classifier
    assert plan.weights >= 4 * (sizes.parameters + teacher)


def test_the_fake_module_is_the_real_one(repository: Path) -> None:
    """Real tensors through the same module take the shapes the fake ones took."""
    run = run_of(repository)
    stage = stage_of(run, classes=[str(k) for k in range(10)])
    built = stage.build_module(weights=False)
    inputs = stage.example_inputs(built, micro_batch=2, world_size=1)
    loss = as_trained(built, run)(inputs)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert inputs["clips"].shape == (2, 3, 8, 64, 64)


@pytest.mark.parametrize("patterns", [["layer*"], ["conv1*", "bn1*", "layer1*"]])
def test_frozen_parameters_are_not_counted_as_trained(repository: Path, patterns: list[str]) -> None:
    """Counted by name on the network itself."""
    words = ["model.name=resnet3d_18", f"model.frozen=[{','.join(patterns)}]"]
    _, sizes = plan_memory(run_of(repository, *words), classes=CLASSES, world_size=1, on_gpu=False)
    network = create_model("resnet3d_18", num_classes=CLASSES, in_frames=8)
    frozen = [
        p.numel()
        for name, p in network.named_parameters()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]
    whole = sum(p.numel() for p in network.parameters())
    assert frozen
    assert (sizes.parameters, sizes.trained) == (whole, whole - sum(frozen))


def test_frozen_batchnorm_is_not_counted_as_trained(repository: Path) -> None:
    words = ["model.name=resnet3d_18", "frozen_batchnorm=true"]
    run = load_run(repository / "configs" / "finetune" / "demo.yaml", RUNS, words).run
    _, sizes = plan_memory(run, classes=CLASSES, world_size=1, on_gpu=False)
    network = create_model("resnet3d_18", num_classes=CLASSES, in_frames=8)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    held = sum(p.numel() for m in norms for p in m.parameters())
    assert held
    assert sizes.trained == sizes.parameters - held


def test_a_flow_run_is_planned(repository: Path) -> None:
    """Optical flow has two channels."""
    words = [
        "model.name=r2plus1d_18",
        "model.options={in_channels: 2}",
        "data.modality=flow",
        *(f"data.augment.{name}=0" for name in ("brightness", "contrast", "saturation")),
    ]
    run = run_of(repository, *words)
    plan, _ = plan_memory(run, classes=CLASSES, world_size=1, on_gpu=False)
    assert plan.backward > 0
