"""Rows about nets: transformers against transformers', convolutions against their eager form, transfer, kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import (
    BACKWARD_AND_FORWARD,
    Numbers,
    Row,
    Setting,
    alternating,
    backward_of,
    forward_operations,
    mfu,
    peak_gib,
    seconds_of,
    with_smaller_batch,
)
from torch import Tensor, nn

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.models import create_model
from cliplift.pipelines.distributed.collectives import start
from cliplift.pipelines.engine.deepspeed_setup import set_numerics
from cliplift.pipelines.stages.run import stage_of

RECIPES = Path(__file__).resolve().parents[2] / "configs"
CLASSES = 400


def machine(setting: Setting) -> Numbers:
    """Versions, and the ceilings all shares refer to: a large matrix product and a large copy."""
    found: Numbers = {"torch": torch.__version__, "device": str(setting.device)}
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        found |= {"card": properties.name, "memory_gib": properties.total_memory / 2**30,
                  "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # fmt: skip
    n = setting.size(8192, 64)
    for name, dtype, high in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True),
                              ("fp32", torch.float32, False)):  # fmt: skip
        torch.set_float32_matmul_precision("high" if high else "highest")
        a, b = (torch.randn(n, n, device=setting.device, dtype=dtype) for _ in range(2))
        ms = alternating({"product": partial(torch.matmul, a, b)}, setting, budget_seconds=0.5)["product"]
        found[f"{name}_product_tflops"] = 2 * n**3 / ms / 1e9
    torch.set_float32_matmul_precision("high")
    a = torch.randn(setting.size(2**29, 2**10), device=setting.device)
    b = torch.empty_like(a)
    ms = alternating({"copy": partial(b.copy_, a)}, setting, budget_seconds=0.3)["copy"]
    found["copy_tb_per_second"] = 2 * a.nbytes / ms / 1e9
    return found


def _classified(model: nn.Module, logits: Callable[[], Tensor], labels: Tensor) -> Callable[[], None]:
    def loss() -> Tensor:
        return F.cross_entropy(logits().float(), labels)

    return backward_of(loss, model)  # type: ignore[return-value]


def _labels(batch: int, setting: Setting) -> Tensor:
    return torch.randint(CLASSES, (batch,), device=setting.device)


def _timesformers(setting: Setting) -> tuple[nn.Module, nn.Module]:
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    from cliplift.models.timesformer.huggingface import to_huggingface

    small = {"depth": 1} if setting.small else {}
    name = "timesformer_small" if setting.small else "timesformer_base"
    ours = create_model(
        name, num_classes=CLASSES, in_frames=8, crop=setting.size(224, 32), drop_path=0.0, **small
    )
    state, config = to_huggingface(ours)
    theirs = TimesformerForVideoClassification(TimesformerConfig(**config))
    theirs.load_state_dict(state)
    return tuple(net.to(setting.device, setting.half).train() for net in (ours, theirs))  # type: ignore[return-value]


def timesformer_base(setting: Setting, *, compiled: bool) -> Numbers:
    """TimeSformer-B, forward and backward in bf16, against transformers'."""
    ours, theirs = _timesformers(setting)
    B, side = setting.size(16, 1), setting.size(224, 32)
    x = torch.randn(B, 3, 8, side, side, device=setting.device, dtype=setting.half)
    by_frame, labels = x.transpose(1, 2).contiguous(), _labels(B, setting)
    with torch.no_grad():
        difference = float((ours(x) - theirs(by_frame).logits).abs().max())
        operations = BACKWARD_AND_FORWARD * forward_operations(lambda: ours(x))
    attention = getattr(theirs.config, "_attn_implementation", None)
    if compiled:
        ours, theirs = (torch.compile(net, dynamic=False) for net in (ours, theirs))  # type: ignore[assignment]
    ms = alternating(
        {
            "ours": _classified(ours, lambda: ours(x), labels),
            "transformers": _classified(theirs, lambda: theirs(by_frame).logits, labels),
        },
        setting,
    )
    return {"batch": B, "ours_ms": ms["ours"], "transformers_ms": ms["transformers"],
            "ratio": ms["transformers"] / ms["ours"], "clips_per_second": 1e3 * B / ms["ours"],
            "mfu": mfu(operations, ms["ours"], setting), "transformers_attention": attention,
            "largest_difference_of_logits": difference}  # fmt: skip


