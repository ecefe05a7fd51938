"""What the engine asks of a stage, what stages of one network share, and what the engine gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Generic, Protocol, TypedDict, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cliplift.configs.data import DataConfig
from cliplift.configs.runs import ClassificationRun
from cliplift.configs.training import EngineConfig, TrainingRun
from cliplift.models.factory import save_pretrained
from cliplift.models.protocol import InputSpec, VideoNetwork
from cliplift.models.registry import model_entry
from cliplift.pipelines.compute.recompute import recompute_blocks
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.engine.optim import network_with_blocks
from cliplift.pipelines.runs.folder import RunFolder
from cliplift.pipelines.runs.tracking import ClipTable

OF_CLIP = "_of_clip"  # ends the names of a module's outputs that are values of clips
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precisions in which the weights themselves are cast


class TrainingEngine(Protocol):
    """What is used of a DeepSpeed engine, which has no types of its own, outside the checkpoints."""

    module: nn.Module
    optimizer: Optimizer
    skipped_steps: int

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def train(self) -> object: ...
    def eval(self) -> object: ...
    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> object: ...
    def zero_optimization_stage(self) -> int: ...
    def get_global_grad_norm(self) -> Tensor | float | None: ...
    def destroy(self) -> None: ...


class TrainingTask(Protocol):
    """What the training loop asks of a stage: what is trained, how a batch becomes its input, how it is judged.

    ``module(inputs)`` returns a dictionary with ``loss``, the mean over the micro-batch, and scalar metrics. Beside a
    scalar ``X`` it may return ``X_of_clip`` (B,), float32: what is logged as ``X`` is then the mean over the clips of
    all micro-batches, ranks and steps, summed in float64, where sums of float32 numbers of like size are exact. So the
    logged number does not depend on how the clips are divided.
    ``evaluate`` is called on all ranks; higher is better for ``best_metric``. ``flops_per_clip`` are the operations of
    a training step per clip, None where unknown. ``clip_table`` gives column names and rows (an mp4's bytes become
    a playable cell) about the last evaluation, None where there is nothing to show.
    """

    clip_frames: int

    @property
    def best_metric(self) -> str: ...

    @property
    def module(self) -> nn.Module: ...

    def inputs(self, batch: ClipBatch, *, training: bool, step: int) -> dict[str, Tensor]: ...

    def evaluate(self, *, topology: Topology) -> dict[str, float]: ...

    @property
    def flops_per_clip(self) -> float | None: ...

    def clip_table(self, rows: int) -> ClipTable | None: ...


@dataclass(frozen=True, kw_only=True)
class MovingTeacher:
    """A frozen part of the module that follows a trained one: teacher = m * teacher + (1 - m) * student after a step.

    Attributes:
        student, teacher: how the names of their parameters in the module begin; the rest of the names is the same.
        momentum, final_momentum: m of the first step, and at the end of a run ``stretch`` times as long; linear.
    """

    student: str
    teacher: str
    momentum: float
    final_momentum: float
    stretch: float = 1.0

    def at(self, step: int, *, total_steps: int) -> float:
        """m after the ``step``-th update (from 0), a function of the step alone: a resumed run goes on alike."""
        return self.momentum + step * (self.final_momentum - self.momentum) / (total_steps * self.stretch)


@runtime_checkable
class HasTeacher(Protocol):
    """A stage whose module holds such a teacher; the training loop moves it."""

    @property
    def moving_teacher(self) -> MovingTeacher: ...


@runtime_checkable
class RaisesAlarm(Protocol):
    """A stage that watches the logged numbers."""

    def alarm(self, numbers: Mapping[str, float | None]) -> str | None:
        """What there is to say of them (``train/...`` or ``eval/...``), on the main rank; None is nothing."""
        ...


@dataclass(frozen=True, kw_only=True)
class StageModule:
    """What a stage trains. ``frozen`` lies beside it on the device and is not the optimizer's: a teacher."""

    module: nn.Module  # maps a batch's inputs to a dictionary with ``loss``
    network: VideoNetwork  # the part of it whose weights the run leaves behind
    frozen: nn.Module | None = None


