"""One clip of a raw video -> a stored clip: H.264, closed GOPs, constant frame rate, upright square pixels.

One decode and one encode. Rotation is applied, interlaced frames are woven into whole ones, colours become BT.601
limited range (what every decoder assumes of an untagged small video), sound is dropped.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.frames import Upright, constant_rate, progressive_frames, timed_frames
from cliplift.sharding.video import (
    CheckedClip,
    Frames,
    VideoDecodeError,
    check_clip,
    claimed_seconds,
    frame_rate,
    open_container,
    video_stream,
)

FALLBACK_FPS = Fraction(25)


@dataclass(frozen=True)
class EncodedClip:
    """A stored clip and what its full decode proved."""

    data: bytes
    checked: CheckedClip
    start_seconds: float
    end_seconds: float
    source: dict[str, Any] = field(default_factory=dict)


def target_rate(source: Fraction, config: TranscodeConfig) -> Fraction:
    """Frame rate of the stored clip: the source's over the smallest whole number that brings it under the cap."""
    if config.fps is not None:
        return Fraction(config.fps).limit_denominator(1001)
    return source / max(1, math.ceil(source / Fraction(config.max_fps).limit_denominator(1001)))


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
    """
    with open_container(path) as container:
        stream = video_stream(container)
        stream.codec_context.thread_count = 1
        source_fps = frame_rate(stream) or FALLBACK_FPS
        fps = target_rate(source_fps, config)
        claimed = claimed_seconds(container, stream)
        timed = timed_frames(container, stream, start_seconds=start_seconds, source_fps=source_fps)
        timed = progressive_frames(timed, config, time_base=stream.time_base)
        chosen = constant_rate(
            timed, start=start_seconds, end=end_seconds, source_fps=source_fps, fps=fps, config=config
        )
        upright = Upright(config, stream.time_base, sample_aspect=stream.sample_aspect_ratio)
        try:
            data = encode(upright.frames(chosen), fps=fps, config=config)
        except FFmpegError as error:
            raise VideoDecodeError(f"decode: {error.strerror}") from error
        facts = {
            "width": stream.codec_context.width,
            "height": stream.codec_context.height,
            "fps": round(float(source_fps), 6),
            "codec": stream.codec_context.name,
            "pix_fmt": stream.codec_context.pix_fmt,
            "container": container.format.name,
            "duration_seconds": claimed,
            "rotation": upright.rotation,
        }
    checked = check_clip(data)
    _refuse_short(checked, fps=fps, start=start_seconds, end=end_seconds, claimed=claimed, config=config)
    if checked.frames != upright.emitted:
        raise VideoDecodeError(f"check: {upright.emitted} frames were encoded, {checked.frames} decode")
    end = start_seconds + float(checked.frames / fps)
    return EncodedClip(data, checked, start_seconds=start_seconds, end_seconds=round(end, 6), source=facts)


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


def encoder_options(config: TranscodeConfig) -> dict[str, str]:
    """x264 options for closed, regular groups of pictures."""
    options = {
        "preset": config.preset,
        "crf": str(config.crf),
        "x264-params": (
            f"keyint={config.gop_frames}:min-keyint={config.gop_frames}:scenecut=0:open-gop=0:"
            f"bframes={min(config.b_frames, max(0, config.gop_frames - 2))}:threads=1:lookahead-threads=1"
        ),
    }
    return options if config.tune == "none" else options | {"tune": config.tune}


def encode(frames: Iterable[Any], *, fps: Fraction, config: TranscodeConfig) -> bytes:
    """Encode yuv420p PyAV frames of one size as a stored clip.

    Raises:
        VideoDecodeError: there is no frame.
    """
    # A file rather than memory: moving the index to the front (faststart) reads the file again by name.
    with tempfile.TemporaryDirectory(prefix="cliplift-") as folder:
        path = Path(folder) / "clip.mp4"
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        count = 0
        with av.open(str(path), "w", format="mp4", options=options) as out:
            stream: Any = None
            for frame in frames:
                if stream is None:
                    stream = out.add_stream("libx264", rate=fps, options=encoder_options(config))
                    stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p"
                    stream.codec_context.thread_count = 1
                    stream.codec_context.time_base = 1 / fps
                    stream.codec_context.colorspace = 6  # smpte170m, the matrix of BT.601
                    stream.codec_context.color_range = 1  # limited
                frame.pts, frame.time_base = count, 1 / fps
                frame.pict_type = 0
                count += 1
                out.mux(stream.encode(frame))
            if stream is None:
                raise VideoDecodeError("decode: no frame in the span")
            out.mux(stream.encode(None))
        return path.read_bytes()


def encode_array(frames: Frames, *, fps: Fraction, config: TranscodeConfig) -> bytes:
    """Encode uint8 RGB frames (T, H, W, 3) of even size as a stored clip."""
    pictures = (
        av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=5, dst_color_range=1
        )
        for frame in frames
    )
    return encode(pictures, fps=fps, config=config)
