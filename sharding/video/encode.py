"""Upright frames of one size -> a stored clip: closed, regular groups of pictures, index of the file in front.

Two encoders give clips of the same kind: PyAV in this process (the default), and the ffmpeg command line, fed with raw
frames through a pipe, for a build of ffmpeg with codecs that PyAV's lacks.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.video.decode import VideoDecodeError

LIBRARIES = {"h264": "libx264", "hevc": "libx265", "av1": "libsvtav1"}
# SVT-AV1 counts its presets, 0 the slowest; below 3 they are for research.
AV1_PRESETS = {
    "ultrafast": 12, "superfast": 11, "veryfast": 10, "faster": 9, "fast": 8,
    "medium": 6, "slow": 5, "slower": 4, "veryslow": 3,
}  # fmt: skip
# x265 (4.1, in PyAV 18) writes past its memory on smaller pictures: glibc's checks stop it on 48 x 48.
HEVC_LEAST_PIXELS = 64
SMPTE170M, LIMITED = 6, 1  # the matrix of BT.601, and its range


def require_encoder(config: TranscodeConfig) -> None:
    """Check that the chosen encoder exists here, before a build starts.

    Raises:
        ConfigError: it does not, naming the setting and what does exist.
    """
    library = LIBRARIES[config.codec]
    if config.encoder == "pyav":
        here = [codec for codec, name in LIBRARIES.items() if name in av.codecs_available]
        where = f"this PyAV ({av.__version__})"
    elif shutil.which("ffmpeg") is None:
        raise ConfigError(
            "there is no ffmpeg on the path",
            key="transcode.encoder",
            value="ffmpeg",
            hint="install it, or use pyav",
        )
    else:
        listed = subprocess.run(
            ["ffmpeg", "-v", "error", "-encoders"], capture_output=True, text=True, check=True
        )
        here = [codec for codec, name in LIBRARIES.items() if f" {name} " in listed.stdout]
        where = "this ffmpeg"
    if config.codec not in here:
        raise ConfigError(
            f"{where} has no encoder {library}",
            key="transcode.codec",
            value=config.codec,
            hint=f"it can encode {', '.join(here) or 'none of ours'}",
        )


def encoder_options(config: TranscodeConfig) -> dict[str, str]:
    """Options of the encoder for closed, regular groups of pictures, on one thread."""
    gop, b_frames = config.gop_frames, min(config.b_frames, max(0, config.gop_frames - 2))
    fast = config.tune == "fastdecode"
    if config.codec == "av1":
        parameters = f"keyint={gop}:irefresh-type=2:scd=0:lp=1:fast-decode={int(fast)}"
        return {
            "preset": str(AV1_PRESETS[config.preset]),
            "crf": str(config.crf),
            "g": str(gop),
            "svtav1-params": parameters,
        }
    options = {"preset": config.preset, "crf": str(config.crf)} | ({"tune": "fastdecode"} if fast else {})
    regular = f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes={b_frames}"
    if config.codec == "hevc":
        return options | {"x265-params": f"{regular}:pools=none:frame-threads=1:log-level=error"}
    return options | {"x264-params": f"{regular}:threads=1:lookahead-threads=1"}


def encode(frames: Iterable[VideoFrame], *, fps: Fraction, config: TranscodeConfig) -> bytes:
    """Encode yuv420p PyAV frames of one size as a stored clip.

    Raises:
        VideoDecodeError: there is no frame, or the encoder failed.
    """
    # A file rather than memory: moving the index to the front (faststart) reads the file again by name.
    with scratch_folder() as folder:
        path = folder / "clip.mp4"
        if config.codec == "hevc":
            frames = _large_enough(frames)
        if config.encoder == "ffmpeg":
            _with_command(frames, path, fps=fps, config=config)
        else:
            _in_process(frames, path, fps=fps, config=config)
        return path.read_bytes()


def _large_enough(frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    for frame in frames:
        if min(frame.width, frame.height) < HEVC_LEAST_PIXELS:
            raise VideoDecodeError(
                f"hevc: x265 is not safe below {HEVC_LEAST_PIXELS} pixels, the clip has"
                f" {frame.width}x{frame.height}; use codec: h264"
            )
        yield frame


def _in_process(frames: Iterable[VideoFrame], path: Path, *, fps: Fraction, config: TranscodeConfig) -> None:
    count = 0
    with av.open(
        f"file:{path.absolute()}",
        "w",
        format="mp4",
        options={"movflags": "+faststart", "fflags": "+bitexact"},
    ) as out:
        stream: VideoStream | None = None
        for frame in frames:
            if stream is None:
                stream = _encoder(out, frame, fps=fps, config=config)
            frame.pts, frame.time_base = count, 1 / fps
            frame.pict_type = 0
            count += 1
            out.mux(stream.encode(frame))
        if stream is None:
            raise VideoDecodeError("decode: no frame in the span")
        out.mux(stream.encode(None))


def _encoder(
    out: OutputContainer, first: VideoFrame, *, fps: Fraction, config: TranscodeConfig
) -> VideoStream:
    """The stream of an mp4 that encodes frames like this one."""
    stream = out.add_stream(LIBRARIES[config.codec], rate=fps, options=encoder_options(config))
    assert isinstance(stream, VideoStream)
    stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
    stream.codec_context.thread_count = 1
    stream.codec_context.time_base = 1 / fps
    stream.codec_context.colorspace, stream.codec_context.color_range = SMPTE170M, LIMITED
    if config.codec == "hevc":
        stream.codec_context.codec_tag = "hvc1"  # Apple's players require this tag
    return stream


def _with_command(
    frames: Iterable[VideoFrame], path: Path, *, fps: Fraction, config: TranscodeConfig
) -> None:
    process: subprocess.Popen[bytes] | None = None
    messages = path.with_suffix(".log")
    with (
        messages.open("wb") as log,
        suppress(BrokenPipeError),
    ):  # it ended early: its messages are read below
        try:
            for frame in frames:
                if process is None:
                    command = ffmpeg_command(frame.width, frame.height, path, fps=fps, config=config)
                    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
                assert process.stdin is not None
                process.stdin.write(frame.to_ndarray().tobytes())
        finally:
            if process is not None:
                process.communicate()  # closes its input, so that it writes the end of the file
    if process is None:
        raise VideoDecodeError("decode: no frame in the span")
    if process.returncode:
        lines = messages.read_text(errors="replace").strip().splitlines()
        raise VideoDecodeError(
            f"ffmpeg: exit status {process.returncode}: {lines[-1] if lines else 'no message'}"
        )


def ffmpeg_command(
    width: int, height: int, path: Path, *, fps: Fraction, config: TranscodeConfig
) -> list[str]:
    """The command that encodes raw yuv420p frames from its standard input."""
    command = [
        "ffmpeg",
        "-nostdin",
        "-v",
        "error",
        "-y",
        "-threads",
        "1",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "yuv420p",
    ]
    command += [
        "-colorspace",
        "smpte170m",
        "-color_range",
        "tv",
        "-s",
        f"{width}x{height}",
        "-r",
        str(fps),
        "-i",
        "-",
    ]
    command += [
        "-c:v",
        LIBRARIES[config.codec],
        "-threads",
        "1",
        "-colorspace",
        "smpte170m",
        "-color_range",
        "tv",
    ]
    command += [word for name, value in encoder_options(config).items() for word in (f"-{name}", value)]
    if config.codec == "hevc":
        command += ["-tag:v", "hvc1"]
    return [
        *command,
        "-movflags",
        "+faststart",
        "-fflags",
        "+bitexact",
        "-f",
        "mp4",
        f"file:{path.absolute()}",
    ]
