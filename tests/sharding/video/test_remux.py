"""``mode: copy``: what fits is cut without re-encoding, same pixels; what does not is encoded, counted, explained."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cliplift.configs.sharding import ShardRun, TranscodeConfig
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.manifest import BUILD_FILE
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames
from cliplift.sharding.video.transcode import EncodedClip, SpanCutter, encode_array

COPY = TranscodeConfig(mode="copy")
GOP = "keyint=16:min-keyint=16:scenecut=0"


def film(frames: int = 96, *, width: int = 96, height: int = 64) -> np.ndarray:
    """Every frame differs from every other, (T, H, W, 3)."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    field = 128 + 90 * np.sin((x + 3 * t) / 9) * np.cos((y + t) / 11)
    return np.stack([field, 255 - field, np.full_like(field, 60.0)], axis=-1).astype(np.uint8)


def cut_span(
    video: Path, *, start_seconds: float, end_seconds: float | None, config: TranscodeConfig
) -> EncodedClip:
    with SpanCutter(video, config) as cutter:
        return cutter.cut(start_seconds=start_seconds, end_seconds=end_seconds)


def write(
    path: Path,
    codec: str = "libx264",
    *,
    params: str = GOP,
    fps: Fraction | int = 24,
    pix_fmt: str = "yuv420p",
    times: list[int] | None = None,
    size: tuple[int, int] = (96, 64),
    change: Callable[[Any], None] = lambda context: None,
) -> Path:
    options = {"x264-params": params} if codec == "libx264" else {}
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        change(stream.codec_context)
        for number, pixels in enumerate(film(width=size[0], height=size[1])):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = number if times is None else times[number], 1 / Fraction(fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("fps", [Fraction(24), Fraction(30000, 1001)], ids=str)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(("first", "last"), [(0, None), (16, 64), (32, None), (0, 32)])
def test_a_fitting_span_keeps_every_pixel(
    tmp_path: Path, suffix: str, fps: Fraction, first: int, last: int | None
) -> None:
    video = write(tmp_path / f"a{suffix}", fps=fps)
    end = None if last is None else float(last / fps)
    clip = cut_span(video, start_seconds=float(first / fps), end_seconds=end, config=COPY)
    assert clip.not_copied is None
    assert clip.source["copied"] is True
    count = (96 if last is None else last) - first
    assert (clip.checked.frames, clip.checked.fps) == (count, fps)
    assert clip.checked.keyframes == tuple(range(0, count, 16))
    with av.open(str(video)) as container:  # the reference: the source decoded from its start, no seek
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    expected = np.stack(whole[first : first + count])
    for decoder in ("pyav", "decord"):
        assert np.array_equal(decode_frames(clip.data, range(count), decoder=decoder), expected)  # type: ignore[arg-type]
    assert clip.data.index(b"moov") < clip.data.index(b"mdat")


def rotated(path: Path) -> Path:
    """A display matrix of 90 degrees, written into the header of a plain file."""
    data = bytearray(write(path).read_bytes())
    one, unity = (1 << 16).to_bytes(4, "big"), bytes(4)
    plain = one + unity * 3 + one + unity * 3 + (1 << 30).to_bytes(4, "big")
    turned = unity + one + unity + (-(1 << 16)).to_bytes(4, "big", signed=True) + unity * 4 + plain[-4:]
    at = data.index(plain, data.index(b"tkhd"))
    data[at : at + len(turned)] = turned
    path.write_bytes(bytes(data))
    return path


def bt709(context: Any) -> None:
    context.colorspace, context.color_range = 1, 1


def square_not(context: Any) -> None:
    context.sample_aspect_ratio = Fraction(4, 3)


VARIABLE = [n if n < 50 else n + 7 for n in range(96)]
UNFIT: dict[str, tuple[str, Callable[[Path], Path], dict[str, Any]]] = {
    "codec": ("codec mpeg4", lambda d: write(d / "a.mp4", "mpeg4"), {}),
    "4:4:4": ("pixels yuv444p", lambda d: write(d / "a.mp4", pix_fmt="yuv444p"), {}),
    "10 bit": ("pixels yuv420p10le", lambda d: write(d / "a.mp4", pix_fmt="yuv420p10le"), {}),
    "container": ("container mpegts", lambda d: write(d / "a.ts"), {}),
    "too large": ("size", lambda d: write(d / "a.mp4"), {"short_side_pixels": 32}),
    "too fast": ("frame rate", lambda d: write(d / "a.mp4", fps=60), {}),
    "another rate": ("frame rate", lambda d: write(d / "a.mp4"), {"fps": 12}),
    "long groups": ("long groups", lambda d: write(d / "a.mp4", params="keyint=48:scenecut=0"), {}),
    "open groups": ("open groups", lambda d: write(d / "a.mp4", params=f"{GOP}:open-gop=1:bframes=3"), {}),
    "variable rate": ("variable frame rate", lambda d: write(d / "a.mp4", times=VARIABLE), {}),
    "rotated": ("rotation", lambda d: rotated(d / "a.mp4"), {}),
    "aspect": ("sample aspect", lambda d: write(d / "a.mp4", change=square_not), {}),
    "colours": ("colours", lambda d: write(d / "a.mp4", change=bt709), {}),
    "interlaced": ("interlaced", lambda d: write(d / "a.mp4", params=f"{GOP}:tff=1"), {}),
    "other target": ("codec h264", lambda d: write(d / "a.mp4"), {"codec": "hevc"}),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_encoded_and_says_why(tmp_path: Path, name: str) -> None:
    reason, make, changes = UNFIT[name]
    video = make(tmp_path)
    config = TranscodeConfig.model_validate({"mode": "copy", "max_missing_share": 0.5, **changes})
    clip = cut_span(video, start_seconds=0.0, end_seconds=None, config=config)
    assert clip.not_copied == reason
    assert "copied" not in clip.source
    assert clip.checked.frames >= 40


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        ((0.5, 2.0), "no key frame at the cut"),
        ((1 / 24 * 17, None), "no key frame at the cut"),
        ((0.0, 18 / 24), "the end is inside a run of B frames"),
    ],
)
def test_a_cut_that_needs_an_encode(tmp_path: Path, span: tuple[float, float | None], reason: str) -> None:
    video = write(tmp_path / "a.mp4", params=f"{GOP}:bframes=2:b-adapt=0")
    clip = cut_span(video, start_seconds=span[0], end_seconds=span[1], config=COPY)
    assert clip.not_copied == reason
    expected = cut_span(video, start_seconds=span[0], end_seconds=span[1], config=TranscodeConfig())
    # Only in workers, with zeroed memory, is an encode reproducible to the byte; here the frames are compared.
    count = expected.checked.frames
    assert (clip.checked.frames, clip.checked.keyframes) == (count, expected.checked.keyframes)
    shown = [decode_frames(c.data, range(count), decoder="pyav").astype(int) for c in (clip, expected)]
    assert np.abs(shown[0] - shown[1]).mean() < 0.5