def timesformer_large(setting: Setting) -> Numbers:
    """TimeSformer-L: 96 frames."""
    frames, side = setting.size(96, 8), setting.size(224, 32)
    name = "timesformer_small" if setting.small else "timesformer_large"
    small = {"depth": 1} if setting.small else {}
    build = partial(
        create_model, name, num_classes=CLASSES, in_frames=frames, crop=side, drop_path=0.0, **small
    )
    return with_smaller_batch(
        setting.size(4, 1), lambda batch: _large(build, (3, frames, side, side), batch, setting)
    )


def _large(build: Callable[[], nn.Module], shape: Sequence[int], batch: int, setting: Setting) -> Numbers:
    model = build().to(setting.device, setting.half).train()
    x = torch.randn(batch, *shape, device=setting.device, dtype=setting.half)
    operations = BACKWARD_AND_FORWARD * forward_operations(lambda: model(x))
    ms = alternating(
        {"ours": _classified(model, lambda: model(x), _labels(batch, setting))}, setting, rounds=3
    )["ours"]
    return {"ours_ms": ms, "clips_per_second": 1e3 * batch / ms, "mfu": mfu(operations, ms, setting),
            "peak_gib": peak_gib(setting)}  # fmt: skip


def _video_vit(size: str, setting: Setting, **options: object) -> nn.Module:
    if setting.small:
        return create_model("video_vit_tiny_8", in_frames=4, crop=16, depth=2, width=48, hidden=96, **options)
    return create_model(f"video_vit_{size}_16", in_frames=16, crop=224, **options)


def _clip_shape(setting: Setting) -> tuple[int, int, int, int]:
    side = setting.size(224, 16)
    return (3, setting.size(16, 4), side, side)


def vit_supervised(setting: Setting, *, size: str, compiled: bool = False) -> Numbers:
    """ViT 16x224 as a classifier, bf16, against transformers' VideoMAE with the same weights."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    from cliplift.models.video_vit.huggingface import videomae_to_huggingface

    ours = _video_vit(size, setting, num_classes=CLASSES)
    state, config = videomae_to_huggingface(ours)
    theirs = VideoMAEForVideoClassification(VideoMAEConfig(**config))
    theirs.load_state_dict(state, strict=False)  # the hub's names of two biases are older
    ours, theirs = (net.to(setting.device, setting.half).train() for net in (ours, theirs))
    plain = ours
    if compiled:
        ours, theirs = (torch.compile(net, dynamic=False) for net in (ours, theirs))  # type: ignore[assignment]

    def run(batch: int) -> Numbers:
        x = torch.randn(batch, *_clip_shape(setting), device=setting.device, dtype=setting.half)
        by_frame, labels = x.transpose(1, 2).contiguous(), _labels(batch, setting)
        operations = BACKWARD_AND_FORWARD * forward_operations(lambda: plain(x))
        ms = alternating(
            {
                "ours": _classified(ours, lambda: ours(x), labels),
                "transformers": _classified(theirs, lambda: theirs(by_frame).logits, labels),
            },
            setting,
        )
        return {"ours_ms": ms["ours"], "transformers_ms": ms["transformers"],
                "ratio": ms["transformers"] / ms["ours"], "clips_per_second": 1e3 * batch / ms["ours"],
                "mfu": mfu(operations, ms["ours"], setting), "peak_gib": peak_gib(setting)}  # fmt: skip

    return with_smaller_batch(setting.size({"base": 16, "large": 8}[size], 1), run)


def vit_masked(setting: Setting, *, size: str, compiled: bool = False) -> Numbers:
    """Masked pretraining, 90 % hidden in tubes, bf16: ours, ours with half decoded (dual masking), transformers'."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    from cliplift.models.video_vit.decoder import MaskedAutoencoder
    from cliplift.models.video_vit.huggingface import videomae_to_huggingface
    from cliplift.models.video_vit.masks import MaskDraws, token_numbers, tube_mask

    encoder = _video_vit(size, setting, num_classes=0, final_norm="tokens")
    width, depth, heads = {"base": (384, 4, 6), "large": (512, 12, 8)}[size]
    if setting.small:
        width, depth, heads = 24, 1, 3
    ours = MaskedAutoencoder(encoder, width=width, depth=depth, heads=heads)
    state, config = videomae_to_huggingface(ours)
    theirs = VideoMAEForPreTraining(VideoMAEConfig(**config))
    theirs.load_state_dict(state, strict=False)  # the hub's names of two biases are older
    ours, theirs = (net.to(setting.device, setting.half).train() for net in (ours, theirs))
    plain = ours
    if compiled:
        ours, theirs = (torch.compile(net, dynamic=False) for net in (ours, theirs))

    def run(batch: int) -> Numbers:
        shape = _clip_shape(setting)
        grid = encoder.grid(*shape[1:])
        hidden_mask = tube_mask(
            grid, MaskDraws.of(0, epoch=0, positions=range(batch)), ratio=setting.size(90, 50) / 100
        )
        visible, hidden = (numbers.to(setting.device) for numbers in token_numbers(hidden_mask))
        hidden_mask = hidden_mask.to(setting.device)
        half = hidden[:, ::2].contiguous()
        x = torch.randn(batch, *shape, device=setting.device, dtype=setting.half)
        by_frame = x.transpose(1, 2).contiguous()
        operations = BACKWARD_AND_FORWARD * forward_operations(lambda: plain(x, visible))
        sides = {
            "ours": backward_of(lambda: ours(x, visible).loss, ours),
            "transformers": backward_of(lambda: theirs(by_frame, bool_masked_pos=hidden_mask).loss, theirs),
        }
        if not compiled:
            sides["dual"] = backward_of(lambda: ours(x, visible, half).loss, ours)
        ms = alternating(sides, setting)
        found = {f"{name}_ms": value for name, value in ms.items()}
        if "dual" in ms:
            found["dual_masking_speedup"] = ms["ours"] / ms["dual"]
        return found | {"ratio": ms["transformers"] / ms["ours"], "clips_per_second": 1e3 * batch / ms["ours"],
                        "mfu": mfu(operations, ms["ours"], setting), "peak_gib": peak_gib(setting)}  # fmt: skip

    return with_smaller_batch(setting.size(32, 2), run)


