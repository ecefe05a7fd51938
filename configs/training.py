"""How a model is trained: optimizer, schedule, engine, checkpoints, tracking. Shared by all training stages."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from cliplift.configs.data import DataConfig
from cliplift.configs.sections import ConfigError, Output, Section

Option = bool | int | float | str | None


class ModelConfig(Section):
    """Which network, by registry name."""

    name: str = Field(description="a name from `cliplift models`")
    options: dict[str, Option | list[Option]] = Field({}, description="architecture options of that model")
    pretrained: str | None = Field(
        None, description="weights to start from: export folder, .safetensors or .pt file, or a run folder"
    )
    frozen: tuple[str, ...] = Field((), description="shell patterns of parameter names that are not trained")


class OptimConfig(Section):
    """Optimizer and its parameter groups."""

    name: Literal["adamw", "sgd", "lamb"] = Field(
        "adamw", description="optimizer; sgd uses Nesterov momentum; lamb needs zero_stage 0"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    lr_reference_batch: int | None = Field(
        None, ge=1, description="scale lr by global_batch / this (linear rule); None uses lr as written"
    )
    weight_decay: float = Field(0.05, ge=0, description="decoupled for adamw and lamb, L2 for sgd")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd momentum")
    nesterov: bool = Field(True, description="Nesterov form of sgd momentum")
    betas: tuple[float, float] = Field((0.9, 0.999), description="adamw and lamb moment decay")
    eps: float = Field(1e-8, gt=0, description="adamw and lamb epsilon")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="lr factor per block from the head down; 1 is off"
    )
    decay_norm_and_bias: bool = Field(
        False, description="apply weight decay to normalisation and bias parameters too"
    )
    clip_grad_norm: float = Field(0.0, ge=0, description="gradient norm limit; 0 is off")
    average_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay per step of an exponential moving average (EMA) of the weights, which is then what is "
        "evaluated and saved as the result; 0 is off",
    )


class ScheduleConfig(Section):
    """Learning rate over optimizer steps. Exactly one of ``steps`` and ``epochs`` says how long the run is."""

    name: Literal["cosine", "step", "constant", "plateau", "warmup_constant_cooldown"] = Field(
        "cosine", description="shape of the schedule after warm-up"
    )
    steps: int | None = Field(None, ge=1, description="length of the run in optimizer steps")
    epochs: float | None = Field(None, gt=0, description="length of the run in passes over the data")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="linear warm-up, share of the run")
    first_lr_share: float = Field(0.0, ge=0, le=1, description="lr the warm-up rises from, share of the peak")
    final_lr_share: float = Field(
        0.0, ge=0, le=1, description="lr at the end of cosine or cooldown, share of the peak"
    )
    stretch: float = Field(
        1.0,
        ge=1,
        description="cosine (of lr and weight decay) and cooldown are laid out for a run this many times as long, "
        "whose end is not reached (V-JEPA: 1.25)",
    )
    final_weight_decay: float | None = Field(
        None,
        gt=0,
        description="weight decay goes from optim.weight_decay to this over the run, by a cosine; None is constant",
    )
    milestones: tuple[float, ...] = Field(
        (), description="step: points of the run (share, 0 to 1) where lr drops"
    )
    factor: float = Field(0.1, gt=0, lt=1, description="step and plateau: lr is multiplied by this")
    patience_evaluations: int = Field(
        5, ge=1, description="plateau: evaluations without improvement before a drop"
    )
    cooldown_share: float = Field(
        0.2, ge=0, lt=1, description="warmup_constant_cooldown: linear cooldown, share of the run"
    )

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                "give exactly one of steps and epochs",
                key="steps",
                value=self.steps,
                hint=f"epochs is {self.epochs}",
            )
        return self


class EngineConfig(Section):
    """Batch, precision and DeepSpeed. ``global_batch`` is per optimizer step over all ranks."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes CUDA where a GPU is present"
    )
    global_batch: int = Field(32, ge=1, description="clips per optimizer step over all ranks")
    micro_batch: int | None = Field(
        None, ge=1, description="clips per forward pass and rank; None fits global_batch in one"
    )
    precision: Literal["fp32", "tf32", "autocast_bf16", "bf16", "fp16"] = Field(
        "fp32",
        description="tf32 keeps fp32 tensors and multiplies them with 10 bits of fraction on GPUs (on CPUs it is "
        "fp32); autocast_bf16 keeps fp32 weights and BatchNorm (3D convolutions); bf16 and fp16 cast weights",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="neighbouring ranks that share each clip, a run of its tokens each (supervised or masked video "
        "ViTs); divides the ranks and the network's heads; 1 is off",
    )
    checkpoint_blocks_share: float = Field(
        0.0, ge=0, le=1, description="share of blocks whose activations are recomputed"
    )
    recompute: Literal["everything", "selective"] = Field(
        "everything",
        description="what the backward pass computes again of those blocks: everything, or (selective) all but matrix "
        "products, convolutions and attention, whose outputs are kept",
    )
    compile: Literal["off", "blocks", "model"] = Field(
        "off",
        description="torch.compile: each block of the network by itself, which takes the shortest to compile, or the "
        "network with its loss as one",
    )
    channels_last: bool = Field(False, description="channels_last_3d memory format")
    sync_batchnorm: bool = Field(False, description="convert BatchNorm to SyncBatchNorm (CUDA)")
    deterministic: bool | Literal["auto"] = Field(
        "auto",
        description="deterministic kernels where they exist; auto: on a CPU yes, on a GPU the fastest kernels found",
    )
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = Field(
        "none",
        description="what ZeRO keeps in host memory instead of the GPU's (CUDA; parameters need stage 3)",
    )
    on_bad_step: Literal["skip", "rewind", "stop"] = Field(
        "skip",
        description="a step with a NaN, infinite or spiking loss: leave its update out, go back to the last "
        "checkpoint and pass over the data since, or end the run",
    )
    loss_spike_factor: float | None = Field(
        None, gt=1, description="a loss above this times the median of the last steps is a spike; None is off"
    )
    loss_spike_window_steps: int = Field(50, ge=5, description="steps the median of the spike guard is over")
    max_bad_steps_in_row: int = Field(
        10, ge=1, description="stop after this many bad steps in a row, or this many rewinds"
    )
    hang_seconds: float | None = Field(
        None,
        gt=0,
        description="no step or evaluation batch for this long: write every thread's stack to OUTPUT/stacks and "
        "end the process; None is off",
    )
    collective_timeout_seconds: float = Field(
        1800.0, gt=0, description="a collective silent for longer ends the run, seconds"
    )
    deepspeed: dict[str, object] = Field(
        {}, description="raw DeepSpeed keys laid over the derived ones; contradictions are errors"
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _yaml_switch(cls, value: object) -> object:
        """YAML reads a bare ``off`` as false; true is what earlier versions called the whole model."""
        return {False: "off", True: "model"}[value] if isinstance(value, bool) else value

    @field_validator("deepspeed")
    @classmethod
    def _no_derived_keys(cls, raw: dict[str, object]) -> dict[str, object]:
        derived = {
            "train_batch_size": "global_batch",
            "train_micro_batch_size_per_gpu": "micro_batch",
            "gradient_accumulation_steps": "micro_batch",
            "gradient_clipping": "optim.clip_grad_norm",
            "optimizer": "optim.name",
            "scheduler": "schedule.name",
            "bf16": "precision",
            "fp16": "precision",
            "torch_autocast": "precision",
            "zero_force_ds_cpu_optimizer": "offload",
            "sequence_parallel_size": "sequence_parallel",
        }
        for key, ours in derived.items():
            if key in raw:
                raise ConfigError(
                    "contradicts a key of ours", key=key, value=raw[key], hint=f"set {ours!r} instead"
                )
        return raw

    @model_validator(mode="after")
    def _possible(self) -> EngineConfig:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ConfigError(
                "bf16 at ZeRO stage 0 follows a wrong trajectory (DeepSpeed steps Adam once at initialisation)",
                key="zero_stage",
                value=0,
                hint="use zero_stage: 1, or precision: autocast_bf16",
            )
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ConfigError(
                "fp16 at ZeRO stage 0 keeps its fp32 masters where checkpoints cannot reach them",
                key="zero_stage",
                value=0,
                hint="use zero_stage: 1",
            )
        if self.precision == "fp16" and self.device == "cpu":
            raise ConfigError(
                "fp16 does not train on a CPU",
                key="precision",
                value="fp16",
                hint="use fp32 or autocast_bf16",
            )
        self._possible_passes()
        self._possible_offload()
        if self.micro_batch is not None and self.global_batch % self.micro_batch:
            raise ConfigError(
                f"{self.micro_batch} does not divide global_batch={self.global_batch}",
                key="micro_batch",
                value=self.micro_batch,
                hint=f"use one of {[n for n in range(1, self.global_batch + 1) if self.global_batch % n == 0]}",
            )
        return self

    def _possible_passes(self) -> None:
        if self.compile != "off" and self.sequence_parallel > 1:
            raise ConfigError(
                "is not for ranks that share clips, whose exchanges torch.compile does not see through",
                key="compile",
                value=self.compile,
                hint="use off, or sequence_parallel: 1",
            )
        if self.compile != "off" and self.zero_stage == 3:
            raise ConfigError(
                "is cut to pieces at ZeRO stage 3, by the hooks that gather the weights of every layer",
                key="compile",
                value=self.compile,
                hint="use zero_stage: 2, or compile: off",
            )
        if self.recompute == "selective" and not self.checkpoint_blocks_share:
            raise ConfigError(
                "recomputes no block while checkpoint_blocks_share is 0",
                key="recompute",
                value="selective",
                hint="use checkpoint_blocks_share: 1.0",
            )

    def _possible_offload(self) -> None:
        needed = {"none": 0, "optimizer": 1, "optimizer_and_parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ConfigError(
                f"needs ZeRO stage {needed} or more, not {self.zero_stage}",
                key="offload",
                value=self.offload,
                hint=f"use zero_stage: {needed}",
            )
        if self.offload != "none" and self.device == "cpu":
            raise ConfigError(
                "moves state from a GPU to the host, and this run is on the CPU",
                key="offload",
                value=self.offload,
                hint="use none",
            )


class CheckpointConfig(Section):
    """When a run is saved and what is kept."""

    every_steps: int = Field(500, ge=1, description="optimizer steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: bool = Field(True, description="also keep the checkpoint with the best validation metric")
    asynchronous: Literal["auto"] | bool = Field(
        "auto",
        description="write files while training goes on, from a copy of each rank's part in (on a GPU, pinned) host "
        "memory; auto does so on GPUs",
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto continues from the newest complete checkpoint"
    )
    url: Output | None = Field(
        None,
        description="where checkpoints, records and the result go: s3://, gs:// or any URL of fsspec; each rank "
        "uploads its own part, and the hosts need no common disk. None is into the run's folder",
    )

    @field_validator("url")
    @classmethod
    def _whole_url(cls, url: str | None) -> str | None:
        if url is not None and re.fullmatch(r"[a-z][a-z0-9+.-]*://.*[^/].*", url, re.IGNORECASE) is None:
            raise ValueError("is no URL such as s3://BUCKET/FOLDER; a folder of a disk is given as output")
        return None if url is None else url.rstrip("/")


class TrackConfig(Section):
    """Where numbers go. A JSONL file always holds them all."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto is online with an API key, else offline files"
    )
    project: str | None = Field(None, description="W&B project; None is WANDB_PROJECT, or cliplift")
    entity: str | None = Field(None, description="W&B user or team; None is WANDB_ENTITY, or the key's own")
    group: str | None = Field(
        None,
        description="W&B group, the campaign; None is WANDB_RUN_GROUP, the group of the run that initialise_from "
        "names, or the run's name",
    )
    tags: tuple[str, ...] = Field((), description="W&B tags; none are those of WANDB_TAGS")
    notes: str = Field("", description="W&B notes")
    every_steps: int = Field(10, ge=1, description="optimizer steps between logged lines")
    tensorboard: bool = Field(
        False, description="also write TensorBoard files to OUTPUT/tensorboard (extra: tensorboard)"
    )
    artifacts: bool = Field(
        True, description="W&B artifacts: the data the run used and the weights it made, by reference"
    )
    profile_steps: tuple[int, int] | None = Field(
        None, description="first and last optimizer step recorded by the torch profiler into OUTPUT/profile"
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="peak of one device for MFU, 1e12 operations per second; None is from its name",
    )
    clip_table_rows: int = Field(
        8, ge=0, description="clips with predictions logged to W&B at each evaluation"
    )


class EvaluationConfig(Section):
    """Evaluation during training."""

    every_steps: int | None = Field(
        None, ge=1, description="optimizer steps between evaluations; None is only at the end"
    )
    max_samples: int | None = Field(
        None, ge=1, description="evaluate on the first this many samples; None is all"
    )
    batch: int = Field(16, ge=1, description="clips per evaluation batch and rank")
    precise_batchnorm_batches: int = Field(
        0,
        ge=0,
        description="micro-batches of training data from which BatchNorm's statistics are recomputed before evaluation;"
        " 0 keeps the running ones",
    )


class TrainingRun(Section):
    """What every training run says."""

    stage: str = Field(description="which stage this file is for")
    name: str = Field(description="name of the run, shown in W&B and reports")
    output: Output = Field(description="folder of the run: config, checkpoints, log, weights")
    seed: int = Field(0, ge=0, description="seed of weights, sample order and augmentation")
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    data: DataConfig
    model: ModelConfig

    @field_validator("output")
    @classmethod
    def _local_output(cls, output: str) -> str:
        if "://" in output:
            raise ValueError(
                "is a URL, and a run's folder is on a disk; give a folder here, and the URL as checkpoint.url"
            )
        return output

    @model_validator(mode="after")
    def _possible_optimizer(self) -> TrainingRun:
        if self.schedule.final_weight_decay is not None and not self.optim.weight_decay:
            raise ConfigError(
                "has no effect with optim.weight_decay=0",
                key="schedule.final_weight_decay",
                value=self.schedule.final_weight_decay,
                hint="give both, or null",
            )
        if self.optim.name == "lamb" and self.engine.zero_stage > 0:
            raise ConfigError(
                "needs whole layers for its trust ratio, which ZeRO partitions cut",
                key="optim.name",
                value="lamb",
                hint="use engine.zero_stage: 0, or adamw",
            )
        return self
