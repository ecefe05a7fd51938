"""Class probabilities for video files: any container FFmpeg reads, any length, no shards needed."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cliplift.configs.data import AugmentConfig, DataConfig, SamplingConfig, ViewsConfig
from cliplift.configs.runs import PredictRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.training import EngineConfig
from cliplift.pipelines.augment import DeviceAugment
from cliplift.pipelines.clips import clips_of_video
from cliplift.pipelines.distributed import start
from cliplift.pipelines.evaluate import load_finished
from cliplift.sharding.video import VideoDecodeError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"}
)


def run_predict(run: PredictRun) -> int:
    """``cliplift predict``: one line a video on stdout, JSON lines in ``output``. Returns how many videos failed."""
    topology = start(EngineConfig(device=run.device, zero_stage=0))
    network, _, card = load_finished(run.run)
    network = network.to(topology.device).eval()
    classes = tuple(card.get("classes", ())) or tuple(f"class {k}" for k in range(int(network.num_classes)))  # type: ignore[arg-type]
    data = _data(card, network, run.views)
    failed, records = 0, []
    for video in _videos(run.videos):
        try:
            probabilities = _classified(network, video, data, topology.device)
        except (VideoDecodeError, OSError) as error:
            print(f"cliplift: {video}: cannot be read: {error}", file=sys.stderr)
            failed += 1
            continue
        record = _record(video, probabilities, classes, run.top)
        records.append(record)
        print(
            f"{video}  " + "  ".join(f"{c['class']} {c['probability']:.3f}" for c in record["top"]),
            flush=True,
        )
    if run.output is not None:
        with fsspec.open(run.output, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return failed


@torch.no_grad()
def classify_video(
    network: nn.Module, video: Path, data: DataConfig, *, device: torch.device
) -> npt.NDArray[np.float32]:
    """(K,) class probabilities of a video file, averaged over its views. Raises VideoDecodeError."""
    batch = clips_of_video(video, data).to(device)
    scores = network(DeviceAugment(data.augment, network.input_spec, training=False)(batch)).float()
    if data.views.average == "probabilities":
        mean = scores.softmax(dim=1).mean(dim=0)
    else:
        mean = scores.mean(dim=0).softmax(dim=0)
    probabilities: npt.NDArray[np.float32] = mean.cpu().numpy()
    return probabilities


def _data(card: Mapping[str, Any], network: nn.Module, views: ViewsConfig) -> DataConfig:
    """The sampling and crop the model was trained with, from its card; its InputSpec where the card is silent."""
    spec = network.input_spec
    sampling = card.get("sampling") or {"frames": spec.frames, "stride": spec.frame_stride}  # type: ignore[union-attr]
    return DataConfig.model_validate(
        {
            "shards": ["unused:"],
            "sampling": SamplingConfig.model_validate(sampling),
            "views": views,
            "crop_pixels": card.get("crop_pixels", spec.crop_height),  # type: ignore[union-attr]
            "resize_short_side_pixels": card.get("resize_short_side_pixels"),
            "augment": AugmentConfig(normalize_brightness=card.get("normalize_brightness", False)),
            # Foreign files: PyAV reads every container correctly where decord is silently wrong on some.
            "decoder": "pyav",
        }
    )


def _videos(names: tuple[str, ...]) -> Iterator[str]:
    """Files as given, folders expanded to the videos below them in sorted order."""
    if not names:
        raise ConfigError("names no video", key="videos", hint="give files or folders after the run")
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
            if not inside:
                raise ConfigError(f"{name!r} holds no video file", key="videos", value=name)
            yield from map(str, inside)
        else:
            yield name


def _classified(
    network: nn.Module, video: str, data: DataConfig, device: torch.device
) -> npt.NDArray[np.float32]:
    """A local file as it is; anything behind a URL through a temporary copy."""
    if "://" not in video:
        return classify_video(network, Path(video), data, device=device)
    with tempfile.NamedTemporaryFile(suffix=Path(video).suffix) as copy:
        with fsspec.open(video, "rb") as file:
            shutil.copyfileobj(file, copy)
        copy.flush()
        return classify_video(network, Path(copy.name), data, device=device)


def _record(
    video: str, probabilities: npt.NDArray[np.float32], classes: tuple[str, ...], top: int
) -> dict[str, Any]:
    best = np.argsort(-probabilities, kind="stable")[:top]
    return {
        "video": video,
        "top": [{"class": classes[k], "probability": round(float(probabilities[k]), 6)} for k in best],
    }
