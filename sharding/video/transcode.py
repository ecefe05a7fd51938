"""One clip of a raw video -> a stored clip: closed GOPs, constant frame rate, upright square pixels.

One decode and one encode. Rotation is applied, interlaced frames are woven into whole ones, colours become BT.601
limited range (what every decoder assumes of an untagged small video), sound is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import NotRequired, TypedDict

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.video.decode import (
    Frames,
    PastTheEndError,
    VideoDecodeError,
    claimed_seconds,
    frame_rate,
    open_container,
    video_stream,
)
from cliplift.sharding.video.encode import encode
from cliplift.sharding.video.full_decode import CheckedClip, check_clip
from cliplift.sharding.video.passes import Pass, Passes
from cliplift.sharding.video.regular_frames import (
    FALLBACK_FPS,
    Upright,
    constant_rate,
)
from cliplift.sharding.video.remux import NotCopiedError, copy_span


class SourceFacts(TypedDict):
    """What a clip's source was, as the sample's JSON tells it."""

    width: int
    height: int
    fps: float
    codec: str
    pix_fmt: str | None
    container: str
    duration_seconds: float | None
    rotation: int  # degrees
    copied: NotRequired[bool]
    frames_left_out: NotRequired[int]  # frames of the span that `fps` or `max_fps` leave no place for


@dataclass(frozen=True)
class EncodedClip:
    """A stored clip and what its full decode proved."""

    data: bytes
    checked: CheckedClip
    start_seconds: float
    end_seconds: float
    source: SourceFacts
    not_copied: str | None = None


class SpanCutter:
    """Cuts the spans of one video file, given in order of their starts; to be used in a ``with``.

    A container that cannot be entered in the middle is decoded once for all its spans, not from the start for each.

    Args:
        path: local video file.
        config: how to encode.
        alive: called now and then while frames before a span are passed over.
    """

    def __init__(
        self, path: str | Path, config: TranscodeConfig, *, alive: Callable[[], None] = lambda: None
    ) -> None:
        self._path, self._config = path, config
        self._passes = Passes(path, config, alive=alive)

    def __enter__(self) -> SpanCutter:
        return self

    def __exit__(self, *_: object) -> None:
        self._passes.close()

    def cut(self, *, start_seconds: float, end_seconds: float | None) -> EncodedClip:
        """Cut one span as ``config.mode`` says; arguments and errors as of :func:`transcode_span`.

        A copied clip says so in its source facts; one that could not be copied is encoded and says why.
        """
        if self._config.mode == "encode":
            return self._encoded(start_seconds, end_seconds)
        try:
            return self._copied(start_seconds, end_seconds)
        except NotCopiedError as reason:
            return replace(self._encoded(start_seconds, end_seconds), not_copied=str(reason))

    def _encoded(self, start: float, end: float | None) -> EncodedClip:
        return _transcoded(self._passes.to(start), start=start, end=end, config=self._config)

    def _copied(self, start: float, end: float | None) -> EncodedClip:
        with open_container(self._path) as container:
            stream = video_stream(container)
            copy = copy_span(container, stream, start_seconds=start, end_seconds=end, config=self._config)
            facts = _source_facts(container, stream, rotation=0)
            facts["copied"] = True
        return _accepted(
            copy.data, copy.checked, facts, start=start, end=end, fps=copy.checked.fps, config=self._config
        )


def transcode_span(
    path: str | Path, *, start_seconds: float, end_seconds: float | None, config: TranscodeConfig
) -> EncodedClip:
    """Cut and encode one span of a video file, then decode the result in full.

    Args:
        path: local video file.
        start_seconds: start of the span after the first frame of the video, seconds.
        end_seconds: end of the span, seconds; None is the end of the video.
        config: how to encode.

    Raises:
        VideoDecodeError: the span cannot be read whole, or the written clip does not decode.
        PastTheEndError: the video has no frame in the span or behind it.
    """
    with closing(Passes(path, config)) as passes:
        return _transcoded(passes.to(start_seconds), start=start_seconds, end=end_seconds, config=config)


def _transcoded(video: Pass, *, start: float, end: float | None, config: TranscodeConfig) -> EncodedClip:
    left_out: list[float] = []
    chosen = constant_rate(
        video.frames(start),
        start=start,
        end=end,
        source_fps=video.source_fps,
        fps=video.fps,
        config=config,
        left_out=left_out,
    )
    upright = Upright(config, video.time_base, sample_aspect=video.sample_aspect)
    try:
        data = encode(upright.frames(chosen), fps=video.fps, config=config)
    except FFmpegError as error:
        raise VideoDecodeError(f"decode: {error.strerror}") from error
    except VideoDecodeError as error:
        if start > 0 and upright.ended and not upright.emitted:
            raise PastTheEndError(f"the video ends before {start:.2f} s") from error
        raise
    facts = _source_facts(video.container, video.stream, rotation=upright.rotation)
    if left_out:
        facts["frames_left_out"] = len(left_out)
    if video.clock.skipped and facts["duration_seconds"] is not None:
        # The container counts what the time stamps jumped over.
        facts["duration_seconds"] -= video.clock.skipped
    checked = check_clip(data, hash_pictures=True)
    if checked.frames != upright.emitted:
        raise VideoDecodeError(f"check: {upright.emitted} frames were encoded, {checked.frames} decode")
    return _accepted(data, checked, facts, start=start, end=end, fps=video.fps, config=config)


def _source_facts(container: InputContainer, stream: VideoStream, *, rotation: int) -> SourceFacts:
    return {
        "width": stream.codec_context.width,
        "height": stream.codec_context.height,
        "fps": round(float(frame_rate(stream) or FALLBACK_FPS), 6),
        "codec": stream.codec_context.name,
        "pix_fmt": stream.codec_context.pix_fmt,
        "container": container.format.name,
        "duration_seconds": claimed_seconds(container, stream),
        "rotation": rotation,
    }


def _accepted(
    data: bytes,
    checked: CheckedClip,
    facts: SourceFacts,
    *,
    start: float,
    end: float | None,
    fps: Fraction,
    config: TranscodeConfig,
) -> EncodedClip:
    """A clip that decodes, if it is as long as it should be."""
    _refuse_short(checked, fps=fps, start=start, end=end, claimed=facts["duration_seconds"], config=config)
    return EncodedClip(
        data,
        checked,
        start_seconds=start,
        end_seconds=round(start + float(checked.frames / fps), 6),
        source=facts,
    )


def _refuse_short(
    checked: CheckedClip,
    *,
    fps: Fraction,
    start: float,
    end: float | None,
    claimed: float | None,
    config: TranscodeConfig,
) -> None:
    if checked.frames < config.min_frames:
        raise VideoDecodeError(f"too short: {checked.frames} frames, {config.min_frames} needed")
    limits = [limit for limit in (end, claimed) if limit is not None]
    if not limits:
        return
    expected = min(limits) - start
    missing = expected - float(checked.frames / fps)
    # Half a second of slack: the last frame's length and rounded durations are not losses.
    if missing > max(0.5, config.max_missing_share * expected):
        raise VideoDecodeError(f"truncated: {expected:.2f} s claimed, {expected - missing:.2f} s decode")


def encode_array(frames: Frames, *, fps: Fraction, config: TranscodeConfig) -> bytes:
    """Encode uint8 RGB frames (T, H, W, 3) of even size as a stored clip."""
    pictures = (
        av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=5, dst_color_range=1
        )
        for frame in frames
    )
    return encode(pictures, fps=fps, config=config)