def convolutional(setting: Setting, *, name: str, frames: int, side: int, batch: int) -> Numbers:
    """A convolutional net as the engine runs it (autocast, channels-last clips, autotuned) against its eager forms."""
    small = setting.small
    frames, side = (frames, side) if not small else (32 if name.startswith("slowfast") else 16, 32)

    def run(batch: int) -> Numbers:
        torch.manual_seed(0)
        model = create_model(name, num_classes=CLASSES, in_frames=frames).to(setting.device).train()
        x = torch.randn(batch, 3, frames, side, side, device=setting.device)
        last, labels = x.contiguous(memory_format=torch.channels_last_3d), _labels(batch, setting)
        found: Numbers = {}
        forms = {
            "fp32_eager": (x, False, False, False),
            "tf32_eager": (x, True, False, False),
            "bf16_planar": (x, True, True, True),
            "ours": (last, True, True, True),
        }
        if small:  # one step of a side is enough to try the program
            forms = {form: forms[form] for form in ("fp32_eager", "ours")}
        for form, (clips, rounded, autocast, tuned) in forms.items():
            torch.set_float32_matmul_precision("high" if rounded else "highest")
            torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = rounded, tuned

            def forward(clips: Tensor = clips, autocast: bool = autocast) -> Tensor:
                with torch.autocast(setting.device.type, setting.half, enabled=autocast):
                    return model(clips)

            step = _classified(model, forward, labels)
            if not small:
                seconds_of(step, setting.device, 2)
            found[f"{form}_ms"] = 1e3 * seconds_of(step, setting.device, 1 if small else 4)
        torch.set_float32_matmul_precision("high")
        operations = BACKWARD_AND_FORWARD * forward_operations(lambda: model(x))
        best = min(found["ours_ms"], found.get("bf16_planar_ms", found["ours_ms"]))
        over = {f"over_{form}": found[f"{form}_ms"] / best for form in forms}
        return found | over | {
            "clips_per_second": 1e3 * batch / best, "mfu": mfu(operations, best, setting),
            "frames": frames, "side": side, "peak_gib": peak_gib(setting),
        }  # fmt: skip

    return with_smaller_batch(setting.size(batch, 2), run)