class ModelCard(TypedDict, total=False):
    """What is written beside weights: the clips they were trained on, and what their outputs mean."""

    stage: str
    run: str
    sampling: Mapping[str, object]  # a SamplingConfig
    crop_pixels: int
    resize_short_side_pixels: int | None
    normalize_brightness: bool
    classes: list[str]
    task: str
    objective: str
    forecast: Mapping[str, object]  # a ForecastConfig
    masked: Mapping[str, object]  # a MaskedConfig
    latent: Mapping[str, object]  # a LatentConfig
    distil: Mapping[str, object]  # a DistilConfig


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """The trained network without loss and projection heads, and what is written beside its weights.

    With ``weights`` these are written, one after the other, by the names of the network, which may then be on the meta
    device; without, the network's own are.
    """

    network: VideoNetwork
    options: Mapping[str, object]  # what the registry's builder is called with
    card: ModelCard
    weights: Mapping[str, Tensor] | None = None


class Stage(TrainingTask, Protocol):
    """One training objective, from its module to the weights it leaves; one class each in ``pipelines/stages``.

    A stage is constructed from ``(run, classes=..., topology=...)`` without reading or allocating anything, so that
    training, the memory plan, step timing and ``cliplift check`` all ask the same object. ``module`` builds on first
    use, with starting weights.

    Attributes:
        classes: class names of the data that the network predicts; empty where it predicts none.
        needs_labels: every training clip must have a label.
    """

    classes: tuple[str, ...]

    @property
    def needs_labels(self) -> bool: ...

    @property
    def needs_videos(self) -> int:
        """How many source videos the training data must hold at least."""
        ...

    def networks(self) -> Mapping[str, str]:
        """Config key -> registry name of every model that is built."""
        ...

    def splits(self) -> Mapping[str, str]:
        """Config key -> split of every split that will be evaluated."""
        ...

    def build_module(self, *, weights: bool) -> StageModule:
        """The module with its frozen parts. ``weights=False`` reads no file: under ``torch.device("meta")``
        nothing is allocated.

        Raises:
            ConfigError: the run cannot work as configured; the error names the key.
        """
        ...

    def example_inputs(self, built: StageModule, *, micro_batch: int, world_size: int) -> dict[str, Tensor]:
        """A micro-batch of zeros with the shapes and types that ``inputs`` makes of B = ``micro_batch`` clips."""
        ...

    def finish(
        self, metrics: Mapping[str, float], *, topology: Topology, folder: RunFolder
    ) -> dict[str, float]:
        """The run's final metrics, given those of the last evaluation: a test split, a verdict. On all ranks."""
        ...

    def trained_network(self, weights: Mapping[str, Tensor]) -> SavedModel:
        """The network to save, from the module's whole fp32 tensors by name, which are read when they are asked for."""
        ...


Run = TypeVar("Run", bound=ClassificationRun)


