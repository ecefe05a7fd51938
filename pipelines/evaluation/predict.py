"""Class probabilities for video files: any container FFmpeg reads, any length, no shards needed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import Tensor

from cliplift.configs.data import DataConfig, ViewsConfig
from cliplift.configs.runs import PredictRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.training import EngineConfig
from cliplift.models.protocol import VideoNetwork
from cliplift.models.streams import FLOW_CHANNELS
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.video_files import (
    clips_of_video,
    local_copy,
    read_each,
    sliding_windows,
    video_names,
)
from cliplift.pipelines.distributed.collectives import start
from cliplift.pipelines.engine.task import ModelCard
from cliplift.pipelines.evaluation.evaluate import load_finished
from cliplift.sharding.sources.files import printable
from cliplift.sharding.storage import open_store, whole_file

# "class" is a keyword of Python, so the fields are written as strings.
ClassProbability = TypedDict("ClassProbability", {"class": str, "probability": float})


class WindowRecord(TypedDict):
    """The likeliest classes of one window of a video."""

    start_seconds: float
    end_seconds: float
    top: list[ClassProbability]


class VideoRecord(TypedDict):
    """One line of the predictions: the likeliest classes of a video, and of its windows where there are any."""

    video: str
    top: list[ClassProbability]
    windows: NotRequired[list[WindowRecord]]


def run_predict(run: PredictRun) -> int:
    """``cliplift predict``: one line per video on stdout, JSON lines in ``output``. Returns how many videos failed."""
    topology = start(EngineConfig(device=run.device, zero_stage=0))
    network, _, card = load_finished(run.run)
    network = network.to(topology.device).eval()
    classes = class_names(card, network)
    data = data_of(card, network, run.views)
    failed = 0
    with _json_lines(run.output) as records:
        one = partial(classify, network, data=data, multi_label=card.get("task") == "multi_label")
        classify_one = partial(_classify_video, one, data=data, run=run, device=topology.device)
        for video, found in read_each(video_names(run.videos), classify_one):
            if found is None:
                failed += 1
                continue
            probabilities, windows = found
            records.append(_print_video(video, probabilities, windows, classes, run.top))
    return failed


def _print_video(
    video: str,
    probabilities: npt.NDArray[np.float32],
    windows: Sequence[tuple[float, float, npt.NDArray[np.float32]]],
    classes: tuple[str, ...],
    top: int,
) -> VideoRecord:
    """Print the lines of a video; returns its record."""
    record = _record(video, probabilities, classes, top)
    print(f"{video}  {_line(record)}", flush=True)
    parts = [(begin, end, _record(video, one, classes, top)) for begin, end, one in windows]
    if parts:
        record["windows"] = [
            {"start_seconds": round(begin, 3), "end_seconds": round(end, 3), "top": part["top"]}
            for begin, end, part in parts
        ]
    for begin, end, part in parts:
        print(f"  {begin:8.2f} s to {end:8.2f} s  {_line(part)}", flush=True)
    return record


@contextlib.contextmanager
def _json_lines(output: str | None) -> Iterator[list[VideoRecord]]:
    """Takes the records and writes them at the end; a file that cannot be written is refused before the work."""
    records: list[VideoRecord] = []
    if output is None:
        yield records
        return
    folder, _, name = output.rpartition("/")
    store = open_store(folder or ("/" if output.startswith("/") else "."))
    target = store.local_path(name)
    with contextlib.nullcontext() if target is None else whole_file(target) as temporary:
        yield records
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        if temporary is None:
            store.write(name, text)
        else:
            temporary.write_bytes(text)


@torch.no_grad()
def classify(
    network: VideoNetwork, batch: ClipBatch, data: DataConfig, *, multi_label: bool
) -> npt.NDArray[np.float32]:
    """(K,) class probabilities averaged over a batch's views; of several labels each class has its own."""

    def probabilities(scores: Tensor) -> Tensor:
        return scores.sigmoid() if multi_label else scores.softmax(dim=-1)

    scores = network(DeviceAugment(data.augment, network.input_spec, training=False)(batch)).float()
    if data.views.average == "probabilities":
        mean = probabilities(scores).mean(dim=0)
    else:
        mean = probabilities(scores.mean(dim=0))
    found: npt.NDArray[np.float32] = mean.cpu().numpy()
    return found


def class_names(card: ModelCard, network: VideoNetwork) -> tuple[str, ...]:
    """The classes of a model's card, or numbered ones where it names none. Raises ConfigError for too few or many."""
    named = tuple(card.get("classes", ()))
    if named and len(named) != network.num_classes:
        raise ConfigError(
            f"the config.json of its weights is damaged: it names {len(named)} classes for {network.num_classes}",
            key="run",
            value=list(named[:20]),
            hint="export the run again",
        )
    return named or tuple(f"class {k}" for k in range(network.num_classes))


def data_of(card: ModelCard, network: VideoNetwork, views: ViewsConfig) -> DataConfig:
    """The sampling and crop the model was trained with, from its card; its InputSpec where the card is silent."""
    spec = network.input_spec
    sampling = card.get("sampling") or {"frames": spec.frames, "stride": spec.frame_stride}
    tree = {
        "shards": ["unused:"],
        "modality": "flow" if spec.channels == FLOW_CHANNELS else "rgb",
        "sampling": sampling,
        "views": views,
        "crop_pixels": card.get("crop_pixels", spec.crop_height),
        "resize_short_side_pixels": card.get("resize_short_side_pixels"),
        "augment": {"normalize_brightness": card.get("normalize_brightness", False)},
        # Foreign files: PyAV reads every container correctly where decord is silently wrong on some.
        "decoder": "pyav",
    }
    try:
        return DataConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"the config.json of its weights is damaged: extra.{place}: {first['msg']}",
            key="run",
            value=str(card.get(str(first["loc"][0])))[:100],
            hint="export the run again",
        ) from error


def _classify_video(
    classify_views: Callable[[ClipBatch], npt.NDArray[np.float32]],
    video: str,
    *,
    data: DataConfig,
    run: PredictRun,
    device: torch.device,
) -> tuple[npt.NDArray[np.float32], list[tuple[float, float, npt.NDArray[np.float32]]]]:
    """A video's probabilities, and with ``window_seconds`` those of its windows, whose mean the former then are."""
    with local_copy(video) as path:
        if run.window_seconds is None:
            return classify_views(clips_of_video(path, data).to(device)), []
        windows = [
            (start, end, classify_views(batch.to(device)))
            for start, end, batch in sliding_windows(
                path,
                data,
                window_seconds=run.window_seconds,
                stride_seconds=run.window_stride_seconds or run.window_seconds / 2,
            )
        ]
        return np.mean([one for _, _, one in windows], axis=0), windows


def _line(record: VideoRecord | WindowRecord) -> str:
    return "  ".join(f"{c['class']} {c['probability']:.3f}" for c in record["top"])


def _record(
    video: str, probabilities: npt.NDArray[np.float32], classes: tuple[str, ...], top: int
) -> VideoRecord:
    best = np.argsort(-probabilities, kind="stable")[:top]
    return {
        "video": printable(video),
        "top": [{"class": classes[k], "probability": round(float(probabilities[k]), 6)} for k in best],
    }