def test_a_damaged_source_is_refused_as_by_an_encode(tmp_path: Path) -> None:
    whole = encode_array(film(), fps=Fraction(24), config=TranscodeConfig())
    video = tmp_path / "a.mp4"
    damaged = bytearray(whole)
    damaged[len(whole) * 2 // 3 : len(whole) * 2 // 3 + 400] = bytes(400)
    video.write_bytes(damaged)
    with pytest.raises(VideoDecodeError):
        cut_span(video, start_seconds=0.0, end_seconds=None, config=COPY)


def test_a_build_counts_what_was_copied(make_run: Callable[..., ShardRun], tmp_path: Path) -> None:
    videos = tmp_path / "videos/some class"
    videos.mkdir(parents=True)
    for number in range(3):
        write(videos / f"fits{number}.mp4", size=(96 + 2 * number, 64))
    write(videos / "other.avi", "mpeg4")
    run = make_run(
        tmp_path / "out",
        source={"kind": "folder", "root": str(tmp_path / "videos")},
        transcode={"mode": "copy"},
        verify_decode="full",
    )
    report = run_shard(run)
    assert (report.clips_written, report.copied, report.not_copied) == (4, 3, {"container avi": 1})
    record = json.loads((tmp_path / "out" / BUILD_FILE).read_text())
    assert (record["copied"], record["not_copied"], record["verified"]) == (3, {"container avi": 1}, True)
    dataset = ShardDataset(run.output)
    told = {dataset.facts(i).source: dataset.read_json(i)["source_facts"].get("copied") for i in range(4)}
    assert told == {**{f"some class/fits{n}.mp4": True for n in range(3)}, "some class/other.avi": None}
