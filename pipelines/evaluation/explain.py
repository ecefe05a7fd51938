"""``cliplift explain``: one mp4 per video, the clip beside the same clip under its heat map."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliplift.configs.runs import ExplainRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.training import EngineConfig
from cliplift.models.protocol import ShowsAttention
from cliplift.models.timesformer.model import TimeSformer
from cliplift.models.timesformer.rollout import attention_rollout
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.video_files import read_each, video_names, views_of_video
from cliplift.pipelines.distributed.collectives import start
from cliplift.pipelines.evaluation.evaluate import load_finished
from cliplift.pipelines.evaluation.grad_cam import Explanation, grad_cam, write_overlay
from cliplift.pipelines.evaluation.predict import class_names, data_of
from cliplift.pipelines.runs.folder import RunFolder, write_json
from cliplift.sharding.sources.files import printable

OVERLAY_FPS = 8.0


def run_explain(run: ExplainRun) -> int:
    """Explain every view of every video. Returns how many videos could not be read.

    Raises:
        ConfigError: the model cannot be explained by the method asked for, or has no class of that name.
    """
    topology = start(EngineConfig(device=run.device, zero_stage=0))
    network, _, card = load_finished(run.run)
    network = network.to(topology.device).eval()
    classes = class_names(card, network)
    data = data_of(card, network, run.views)
    method = method_for(network, run.method)
    wanted = class_to_explain(run.class_name, classes, method)
    if run.layer is not None and method != "grad_cam":
        raise ConfigError("is for grad_cam alone", key="layer", value=run.layer, hint="leave it out")
    folder = RunFolder.create(run.output, writes=True).path
    records, failed = [], 0
    videos = read_each(video_names(run.videos), partial(views_of_video, data=data))
    for number, (video, read) in enumerate(videos):
        if read is None:
            failed += 1
            continue
        batch = read.to(topology.device)
        clips = DeviceAugment(data.augment, network.input_spec, training=False)(batch)
        found = explain_clips(network, clips, method=method, wanted=wanted, layer=run.layer)
        views = _write_overlays(folder / f"{number:05d}-{Path(video).stem}", batch, found, classes)
        records.append({"video": printable(video), "views": views})
        print(json.dumps(records[-1], ensure_ascii=False), flush=True)
    write_json(folder / "explained.json", {"run": run.run, "method": method, "videos": records})
    return failed


def method_for(network: nn.Module, asked: str) -> str:
    """The method a model is explained with. Raises ConfigError where the one asked for does not apply."""
    attends = isinstance(network, ShowsAttention)
    own = "rollout" if isinstance(network, TimeSformer) else "attention" if attends else "grad_cam"
    if asked in ("auto", own) or (asked == "grad_cam" and own == "attention"):
        return own if asked == "auto" else asked
    raise ConfigError(
        f"does not apply to {type(network).__name__}", key="method", value=asked, hint=f"use {own!r}"
    )


def explain_clips(
    network: nn.Module, clips: Tensor, *, method: str, wanted: int | None = None, layer: str | None = None
) -> Explanation:
    """Heat (B, T, H, W) of clips (B, C, T, H, W) by one of the three methods; attention knows no classes."""
    if method == "grad_cam":
        chosen = None if wanted is None else torch.full((len(clips),), wanted, device=clips.device)
        return grad_cam(network, clips, classes=chosen, layer=layer)
    with torch.no_grad():
        scores = network(clips).float().softmax(dim=1)
        if isinstance(network, ShowsAttention):
            coarse = network.attention_maps(clips).float()
        else:
            coarse = attention_rollout(network, clips, scaled=False).float()
    probabilities, predicted = scores.max(dim=1)
    size = (int(clips.shape[2]), int(clips.shape[3]), int(clips.shape[4]))
    heat = F.interpolate(coarse[:, None], size=size, mode="trilinear", align_corners=False)[:, 0]
    peak = heat.amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)
    return Explanation(heat=heat / peak, coarse=coarse, classes=predicted, probabilities=probabilities)


def class_to_explain(name: str | None, classes: Sequence[str], method: str) -> int | None:
    """The number of the class asked for; None for the predicted one. Raises ConfigError where there is no such."""
    if name is None:
        return None
    if method != "grad_cam":
        raise ConfigError(
            f"attention has no class, and the method is {method!r}",
            key="class_name",
            value=name,
            hint="leave it out",
        )
    if name not in classes:
        raise ConfigError(
            f"is none of the model's {len(classes)} classes",
            key="class_name",
            value=name,
            hint=f"use one of {list(classes)[:20]}",
        )
    return list(classes).index(name)


def _write_overlays(
    stem: Path, batch: ClipBatch, found: Explanation, classes: Sequence[str]
) -> list[Mapping[str, object]]:
    """One mp4 per view beside ``stem``, and what it shows."""
    views: list[Mapping[str, object]] = []
    for view in range(len(batch.clips)):
        path = stem.with_name(f"{stem.name}-{view}.mp4")
        write_overlay(
            path,
            batch.clips[view].cpu().numpy(),
            found.heat[view].cpu().numpy(),
            fps=OVERLAY_FPS,
        )
        explained = classes[int(found.classes[view])]
        views.append(
            {"file": path.name, "class": explained, "probability": round(float(found.probabilities[view]), 6)}
        )
    return views
