"""Everything random about the training clips of one sample, drawn from the seed, the pass and the sample alone.

Which frames of a stored video make a clip. Frame numbers only; nothing is decoded here.

Where a frame is cut, and cutting it: boxes in the stored picture, resized to the network's square, in uint8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cliplift.configs.data import AugmentConfig, DataConfig, SamplingConfig
from cliplift.configs.sections import ConfigError
from cliplift.models.streams import FLOW_CHANNELS
from cliplift.pipelines.data.batch import NUM_DRAWS
from cliplift.pipelines.data.order import generator
from cliplift.sharding.read.reader import ClipShape
from cliplift.sharding.video.decode import Frames

Ints = npt.NDArray[np.int64]


def training_frames(
    sampling: SamplingConfig, *, num_frames: int, fps: float, draw: npt.NDArray[np.float64]
) -> Ints:
    """Frame numbers (T,) of a training clip.

    Args:
        sampling: the temporal sampling.
        num_frames: frames of the stored video.
        fps: its constant rate, frames/s.
        draw: T + 1 uniform numbers in [0, 1): the start, and the jitter of each segment.
    """
    if sampling.mode == "segments":
        return _segments(sampling.frames, num_frames, draw[1 : sampling.frames + 1])
    slack = _slack(sampling, num_frames, fps)
    start = min(slack, int(draw[0] * (slack + 1)))
    return _dense(sampling, num_frames, fps, start)


def view_frames(
    sampling: SamplingConfig,
    *,
    num_frames: int,
    fps: float,
    clips: int,
    from_start: bool = False,
    every_frames: int | None = None,
) -> list[Ints]:
    """Frame numbers of the test clips: spread uniformly over the video, the middle one where there is one.

    ``from_start``: clip i of n begins at share i/n of the possible starts instead, so that one clip begins
    at the first frame (the released TimeSformer code). Segments cover the whole video either way: clip i takes the
    frame at share (i + 1/2)/n of each part, or from_start at i/n (VideoMAE's two sets of frames for n = 2).
    ``every_frames``: clips begin at every n-th frame; a video shorter than a clip is one.
    """
    if sampling.mode == "segments":
        shifts = (np.arange(clips) + (0.0 if from_start else 0.5)) / clips
        return [_segments(sampling.frames, num_frames, np.full(sampling.frames, shift)) for shift in shifts]
    slack = _slack(sampling, num_frames, fps)
    if every_frames is not None:
        return [_dense(sampling, num_frames, fps, at) for at in range(0, slack + 1, every_frames)]
    if from_start:
        return [_dense(sampling, num_frames, fps, slack * i // clips) for i in range(clips)]
    starts = [slack // 2] if clips == 1 else np.round(np.linspace(0, slack, clips)).astype(int).tolist()
    return [_dense(sampling, num_frames, fps, int(start)) for start in starts]


def _step(sampling: SamplingConfig, fps: float) -> float:
    """Distance of sampled frames, in stored frames; a target rate resamples by time."""
    return sampling.stride * (fps / sampling.fps if sampling.fps is not None else 1.0)


def _slack(sampling: SamplingConfig, num_frames: int, fps: float) -> int:
    """How many frames later than frame 0 a clip can start and still fit; 0 for a video shorter than a clip."""
    span = int(np.floor((sampling.frames - 1) * _step(sampling, fps) + 1e-9)) + 1
    return max(0, num_frames - span)


def _dense(sampling: SamplingConfig, num_frames: int, fps: float, start: int) -> Ints:
    at = start + np.floor(np.arange(sampling.frames) * _step(sampling, fps) + 1e-9).astype(np.int64)
    inside: Ints = at % num_frames if sampling.short_clips == "loop" else np.minimum(at, num_frames - 1)
    return inside


def _segments(frames: int, num_frames: int, shifts: npt.NDArray[np.float64]) -> Ints:
    """One frame from each of T equal parts (TSN, arXiv 1608.00859); short videos repeat frames."""
    at: Ints = np.floor((np.arange(frames) + shifts) * num_frames / frames).astype(np.int64)
    return at.clip(max=num_frames - 1)


@dataclass(frozen=True)
class Box:
    """A rectangle of the stored picture, pixels; ``flip`` mirrors what is cut (ten-crop testing)."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def training_box(
    augment: AugmentConfig, data: DataConfig, *, height: int, width: int, rng: np.random.Generator
) -> Box:
    """The box of one training clip; the same for all its frames."""
    if augment.crop == "random_resized":
        return _random_resized(augment, height=height, width=width, rng=rng)
    if augment.crop == "multi_scale_corner":
        return _multi_scale_corner(augment, height=height, width=width, rng=rng)
    side = _crop_side(data, height, width)
    if augment.crop == "random":
        if augment.short_side_pixels is not None:
            low, high = augment.short_side_pixels
            side = _crop_side(data, height, width, resized=int(rng.integers(low, high + 1)))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        return Box(top, left, side, side)
    return _corners_and_centre(height, width, side, side)[-1]


