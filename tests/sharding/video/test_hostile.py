"""Odd, broken and hostile videos: each is in a shard and decodable, or in the ledger with its reason."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cliplift.configs.sharding import ShardRun, TranscodeConfig
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.build.verify import verify
from cliplift.sharding.manifest import REFUSED_FILE
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames
from cliplift.sharding.video.full_decode import check_clip
from cliplift.sharding.video.transcode import transcode_span

W, H, FRAMES = 96, 64, 48


def picture(number: int, *, width: int = W, height: int = H) -> np.ndarray:
    """Frame ``number`` of the test film, RGB: a bright bar moving 2 pixels a frame over ramps of red and green."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([170 - 90 * y / height, 40 + 120 * x / width, np.full((height, width), 60.0)], axis=-1)
    at = (8 + 2 * number) % (width - 8)
    frame[:, at : at + 8] = 235
    return frame.astype(np.uint8)


def write_video(
    path: Path,
    codec: str = "libx264",
    *,
    pix_fmt: str = "yuv420p",
    fps: Fraction | int = 24,
    frames: int = FRAMES,
    size: tuple[int, int] = (W, H),
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    times: list[int] | None = None,
    aspect: Fraction | None = None,
    audio_first: bool = False,
    interlaced: bool = False,
) -> Path:
    """Encode the test film. ``times`` are time stamps in units of 1/fps, where they are not 0, 1, 2, ..."""
    with av.open(str(path), "w", options=container or {}) as out:
        sound = out.add_stream("aac", rate=16000, layout="mono") if audio_first else None
        stream = out.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.thread_count = 1
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if sound is not None:
            stream.codec_context.time_base = 1 / Fraction(fps)
            _add_sound(out, sound, frames / float(fps))
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, width=size[0], height=size[1]), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts = number if times is None else times[number]
            frame.time_base = 1 / Fraction(fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def _add_sound(out: Any, sound: Any, seconds: float) -> None:
    for start in range(0, int(seconds * 16000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, start
        out.mux(sound.encode(frame))
    out.mux(sound.encode(None))


def cut(path: Path, **changes: Any) -> Any:
    """Transcode a whole file with the default settings."""
    config = TranscodeConfig.model_validate({"crf": 12} | changes)
    return transcode_span(path, start_seconds=0.0, end_seconds=None, config=config)


def bar_positions(clip: bytes) -> list[float]:
    """Where the bar stands in each frame, pixels of the test film."""
    count = check_clip(clip).frames
    frames = decode_frames(clip, range(count), decoder="pyav").astype(float)
    found = []
    for frame in frames:
        columns = frame[..., 2].mean(axis=0)  # only the bar has blue above 60
        columns = np.clip(columns - 110, 0, None)
        found.append(
            float((columns * np.arange(len(columns))).sum() / columns.sum()) * W / len(columns) - 3.5
        )
    return found


def expected_positions(numbers: list[int]) -> list[int]:
    return [(8 + 2 * n) % (W - 8) for n in numbers]


def assert_shows(clip: bytes, numbers: list[int], *, tolerance_pixels: float = 0.7) -> None:
    """Frame k of the clip shows frame ``numbers[k]`` of the film: a bar 2 pixels off would be the next frame."""
    np.testing.assert_allclose(bar_positions(clip), expected_positions(numbers), atol=tolerance_pixels)


GOOD: dict[str, Callable[[Path], Path]] = {
    "h264 mp4": lambda d: write_video(d / "a.mp4"),
    "h264 10 bit": lambda d: write_video(d / "a.mp4", pix_fmt="yuv420p10le"),
    "h264 4:4:4": lambda d: write_video(d / "a.mp4", pix_fmt="yuv444p"),
    "h264 open gop": lambda d: write_video(
        d / "a.mp4", options={"x264-params": "open-gop=1:keyint=12:bframes=3"}
    ),
    "h264 fragmented": lambda d: write_video(d / "a.mp4", container={"movflags": "frag_keyframe+empty_moov"}),
    "h264 transport stream": lambda d: write_video(d / "a.ts"),
    "h264 flv": lambda d: write_video(d / "a.flv"),
    "h264 avi": lambda d: write_video(d / "a.avi", options={"bf": "0"}),
    "hevc": lambda d: write_video(d / "a.mp4", "libx265", options={"x265-params": "log-level=none"}),
    "vp9 webm": lambda d: write_video(
        d / "a.webm", "libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"}
    ),
    "av1 mkv": lambda d: write_video(
        d / "a.mkv", "libsvtav1", options={"preset": "12", "svtav1-params": "lp=1"}
    ),
    "mpeg4 avi": lambda d: write_video(d / "a.avi", "mpeg4", options={"qscale": "2", "flags": "+qscale"}),
    "mpeg4 with b frames": lambda d: write_video(d / "a.avi", "mpeg4", options={"bf": "2", "b": "2000000"}),
    "mpeg2 transport stream": lambda d: write_video(
        d / "a.ts", "mpeg2video", options={"b": "4000000", "bf": "2"}
    ),
    "mpeg2 program stream": lambda d: write_video(d / "a.mpg", "mpeg2video", options={"b": "4000000"}),
    "mjpeg avi": lambda d: write_video(d / "a.avi", "mjpeg", pix_fmt="yuvj420p", options={"q": "2"}),
    "wmv2": lambda d: write_video(d / "a.wmv", "wmv2", options={"b": "3000000"}),
    "sound first": lambda d: write_video(d / "a.mp4", audio_first=True),
    "prores": lambda d: write_video(d / "a.mov", "prores_ks", pix_fmt="yuv422p10le"),
    "ffv1": lambda d: write_video(d / "a.mkv", "ffv1"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_every_frame_of_every_format_arrives(kind: str, tmp_path: Path) -> None:
    clip = cut(GOOD[kind](tmp_path))
    assert (clip.checked.width, clip.checked.height, clip.checked.fps) == (W, H, 24)
    assert_shows(clip.data, list(range(FRAMES)))


@pytest.mark.parametrize(
    "kind", ["h264 mp4", "h264 open gop", "mpeg2 transport stream", "wmv2", "vp9 webm", "av1 mkv"]
)
def test_a_span_starts_at_its_frame(kind: str, tmp_path: Path) -> None:
    path = GOOD[kind](tmp_path)
    clip = transcode_span(path, start_seconds=30 / 24, end_seconds=42 / 24, config=TranscodeConfig(crf=12))
    assert_shows(clip.data, list(range(30, 42)))


def test_colours_survive_range_and_matrix(tmp_path: Path) -> None:
    """Full-range MJPEG, and BT.709 by tag: colours come out as they went in."""
    from av.video.reformatter import ColorRange, Colorspace

    for name, space, color_range, tag in (("mjpeg.avi", 5, 2, None), ("bt709.mp4", 1, 1, 1)):
        path = tmp_path / name
        with av.open(str(path), "w") as out:
            stream = out.add_stream(
                "mjpeg" if tag is None else "libx264", rate=24, options={"q": "2", "crf": "8"}
            )
            stream.width, stream.height = W, H
            stream.pix_fmt = "yuvj420p" if tag is None else "yuv420p"
            if tag is not None:
                stream.codec_context.colorspace, stream.codec_context.color_range = tag, color_range
            for number in range(24):
                frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24").reformat(
                    format=stream.pix_fmt,
                    dst_colorspace=Colorspace(space),
                    dst_color_range=ColorRange(color_range),
                )
                frame.pts = number
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        clip = cut(path)
        for decoder in ("pyav", "decord"):
            found = decode_frames(clip.data, [5], decoder=decoder)[0].astype(int)
            # A wrong range shifts levels by up to 16, a wrong matrix by up to 20; 4:2:0 and crf 12 cost far less.
            assert np.abs(found - picture(5)).mean() < 5, (name, decoder)


def test_decoders_agree_bit_for_bit(tmp_path: Path) -> None:
    data = cut(write_video(tmp_path / "a.mp4", frames=100)).data
    numbers = [99, 0, 3, 3, 50, 17]
    np.testing.assert_array_equal(
        decode_frames(data, numbers, decoder="decord"), decode_frames(data, numbers, decoder="pyav")
    )
    for decoder in ("decord", "pyav"):
        with pytest.raises(VideoDecodeError, match="does not exist"):
            decode_frames(data, [100], decoder=decoder)
        with pytest.raises(VideoDecodeError):
            decode_frames(data[: len(data) // 2], [99], decoder=decoder)
        with pytest.raises(VideoDecodeError):
            decode_frames(b"no video", [0], decoder=decoder)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((95, 63), 256, (96, 64)),
        ((96, 64), 32, (48, 32)),
        ((64, 96), 32, (32, 48)),
        ((341, 257), 128, (170, 128)),
    ],
)
def test_sizes_become_even_and_keep_their_shape(
    size: tuple[int, int], short_side: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    path = write_video(tmp_path / "a.mp4", size=size, pix_fmt="yuv444p", frames=10)
    clip = cut(path, short_side_pixels=short_side)
    assert (clip.checked.width, clip.checked.height) == expected


def test_wide_pixels_become_square(tmp_path: Path) -> None:
    clip = cut(write_video(tmp_path / "a.mp4", aspect=Fraction(2)))
    assert (clip.checked.width, clip.checked.height) == (2 * W, H)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(degrees: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    _set_rotation(path, degrees)
    clip = cut(path)
    shown = decode_frames(clip.data, [0], decoder="pyav")[0].astype(int)
    # decord turns frames itself: the independent judge of which way is up.
    expected = np.rot90(picture(0), k=-degrees // 90)
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).mean() < 6
    decoded = decode_frames(path.read_bytes(), [0], decoder="decord")[0].astype(int)
    assert np.abs(shown - decoded).mean() < 6


def _set_rotation(path: Path, degrees: int) -> None:
    """Write the display matrix of a phone held sideways into the track header (ISO 14496-12, 8.3.2)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix stands 40 bytes into the box
    one = 1 << 16
    matrix = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    for i, value in zip((0, 4, 12, 16), matrix, strict=True):
        data[at + i : at + i + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(data)


def test_variable_frame_rate_becomes_constant(tmp_path: Path) -> None:
    times = [*range(24), *range(24, 72, 2)]  # a second at full rate, then two seconds at half
    clip = cut(write_video(tmp_path / "a.mkv", times=times), fps=24)
    shown = [*range(24), *(24 + k // 2 for k in range(47))]
    assert_shows(clip.data, shown)


def test_fast_sources_keep_every_nth_frame(tmp_path: Path) -> None:
    clip = cut(write_video(tmp_path / "a.mp4", fps=Fraction(60000, 1001), frames=60))
    assert clip.checked.fps == Fraction(30000, 1001)
    shown = bar_positions(clip.data)
    assert len(shown) == 30
    steps = np.diff(shown)
    assert np.abs(steps[steps > 0] - 4).max() < 1.5


def test_interlaced_frames_are_woven(tmp_path: Path) -> None:
    """Fields of two moments in one frame: rows alternate. After deinterlacing they no longer comb."""
    path = tmp_path / "a.mp4"
    options = {"x264-params": "interlaced=1:tff=1", "crf": "8"}
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for number in range(20):
            rows = picture(4 * number)
            rows[1::2] = picture(4 * number + 4)[1::2]
            frame = av.VideoFrame.from_ndarray(rows, format="rgb24").reformat(format="yuv420p")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))

    def combing(clip: bytes) -> float:
        luma = decode_frames(clip, range(4, 16), decoder="pyav").astype(float).mean(axis=-1)
        return float(np.abs(luma[:, 1:-1] - (luma[:, :-2] + luma[:, 2:]) / 2).mean())

    woven, kept = cut(path), cut(path, deinterlace="never")
    assert woven.checked.frames == kept.checked.frames == 20
    assert combing(woven.data) < combing(kept.data) / 4


def test_an_edit_list_is_obeyed(tmp_path: Path) -> None:
    """``-ss -c copy`` leaves frames before the first shown one in the file; they must not appear."""
    whole = write_video(tmp_path / "whole.mp4", options={"x264-params": "keyint=48:bframes=0"})
    path = tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts -= (
                    20 * 512
                )  # 24 frames/s in a time base of 1/12288: the first 20 frames lie before zero
                packet.dts -= 20 * 512
                packet.stream = stream
                out.mux(packet)
    assert_shows(cut(path).data, list(range(20, FRAMES)))


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "zero bytes": (lambda d: _write(d / "a.mp4", b""), "cannot be opened"),
    "text": (lambda d: _write(d / "a.mp4", b"hello " * 100), "cannot be opened"),
    "random": (lambda d: _write(d / "a.mp4", random.Random(0).randbytes(5000)), "cannot be opened"),
    "sound only": (lambda d: _sound_only(d / "a.mp4"), "no video stream"),
    "one frame": (lambda d: write_video(d / "a.mp4", frames=1), "too short: 1 frames"),
    "longer than allowed": (lambda d: write_video(d / "a.mp4", fps=1, frames=310, size=(32, 32)), "too long"),
}


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _sound_only(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        _add_sound(out, out.add_stream("aac", rate=16000, layout="mono"), 2.0)
    return path


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_clip_is_refused_with_a_reason(kind: str, tmp_path: Path) -> None:
    make, reason = REFUSED[kind]
    with pytest.raises(VideoDecodeError, match=reason):
        cut(make(tmp_path))


def test_cover_art_is_not_the_video(tmp_path: Path) -> None:
    """A picture attached before the film (disposition attached_pic) is passed over."""
    path = tmp_path / "a.mkv"
    film = write_video(tmp_path / "film.mp4")
    cover = io.BytesIO()
    with av.open(cover, "w", format="mjpeg") as out:
        stream = out.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        out.mux(stream.encode(av.VideoFrame(64, 64, "yuvj420p")))
        out.mux(stream.encode(None))
    with av.open(str(film)) as source, av.open(str(path), "w") as out:
        art = out.add_stream("mjpeg", rate=1)
        art.width, art.height, art.pix_fmt = 64, 64, "yuvj420p"
        art.disposition = av.stream.Disposition.attached_pic
        stream = out.add_stream_from_template(source.streams.video[0])
        out.mux(art.encode(av.VideoFrame(64, 64, "yuvj420p")))
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    try:
        assert_shows(cut(path).data, list(range(FRAMES)))
    except VideoDecodeError as error:
        # A container that does not keep the flag makes the cover a one-frame video: refused, never a wrong clip.
        assert "too short" in str(error)  # noqa: PT017


def test_a_change_of_size_inside_a_clip(tmp_path: Path) -> None:
    """Same shape: scaled to the first size. Another shape: refused, not stretched."""
    parts = [write_video(tmp_path / "1.ts", size=(96, 64)).read_bytes()]
    same = _write(
        tmp_path / "same.ts", parts[0] + write_video(tmp_path / "2.ts", size=(144, 96)).read_bytes()
    )
    other = _write(
        tmp_path / "other.ts", parts[0] + write_video(tmp_path / "3.ts", size=(96, 96)).read_bytes()
    )
    try:
        clip = cut(same)
    except VideoDecodeError as error:
        assert str(error)  # noqa: PT017
    else:
        assert (clip.checked.width, clip.checked.height) == (96, 64)
    with pytest.raises(VideoDecodeError):
        cut(other)


def test_truncated_files_are_refused_or_whole(tmp_path: Path) -> None:
    """At no point of a cut may a shorter clip pass for the whole one."""
    for suffix, container in ((".mp4", {"movflags": "faststart"}), (".mkv", {}), (".avi", {}), (".ts", {})):
        path = write_video(tmp_path / f"whole{suffix}", container=container)
        data = path.read_bytes()
        for eighth in range(1, 8):
            part = _write(tmp_path / f"part{suffix}", data[: len(data) * eighth // 8])
            try:
                clip = cut(part)
            except VideoDecodeError:
                continue
            # A transport stream claims only what it holds: its rest is a film of its own, shown from the start.
            assert suffix in (".ts", ".avi", ".mkv")
            shown = bar_positions(clip.data)
            # Of the last group of B frames some may be missing: their packets lay behind the cut.
            whole = len(shown) - 4
            np.testing.assert_allclose(shown[:whole], expected_positions(list(range(whole))), atol=0.7)


def _fuzzed(data: bytes, draw: random.Random) -> bytes:
    spoiled = bytearray(data)
    kind = draw.randrange(4)
    if kind == 0:
        return bytes(spoiled[: draw.randrange(len(spoiled))])
    if kind == 1:
        start = draw.randrange(len(spoiled))
        spoiled[start : start + draw.randrange(1, 400)] = b""
    else:
        for _ in range(draw.choice((1, 4, 40, 400))):
            spoiled[draw.randrange(len(spoiled))] ^= 1 << draw.randrange(8)
    return bytes(spoiled)


def _fuzz(folder: Path, output: Path, count: int, make_run: Callable[..., ShardRun]) -> dict[str, int]:
    """Build shards of fuzzed files and check that each is accounted for. Reasons and their counts."""
    seeds = []
    (folder / "seeds").mkdir(parents=True)
    for kind in ("h264 mp4", "h264 transport stream", "mpeg4 avi", "vp9 webm", "hevc", "wmv2", "mjpeg avi"):
        path = GOOD[kind](folder / "seeds")
        seeds.append((path.suffix, path.read_bytes()))
    draw = random.Random(count)
    (folder / "videos").mkdir()
    for number in range(count):
        suffix, data = seeds[number % len(seeds)]
        _write(folder / "videos" / f"{number:04d}{suffix}", _fuzzed(data, draw))
    run = make_run(
        output,
        source={"kind": "folder", "root": str(folder / "videos"), "layout": "flat"},
        limits={"max_refused_share": 1.0, "clip_timeout_seconds": 20.0},
        shards={"videos_per_shard": 50},
    )
    report = run_shard(run)
    dataset = ShardDataset(str(output))
    ledger = [json.loads(line) for line in (output / REFUSED_FILE).read_text().splitlines()]
    accounted = [dataset.facts(i).source for i in range(len(dataset))] + [entry["source"] for entry in ledger]
    assert sorted(accounted) == sorted(p.name for p in (folder / "videos").iterdir())
    assert all(entry["reason"] for entry in ledger)
    assert verify(str(output), decode="full").ok
    return report.refused


@pytest.mark.slow
def test_fuzzed_files_are_all_accounted_for(tmp_path: Path, make_run: Callable[..., ShardRun]) -> None:
    refused = _fuzz(tmp_path, tmp_path / "out", 70, make_run)
    assert sum(refused.values()) > 10


@pytest.mark.exhaustive
@pytest.mark.slow
def test_many_fuzzed_files_are_all_accounted_for(tmp_path: Path, make_run: Callable[..., ShardRun]) -> None:
    refused = _fuzz(tmp_path, tmp_path / "out", 700, make_run)
    assert set(refused) <= {"transcode", "probe"}  # no crash, no time-out
