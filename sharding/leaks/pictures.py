"""Whether two clips show the same film at an offset in time, by small pictures of both.

Hashes of key frames find clips of one room and camera alike, whatever happens in them. So small pictures of both are
put side by side: they must be the same up to coding, size and brightness, and what changes from one moment to the next
must change in both. Of a view in which nothing moves the second says nothing, and only pictures that are equal count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from av.error import FFmpegError

from cliplift.sharding.video.decode import (
    VideoDecodeError,
    decoded_frames,
    open_container,
    plain_reason,
    video_stream,
)

SIDE = 32  # of the small pictures, pixels
MOMENTS = 8  # at which pictures are compared, spread over what both clips show
SLACK_SECONDS = 0.13  # by which an offset may be off: half a step between hashed pictures, and the same again
CLOSER_LOOKS = 3  # offsets around which all are tried
LEAST_SHARED_SECONDS = 0.4
MOST_GAIN = 1.6  # by which the contrast of one may be that of the other
STILL_LEVELS = 1.5  # change over the moments, root mean square of 8-bit levels, below which nothing moves
# Where something moves: what may differ, of the pictures' contrast, and of what changes over the moments; beside the
# latter what coding leaves, levels.
MOST_RESIDUAL, MOST_OF_CHANGE, CODING_LEVELS = 0.15, 0.5, 1.5
LEAST_CORRELATION = 0.8  # of what changes over the moments
MOST_STILL_RESIDUAL_LEVELS = 0.9  # where nothing moves

Ints = npt.NDArray[np.int64]
Small = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Film:
    """All pictures of a clip, small: a kilobyte each.

    Attributes:
        pictures: (T, SIDE, SIDE) gray levels, each averaged over its area.
        fps: frames a second.
    """

    pictures: Small
    fps: float

    @property
    def seconds(self) -> float:
        return len(self.pictures) / self.fps


@dataclass(frozen=True)
class Comparison:
    """What the pictures of two clips have in common.

    Attributes:
        frames: of the first clip, at the moments.
        other_frames: those of the second that show the same moments best.
        offset_seconds: what the first shows at t the second shows at t - offset.
        contrast: standard deviation of the first's pictures, 8-bit levels.
        residual: root mean square difference after a common gain and shift of brightness, levels.
        change: of the first's pictures over the moments, root mean square, levels.
        correlation: of what changes over the moments in both; 0 where nothing does.
        gain: contrast of the first for one of the second.
    """

    frames: tuple[int, ...]
    other_frames: tuple[int, ...]
    offset_seconds: float
    contrast: float
    residual: float
    change: float
    correlation: float
    gain: float

    @property
    def still(self) -> bool:
        """Whether nothing moves in the part that both show."""
        return self.change < STILL_LEVELS

    @property
    def same(self) -> bool:
        """Whether both show the same film."""
        if not 1 / MOST_GAIN <= self.gain <= MOST_GAIN:
            return False
        if self.still:
            return self.residual <= MOST_STILL_RESIDUAL_LEVELS
        most = min(MOST_RESIDUAL * self.contrast, MOST_OF_CHANGE * self.change + CODING_LEVELS)
        return self.residual <= most and self.correlation >= LEAST_CORRELATION

    @property
    def unlikeness(self) -> float:
        """What differs, in shares of what changes; the offset with the least is the likeliest."""
        return self.residual / max(self.change, STILL_LEVELS)


def small_film(data: bytes, fps: float) -> Film:
    """Decode a clip into small pictures.

    Raises:
        VideoDecodeError: it cannot be decoded.
    """
    try:
        with open_container(data) as container:
            stream = video_stream(container)
            stream.codec_context.thread_count = 1
            small = [
                frame.reformat(width=SIDE, height=SIDE, format="gray", interpolation="AREA").to_ndarray()
                for frame in decoded_frames(container, stream)
            ]
    except FFmpegError as error:
        raise VideoDecodeError(f"pyav: {plain_reason(error)}") from error
    if not small:
        raise VideoDecodeError("the clip has no frame")
    return Film(np.stack(small), fps)


def shared_part(first: Film, second: Film, offset_seconds: float) -> tuple[float, float]:
    """When, in the first clip's time, the part begins and ends that both show; seconds."""
    return max(0.0, offset_seconds), min(first.seconds, second.seconds + offset_seconds)


def compare_films(first: Film, second: Film, offsets_seconds: Sequence[float]) -> Comparison | None:
    """Compare pictures of the part that two clips share, at the offset at which they agree best.

    Args:
        first: one clip.
        second: the other.
        offsets_seconds: what the first shows at t the second may show at t - offset, about.

    Returns:
        The comparison; None where they share too little at all offsets.
    """
    far = [one for offset in offsets_seconds if (one := _at(first, second, offset)) is not None]
    far.sort(key=lambda one: (one.unlikeness, one.offset_seconds))
    slack = max(1, int(np.ceil(SLACK_SECONDS * second.fps)))
    near = [
        one
        for rough in far[:CLOSER_LOOKS]
        for shift in range(-slack, slack + 1)
        if (one := _at(first, second, rough.offset_seconds + shift / second.fps)) is not None
    ]
    return min(near, key=lambda one: (not one.same, one.unlikeness, one.offset_seconds), default=None)


def _at(first: Film, second: Film, offset_seconds: float) -> Comparison | None:
    """The comparison at one offset; None where the clips share too little."""
    begin, end = shared_part(first, second, offset_seconds)
    if end - begin < LEAST_SHARED_SECONDS:
        return None
    # In the middle of equal parts, so that no moment lies at an end that another offset moves out of the clip.
    moments = begin + (np.arange(MOMENTS) + 0.5) / MOMENTS * (end - begin)
    frames = np.unique(np.clip(np.floor(moments * first.fps), 0, len(first.pictures) - 1).astype(np.int64))
    there = np.rint((frames / first.fps - offset_seconds) * second.fps).astype(np.int64)
    others = np.clip(there, 0, len(second.pictures) - 1)
    mine, theirs = (p.astype(np.float32) for p in (first.pictures[frames], second.pictures[others]))
    centred, other = mine - mine.mean(), theirs - theirs.mean()
    power = float(np.square(other).mean())
    gain = float((centred * other).mean()) / power if power else 0.0
    moving, other_moving = mine - mine.mean(axis=0), theirs - theirs.mean(axis=0)
    change, other_change = (float(np.sqrt(np.square(part).mean())) for part in (moving, other_moving))
    both = change * other_change
    return Comparison(
        frames=tuple(frames.tolist()),
        other_frames=tuple(others.tolist()),
        offset_seconds=offset_seconds,
        contrast=float(centred.std()),
        residual=float(np.sqrt(np.square(centred - np.float32(gain) * other).mean())),
        change=change,
        correlation=float((moving * other_moving).mean()) / both if both else 0.0,
        gain=gain,
    )