def _multi_scale_corner(augment: AugmentConfig, *, height: int, width: int, rng: np.random.Generator) -> Box:
    """A box of one of the fixed sizes in one of the fixed places (TSN, arXiv 1608.00859, section 3.3)."""
    short = min(height, width)
    sides = [max(1, round(short * scale)) for scale in augment.corner_scales]
    shapes = [
        (a, b)
        for i, a in enumerate(sides)
        for j, b in enumerate(sides)
        if abs(i - j) <= augment.corner_distortion
    ]
    h, w = shapes[int(rng.integers(len(shapes)))]
    places = (
        _corners_and_centre(height, width, h, w)
        if augment.corner_places == 5
        else _thirteen(height, width, h, w)
    )
    return places[int(rng.integers(len(places)))]


def _random_resized(augment: AugmentConfig, *, height: int, width: int, rng: np.random.Generator) -> Box:
    """A box of random area and aspect ratio (Inception's), the largest centred one after ten misses."""
    low, high = (math.log(r) for r in augment.ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*augment.scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)


def view_boxes(data: DataConfig, *, height: int, width: int, crops: int) -> list[Box]:
    """Test crops: centre; three along the long side; four corners and centre; those five and their mirrors."""
    side = _crop_side(data, height, width)
    five = _corners_and_centre(height, width, side, side)
    if crops == 1:
        return [five[-1]]
    if crops == 3:
        if width >= height:
            top = (height - side) // 2
            return [Box(top, left, side, side) for left in (0, (width - side) // 2, width - side)]
        left = (width - side) // 2
        return [Box(top, left, side, side) for top in (0, (height - side) // 2, height - side)]
    if crops == 5:
        return five
    return five + [Box(b.top, b.left, b.height, b.width, flip=True) for b in five]


def _crop_side(data: DataConfig, height: int, width: int, *, resized: int | None = None) -> int:
    """Side of the crop before resizing: the crop's share of the resized short side, of the stored short side."""
    resized = resized or data.resize_short_side_pixels or round(data.crop_pixels * 8 / 7)
    short = min(height, width)
    return max(1, min(short, round(short * data.crop_pixels / resized)))


def _corners_and_centre(height: int, width: int, h: int, w: int) -> list[Box]:
    """Four corners, then the centre."""
    bottom, right = height - h, width - w
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    return [Box(top, left, h, w) for top, left in corners]


def _thirteen(height: int, width: int, h: int, w: int) -> list[Box]:
    """Those five, the middles of the edges, and the points between corners and centre."""
    down = [(height - h) * i // 4 for i in range(5)]
    across = [(width - w) * i // 4 for i in range(5)]
    others = [(0, 2), (2, 0), (2, 4), (4, 2), (1, 1), (1, 3), (3, 1), (3, 3)]
    return _corners_and_centre(height, width, h, w) + [Box(down[i], across[j], h, w) for i, j in others]


def cut(frames: Frames, box: Box, *, pixels: int) -> Tensor:
    """(T, H, W, C) -> the box resized to (T, pixels, pixels, C), uint8, bilinear with antialiasing.

    Flow (C = 2) keeps its values: they are pixels of the stored clip, as published flow is when frames are resized.
    """
    part = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
    tensor = torch.from_numpy(np.ascontiguousarray(part))
    if (box.height, box.width) != (pixels, pixels):
        planes = F.interpolate(
            tensor.permute(0, 3, 1, 2),
            size=(pixels, pixels),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        tensor = planes.permute(0, 2, 3, 1)
    if box.flip:
        tensor = tensor.flip(2)
        if tensor.shape[-1] == FLOW_CHANNELS:  # what moved to the right moves to the left
            tensor[..., 0] = 255 - tensor[..., 0]
    return tensor.contiguous()


class TrainingPlan(NamedTuple):
    """What is drawn for the training clips of one sample: everything random about them."""

    frames: list[Ints]  # of each clip (T,) frame numbers
    boxes: list[Box]
    draws: npt.NDArray[np.float32]  # (clips, NUM_DRAWS)


def training_plan(data: DataConfig, shape: ClipShape, *words: int) -> TrainingPlan:
    """Frames, boxes and draws of ``data.clips_per_sample`` clips of a video, a function of the integers ``words``."""
    frames, boxes, draws = [], [], []
    for number in range(data.clips_per_sample):
        rng = generator(*words, *((number,) if number else ()))
        temporal = rng.random(data.sampling.frames + 1)
        frames.append(
            training_frames(data.sampling, num_frames=shape.num_frames, fps=shape.fps, draw=temporal)
        )
        boxes.append(training_box(data.augment, data, height=shape.height, width=shape.width, rng=rng))
        draws.append(rng.random(NUM_DRAWS, dtype=np.float32))
    return TrainingPlan(frames, boxes, np.stack(draws))


def mirrored_labels(augment: AugmentConfig, classes: Sequence[str]) -> Mapping[int, int]:
    """Label -> label of its mirror image, for the pairs of ``flip_label_pairs``.

    Raises:
        ConfigError: a name is no class, or stands in two pairs.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    swapped: dict[int, int] = {}
    for pair in augment.flip_label_pairs:
        for name, other in (pair, pair[::-1]):
            if name not in numbers or numbers[name] in swapped:
                raise ConfigError(
                    "stands in two pairs" if name in numbers else f"{name!r} is not a class of the shards",
                    key="data.augment.flip_label_pairs",
                    value=name,
                    hint="each pair names two classes, e.g. [[wave left, wave right]]",
                )
            if other in numbers:
                swapped[numbers[name]] = numbers[other]
    return swapped


def doubts_about(data: DataConfig, classes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, sentence) of what is allowed and most likely a mistake where these classes are to be told apart.

    * clips are mirrored, and the mirror image of a class is another one: ``from left to right``;
    * Something-Something's templates, whose actions take the whole video, are read from a part of it.
    """
    mirrors = {name.lower(): _exchanged(name) for name in classes}
    paired = {name.lower() for pair in data.augment.flip_label_pairs for name in pair}
    sided = next((n for n, other in mirrors.items() if n != other and n not in paired), None)
    if sided is not None:
        other = mirrors[sided] if mirrors[sided] in mirrors else "another class, or none"
        for key, value, way in (
            (
                "data.augment.flip",
                data.augment.flip,
                "false, or name the classes in data.augment.flip_label_pairs",
            ),
            ("data.views.crops", data.views.crops == 10, "1, 3 or 5"),
        ):
            if value:
                yield key, f"mirrors clips, and the mirror image of {sided!r} is {other!r}: set it to {way}"
    templates = sum("something" in name.lower().split() for name in classes)
    if len(classes) >= FEW_TEMPLATES and templates > 0.9 * len(classes) and data.sampling.mode != "segments":
        yield (
            "data.sampling.mode",
            "reads a part of each video, and the templates of Something-Something are about the whole of it: segments, "
            "as all published results have it, are worth 1 to 2.5 points",
        )


FEW_TEMPLATES = 20  # a data set of fewer classes may have "something" in all of them by chance


def _exchanged(name: str) -> str:
    """A class name with left and right exchanged, as words."""
    sides = {"left": "right", "right": "left"}
    return re.sub(r"(?<![a-z])(left|right)(?![a-z])", lambda found: sides[found[1]], name.lower())