def attention_kernels(setting: Setting) -> Numbers:
    """Forward and backward of scaled dot-product attention at ViT-B and TimeSformer shapes, by kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shapes = {"vit_b_1568": (8, 12, 1568, 64), "vit_b_masked_160": (64, 12, 160, 64), "space_197": (128, 12, 197, 64),
              "time_8": (3136, 12, 8, 64)}  # fmt: skip
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
               "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
    found: Numbers = {}
    for where, full in shapes.items():
        shape = (1, 2, 8, 8) if setting.small else full
        q, k, v = (
            torch.randn(shape, device=setting.device, dtype=setting.half, requires_grad=True)
            for _ in range(3)
        )
        for name, kernel in kernels.items():

            def step() -> None:
                with sdpa_kernel(kernel):  # noqa: B023
                    F.scaled_dot_product_attention(q, k, v).sum().backward()  # noqa: B023

            try:
                found[f"{where}_{name}_ms"] = alternating({"it": step}, setting, budget_seconds=0.1)["it"]
            except RuntimeError as error:
                found[f"{where}_{name}_ms"] = str(error).splitlines()[0][:80]
    return found


def hot_kernels(setting: Setting, *, name: str) -> Numbers:
    """Where the device's time of a step goes: its costliest kernels, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    small = setting.small
    if name.startswith("video_vit"):
        model = _video_vit(name.split("_")[2], setting, num_classes=CLASSES)
        shape: tuple[int, ...] = (setting.size(16, 1), *_clip_shape(setting))
    elif name.startswith("timesformer"):
        model = create_model("timesformer_small" if small else name, num_classes=CLASSES, in_frames=8,
                             crop=setting.size(224, 32))  # fmt: skip
        shape = (setting.size(16, 1), 3, 8, setting.size(224, 32), setting.size(224, 32))
    else:
        model = create_model(name, num_classes=CLASSES, in_frames=16)
        shape = (setting.size(16, 2), 3, 16, setting.size(112, 32), setting.size(112, 32))
    convolutional_net = not name.startswith(("video_vit", "timesformer"))
    dtype = torch.float32 if convolutional_net else setting.half
    model = model.to(setting.device, dtype).train()
    x = torch.randn(shape, device=setting.device, dtype=dtype)
    if convolutional_net:
        x = x.contiguous(memory_format=torch.channels_last_3d)

    def forward() -> Tensor:
        with torch.autocast(setting.device.type, setting.half, enabled=convolutional_net):
            return model(x)

    step = _classified(model, forward, _labels(shape[0], setting))
    seconds_of(step, setting.device, 1 if small else 3)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if setting.device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        seconds_of(step, setting.device, 1)
    events = profiler.key_averages()
    key = "self_device_time_total" if setting.device.type == "cuda" else "self_cpu_time_total"
    total = sum(getattr(event, key) for event in events) or 1.0
    top = sorted(events, key=lambda event: -getattr(event, key))[:24]
    return {"total_ms": total / 1e3,
            "kernels": [[e.key[:110], e.count, round(getattr(e, key) / total, 4)] for e in top]}  # fmt: skip


def transfer(setting: Setting) -> Numbers:
    """A transfer step with the teacher's features at hand, and with the teacher run, over the student's step alone."""
    side, frames, batch = setting.size(224, 32), setting.size(16, 8), setting.size(8, 4)
    student, teacher_name = (
        ("t3d_tiny", "efficientnet_lite0") if setting.small else ("t3d_121", "densenet_121")
    )
    words = [
        f"output={setting.folder}/transfer", f"model.name={student}", f"teacher.name={teacher_name}",
        "teacher.pretrained=null",
        f"data.sampling.frames={frames}", f"data.crop_pixels={side}", f"data.resize_short_side_pixels={side}",
        f"engine.global_batch={batch}", "engine.precision=autocast_bf16", "engine.channels_last=true",
        "correspondence.negatives_per_clip=1", "track.wandb=disabled",
    ]  # fmt: skip
    run = load_run(RECIPES / "transfer" / "demo.yaml", RUNS, words).run
    set_numerics(run.engine, setting.device)
    stage = stage_of(run, classes=(), topology=start(run.engine))
    built = stage.build_module(weights=True)
    inputs = stage.example_inputs(built, micro_batch=batch, world_size=1)
    module = built.module.to(setting.device)
    teacher = built.frozen
    assert teacher is not None
    teacher = teacher.to(setting.device).eval().requires_grad_(False)
    inputs = {name: value.to(setting.device) for name, value in inputs.items()}
    inputs["clips"] = torch.randn_like(inputs["clips"])
    frames_seen = run.teacher.frames or frames
    pictures = torch.randn(batch * frames_seen, 3, side, side, device=setting.device)
    kind = setting.device.type

    def autocast() -> torch.autocast:
        return torch.autocast(kind, setting.half)

    def alone() -> Tensor:
        with autocast():
            return module.student(inputs["clips"]).float().square().mean()

    def cached() -> Tensor:
        with autocast():
            return module(inputs)["loss"]

    def uncached() -> Tensor:
        with torch.no_grad(), autocast():
            features = teacher(pictures).float().reshape(batch, frames_seen, -1).mean(dim=1)
        with autocast():
            return module(inputs | {"frame_features": features})["loss"]

    sides = {f.__name__: backward_of(f, module) for f in (alone, cached, uncached)}
    ms = alternating(sides, setting, budget_seconds=4.0)
    return {f"{name}_ms": value for name, value in ms.items()} | {
        "cached_over_alone": ms["cached"] / ms["alone"],
        "uncached_over_alone": ms["uncached"] / ms["alone"],
        "teacher_frames": frames_seen,
    }


