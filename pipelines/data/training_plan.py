"""Everything random about the training clips of one sample, drawn from the seed, the pass and the sample alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cliplift.configs.data import AugmentConfig, DataConfig
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.data.batch import NUM_DRAWS
from cliplift.pipelines.data.crops import Box, training_box
from cliplift.pipelines.data.order import generator
from cliplift.pipelines.data.sampling import Ints, training_frames
from cliplift.sharding.read.reader import ClipShape


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
