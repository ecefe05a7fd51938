"""Class probabilities for video files: any container FFmpeg reads, any length, no shards needed."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

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
    duration_of,
    local_copy,
    read_each,
    sliding_windows,
    video_names,
    window_around,
)
from cliplift.pipelines.distributed.collectives import start
from cliplift.pipelines.engine.task import ModelCard
from cliplift.pipelines.evaluation.evaluate import load_finished
from cliplift.pipelines.evaluation.segments import (
    Present,
    Probabilities,
    Segment,
    Window,
    dump_segments,
    present,
    refined,
    segments,
)
from cliplift.sharding.sources.files import printable
from cliplift.sharding.storage import open_store, whole_file
from cliplift.sharding.video.decode import probe

FPS_UNKNOWN = (
    25  # of a stream that does not state its rate: to what time the ends of segments are searched for
)

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
    _require_one_subtitled(run)
    topology = start(EngineConfig(device=run.device, zero_stage=0))
    network, _, card = load_finished(run.run)
    network = network.to(topology.device).eval()
    classes = class_names(card, network)
    data = data_of(card, network, run.views)
    multi_label = card.get("task") == "multi_label"
    failed = 0
    with _whole_text(run.output) as lines, _whole_text(run.segments) as texts:
        one = partial(classify, network, data=data, multi_label=multi_label)
        classify_one = partial(
            _classify_video, one, data=data, run=run, multi_label=multi_label, device=topology.device
        )
        happened: list[tuple[str, list[Segment]]] = []
        for video, found in read_each(video_names(run.videos), classify_one):
            if found is None:
                failed += 1
                continue
            lines.append(json.dumps(_print_video(video, found, classes, run), ensure_ascii=False) + "\n")
            happened.append((printable(video), found.segments))
        if run.segments is not None:
            texts.append(dump_segments(happened, classes, suffix=f".{run.segments.rpartition('.')[2]}"))
    return failed


def _require_one_subtitled(run: PredictRun) -> None:
    if run.segments is None or not run.segments.endswith(".vtt"):
        return
    if len(list(itertools.islice(video_names(run.videos), 2))) > 1:
        raise ConfigError(
            "WebVTT belongs to one video, and several are given",
            key="segments",
            value=run.segments,
            hint="say segments=segments.csv, or give the videos one by one",
        )


class _Found(NamedTuple):
    """What is found of a video: of the whole, of its windows and when, where these are asked for."""

    probabilities: Probabilities  # (K,)
    windows: list[Window]
    segments: list[Segment]


def _print_video(video: str, found: _Found, classes: tuple[str, ...], run: PredictRun) -> VideoRecord:
    """Print the lines of a video; returns its record."""
    record = _record(video, found.probabilities, classes, run.top)
    print(f"{video}  {_line(record)}", flush=True)
    parts = [(one, _record(video, one.probabilities, classes, run.top)) for one in found.windows]
    if parts:
        record["windows"] = [
            {
                "start_seconds": round(one.start_seconds, 3),
                "end_seconds": round(one.end_seconds, 3),
                "top": part["top"],
            }
            for one, part in parts
        ]
    lines = [(one.start_seconds, one.end_seconds, _line(part)) for one, part in parts]
    if run.segments is not None:
        lines = [(a, b, f"{classes[label]} {score:.3f}") for a, b, label, score in found.segments]
    for begin, end, line in lines:
        print(f"  {begin:8.2f} s to {end:8.2f} s  {line}", flush=True)
    return record


@contextlib.contextmanager
def _whole_text(output: str | None) -> Iterator[list[str]]:
    """Takes the parts of a file and writes it at the end; one that cannot be written is refused before the work."""
    parts: list[str] = []
    if output is None:
        yield parts
        return
    folder, _, name = output.rpartition("/")
    store = open_store(folder or ("/" if output.startswith("/") else "."))
    target = store.local_path(name)
    with contextlib.nullcontext() if target is None else whole_file(target) as temporary:
        yield parts
        text = "".join(parts).encode()
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
    classify_views: Callable[[ClipBatch], Probabilities],
    video: str,
    *,
    data: DataConfig,
    run: PredictRun,
    multi_label: bool,
    device: torch.device,
) -> _Found:
    """A video's probabilities, and with ``window_seconds`` those of its windows, whose mean the former then are."""
    with local_copy(video) as path:
        if run.window_seconds is None:
            return _Found(classify_views(clips_of_video(path, data).to(device)), [], [])
        views = sliding_windows(
            path,
            data,
            window_seconds=run.window_seconds,
            stride_seconds=run.window_stride_seconds or run.window_seconds / 2,
        )
        windows = (Window(start, end, classify_views(batch.to(device))) for start, end, batch in views)
        if run.segments is None:
            found = list(windows)
            return _Found(np.mean([one.probabilities for one in found], axis=0), found, [])

        def look(centre_seconds: float) -> Window:
            assert run.window_seconds is not None
            begin, end, batch = window_around(path, data, centre_seconds, window_seconds=run.window_seconds)
            return Window(begin, end, classify_views(batch.to(device)))

        shown = partial(present, threshold=run.segment_threshold, multi_label=multi_label)
        return _segmented(path, windows, look, shown, run)


def _segmented(
    path: Path,
    windows: Iterator[Window],
    look: Callable[[float], Window],
    shown: Callable[[Probabilities], Present],
    run: PredictRun,
) -> _Found:
    """The segments of a video; its windows are kept only where they are written."""
    total: npt.NDArray[np.float64] = np.zeros(1)
    count, kept = 0, list[Window]()

    def counted() -> Iterator[Window]:
        nonlocal total, count
        for window in windows:
            total = total + window.probabilities
            count += 1
            if run.output is not None:
                kept.append(window)
            yield window

    precision = run.segment_precision_seconds or 1 / float(probe(path).fps or FPS_UNKNOWN)
    looked_at = refined(counted(), look, shown, precision_seconds=precision)
    found = list(segments(looked_at, shown, duration_seconds=duration_of(path)))
    return _Found((total / count).astype(np.float32), kept, sorted(found))


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