def recurrent(setting: Setting) -> Numbers:
    """ConvLSTM against the concatenating design, from benchmarks/convrnn.py."""
    import convrnn

    torch.set_float32_matmul_precision("highest")  # the two sides are compared to 1e-4 first
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    found: Numbers = {}
    sizes = [replace(size, batch=size.batch * setting.size(4, 1)) for size in convrnn.SIZES]
    for size in sizes[:1] if setting.small else sizes:
        try:
            result = convrnn.compare(size, rounds=setting.size(9, 1), device=str(setting.device))
        except RuntimeError as error:  # the rounding of another kernel: the other sizes still count
            found[size.what] = str(error)
            continue
        found[size.what] = {"ours_ms": result.ours_ms, "concatenating_ms": result.concatenating_ms,
                            "speedup": result.speedup}  # fmt: skip
    found["best_speedup"] = max(r["speedup"] for r in found.values() if isinstance(r, dict))
    return found


CONVOLUTIONAL = [
    # Frames and pixels as the papers train them.
    ("t3d_121", 16, 224, 8),
    ("r2plus1d_34", 32, 112, 8),
    ("p3d_63", 16, 160, 16),
    ("slowfast_r50_8x8", 64, 224, 8),
    ("resnext3d_101_frmb_bert", 64, 112, 8),
]

MACHINE = Row("machine", "the ceilings the others refer to", machine)
FIRST = [
    Row("timesformer_base 8x224, eager", ">= 1.3 of transformers", partial(timesformer_base, compiled=False)),
    Row(
        "vit_base 16x224 masked",
        ">= 1.3 of transformers, dual >= 1.25, MFU >= .45",
        partial(vit_masked, size="base"),
    ),
    Row("vit_large 16x224 masked", ">= 1.3 of transformers, MFU >= .45", partial(vit_masked, size="large")),
    Row(
        "vit_base 16x224 supervised",
        ">= 1.3 of transformers, MFU >= .45",
        partial(vit_supervised, size="base"),
    ),
    Row(
        "vit_large 16x224 supervised",
        ">= 1.3 of transformers, MFU >= .45",
        partial(vit_supervised, size="large"),
    ),
]
SECOND = [
    Row("timesformer_large 96x224", "MFU >= .45", timesformer_large),
    *(
        Row(f"{name} {frames}x{side}", ">= 2 of eager fp32 and TF32",
            partial(convolutional, name=name, frames=frames, side=side, batch=batch), 90.0)
        for name, frames, side, batch in CONVOLUTIONAL
    ),
]  # fmt: skip
TRANSFER = Row("transfer step", "<= 1.10 cached, <= 1.35 not", transfer, 90.0)
RECURRENT = Row("ConvLSTM", ">= 1.5 of concatenating", recurrent)
KERNELS = [
    Row("attention kernels", "which one to pin", attention_kernels),
    Row("kernels of timesformer_base", "where to look next", partial(hot_kernels, name="timesformer_base")),
    Row("kernels of video_vit_base", "where to look next", partial(hot_kernels, name="video_vit_base")),
    Row("kernels of t3d_121", "where to look next", partial(hot_kernels, name="t3d_121")),
]
COMPILED = [
    Row("timesformer_base 8x224, both compiled", ">= 1.3 of transformers",
        partial(timesformer_base, compiled=True), 150.0),
    Row("vit_base 16x224 supervised, both compiled", ">= 1.3 of transformers",
        partial(vit_supervised, size="base", compiled=True), 150.0),
]  # fmt: skip