class NetworkStage(Generic[Run]):
    """What the stages share that train one network of the registry: its name, its splits, and its module.

    A subclass defines ``build_module`` and whatever else :class:`Stage` asks for.
    """

    def __init__(self, run: Run, *, classes: Sequence[str], topology: Topology) -> None:
        self.run, self.topology = run, topology
        self.classes = self.predicted_classes(classes)
        self.clip_frames = run.data.sampling.frames

    def predicted_classes(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Of the data's classes, those that the network predicts; by default labels are not used."""
        return ()

    def networks(self) -> dict[str, str]:
        return {"model.name": self.run.model.name}

    def splits(self) -> dict[str, str]:
        return {} if self.run.data.val_share else {"data.val_split": self.run.data.val_split}

    def build_module(self, *, weights: bool) -> StageModule:
        raise NotImplementedError

    @cached_property
    def built(self) -> StageModule:
        """The module with its starting weights."""
        return self.build_module(weights=True)

    @property
    def module(self) -> nn.Module:
        return self.built.module

    @cached_property
    def views(self) -> dict[bool, DeviceAugment]:
        """What turns a batch into the network's input: for training (True), and for evaluation."""
        spec = self.built.network.input_spec
        return {
            training: DeviceAugment(self.run.data.augment, spec, training=training)
            for training in (True, False)
        }

    def finish(
        self, metrics: Mapping[str, float], *, topology: Topology, folder: RunFolder
    ) -> dict[str, float]:
        return dict(metrics)


def example_clips(run: TrainingRun, data: DataConfig, model: str, *, micro_batch: int) -> Tensor:
    """Zeros (B, C, T, H, W) as the network gets them, (B, C, H, W) for a 2D model; flow has C = 2, else 3."""
    side, channels = data.crop_pixels, 2 if data.modality == "flow" else 3
    dtype = HALF.get(run.engine.precision, torch.float32)
    clips = torch.zeros(micro_batch, channels, data.sampling.frames, side, side, dtype=dtype)
    if run.engine.channels_last:
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
    return clips[:, :, 0] if model_entry(model).dims == "2d" else clips


def as_trained(built: StageModule, run: TrainingRun) -> nn.Module:
    """The module as the engine prepares it, to be measured without one: weights cast, blocks recomputed."""
    dtype = HALF.get(run.engine.precision)
    module = built.module if dtype is None else built.module.to(dtype)
    recompute_as_configured(module, run.engine)
    return module.train()


def recompute_as_configured(module: nn.Module, engine: EngineConfig) -> None:
    """Recompute the blocks of the trained network in a stage's module that the config names.

    Raises:
        ConfigError: it names no blocks.
    """
    if engine.checkpoint_blocks_share:
        _, network = network_with_blocks(module, key="engine.checkpoint_blocks_share")
        recompute_blocks(network, engine.checkpoint_blocks_share, selective=engine.recompute == "selective")


def network_weights(weights: Mapping[str, Tensor], *, prefix: str) -> Mapping[str, Tensor]:
    """The tensors below ``prefix``, by their names without it; each is read when it is asked for."""
    return _Below(weights, prefix)


class _Below(Mapping[str, Tensor]):
    def __init__(self, weights: Mapping[str, Tensor], prefix: str) -> None:
        self._weights, self._prefix = weights, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._weights if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def data_card(run: TrainingRun, data: DataConfig) -> ModelCard:
    """What whoever loads the weights has to know of the clips they were trained on."""
    return {
        "stage": run.stage,
        "run": run.name,
        "sampling": data.sampling.model_dump(mode="json"),
        "crop_pixels": data.crop_pixels,
        "resize_short_side_pixels": data.resize_short_side_pixels,
        "normalize_brightness": data.augment.normalize_brightness,
    }


def trained_input(spec: InputSpec, data: DataConfig) -> InputSpec:
    """A network's input as it was trained, in place of its architecture's: crop, and the stride where there is one.

    Segments have no stride; ``frames`` and the normalisation are the network's own already.
    """
    sampling = data.sampling
    stride = sampling.stride if sampling.mode == "dense" else spec.frame_stride
    crop = data.crop_pixels
    return dataclasses.replace(spec, frame_stride=stride, crop_height=crop, crop_width=crop)


def save_trained(saved: SavedModel, folder: Path, *, run: TrainingRun, **card: object) -> None:
    """Write the weights that a run leaves, and beside them the clips that they were trained on.

    Args:
        saved: the network and what is written beside it.
        folder: made if it is not there.
        run: whose data it was trained on.
        card: further facts.
    """
    saved.network.input_spec = trained_input(saved.network.input_spec, run.data)
    save_pretrained(
        saved.network,
        folder,
        name=run.model.name,
        options=dict(saved.options),
        extra=dict(saved.card) | card,
        weights=saved.weights,
    )


@dataclass
class FitResult:
    """The end of a run; ``engine`` is alive until :meth:`release`, so that it can still be evaluated.

    ``weights`` are the trained parameters (fp32) and persistent buffers of the module by name. They are read one by one
    from the slices of a checkpoint when they are asked for; an interrupted run has none.
    """

    steps: int
    metrics: dict[str, float]
    interrupted: bool
    seconds: float
    clips_per_second: float
    skipped_steps: int
    weights: Mapping[str, Tensor] = field(repr=False, default_factory=dict)
    engine: TrainingEngine | None = field(repr=False, default=None)

    def release(self) -> None:
        """Free the engine and its memory."""
        if self.engine is not None:
            self.engine.destroy()
            self.engine = None
