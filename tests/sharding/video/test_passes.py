"""Containers that cannot be entered in the middle: one decode serves all windows, frame for frame as one for each."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.video import passes, regular_frames
from cliplift.sharding.video.decode import VideoDecodeError
from cliplift.sharding.video.transcode import EncodedClip, SpanCutter, transcode_span

FRAMES, FPS = 150, 25
CONFIG = TranscodeConfig(min_frames=1, preset="ultrafast")
CODECS = {
    "ts": ["-c:v", "libx264", "-bf", "2"],
    "avi": ["-c:v", "mpeg4", "-bf", "2"],
    "flv": ["-c:v", "libx264", "-bf", "2"],
    "wmv": ["-c:v", "wmv2"],
    "mpg": ["-c:v", "mpeg2video", "-bf", "2"],
}
Span = tuple[float, float | None]
IN_A_ROW: list[Span] = [(k, k + 1.0) for k in range(6)]
OVERLAPPING: list[Span] = [(0.5 * k, 0.5 * k + 1.5) for k in range(10)]


def film(path: Path, *options: str) -> Path:
    source = ["-f", "lavfi", "-i", f"testsrc2=s=96x64:r={FPS}:d={FRAMES / FPS}"]
    command = ["ffmpeg", "-v", "error", *source, "-pix_fmt", "yuv420p", "-g", "12", *options, str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry for each frame that is decoded."""
    count: list[int] = []

    def counted(real: Callable[[Any, Any], Iterator[Any]]) -> Callable[[Any, Any], Iterator[Any]]:
        def frames(container: Any, stream: Any) -> Iterator[Any]:
            for stamped in real(container, stream):
                count.append(1)
                yield stamped

        return frames

    monkeypatch.setattr(regular_frames, "_stamped", counted(regular_frames._stamped))
    return count


def cut(path: Path, spans: list[Span]) -> list[EncodedClip | str]:
    """The clips, or why there is none."""
    found: list[EncodedClip | str] = []
    with SpanCutter(path, CONFIG) as cutter:
        for start, end in spans:
            try:
                found.append(cutter.cut(start_seconds=start, end_seconds=end))
            except VideoDecodeError as error:
                found.append(str(error))
    return found


def each_from_the_start(path: Path, spans: list[Span]) -> list[EncodedClip | str]:
    found: list[EncodedClip | str] = []
    for start, end in spans:
        try:
            found.append(transcode_span(path, start_seconds=start, end_seconds=end, config=CONFIG))
        except VideoDecodeError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("ending", CODECS)
def test_windows_in_a_row_take_one_decode(ending: str, tmp_path: Path, decoded: list[int]) -> None:
    path = film(tmp_path / f"x.{ending}", *CODECS[ending])
    clips = cut(path, IN_A_ROW)
    assert len(decoded) == FRAMES
    assert clips == each_from_the_start(path, IN_A_ROW)
    assert [clip.checked.frames for clip in clips if isinstance(clip, EncodedClip)] == [FPS] * 6


def test_overlapping_windows_take_a_decode_for_each_layer(tmp_path: Path, decoded: list[int]) -> None:
    path = film(tmp_path / "x.ts", *CODECS["ts"])
    clips = cut(path, OVERLAPPING)
    # 1.5 s every 0.5 s: three layers, of which each passes over the video once.
    assert len(decoded) <= 3 * FRAMES
    assert clips == each_from_the_start(path, OVERLAPPING)


def test_windows_that_overlap_many_times_take_no_more(tmp_path: Path, decoded: list[int]) -> None:
    """1 s every 0.1 s: ten layers, each of which passes over the video once."""
    cut(film(tmp_path / "x.ts", *CODECS["ts"]), [(0.1 * k, 0.1 * k + 1.0) for k in range(50)])
    assert len(decoded) <= 10 * FRAMES


def test_decoders_of_large_pictures_are_fewer() -> None:
    assert passes.most_passes(320, 240) == passes.MOST_PASSES
    assert passes.most_passes(1920, 1080) == passes.FEWEST_PASSES
    between = passes.most_passes(640, 480)
    assert between * passes.PICTURES_KEPT * 640 * 480 * 2 <= passes.DECODER_BYTES


@pytest.mark.parametrize(
    "spans",
    [
        [(0.0, 1.0), (4.0, 5.0)],  # `max_per_video` leaves windows out between
        [(0.013, 0.77), (0.77, 0.79), (0.79, 2.341), (2.36, 2.4), (5.2, None)],
        [(2.0, 3.0), (1.0, 2.0), (1.5, 2.5)],  # not in order: right all the same
        [(5.0, 6.0), (6.0, 7.0), (7.0, 8.0)],  # past the end
    ],
)
def test_any_spans_get_the_frames_of_a_decode_from_the_start(spans: list[Span], tmp_path: Path) -> None:
    path = film(tmp_path / "x.ts", *CODECS["ts"])
    assert cut(path, spans) == each_from_the_start(path, spans)


def test_interlaced_and_joined_recordings(tmp_path: Path, decoded: list[int]) -> None:
    # bwdif looks at the frames before and after; the second part's time stamps jump back.
    path = film(tmp_path / "x.mpg", *CODECS["mpg"], "-flags", "+ildct+ilme", "-vf", "setfield=tff")
    path.write_bytes(path.read_bytes() * 2)
    spans: list[Span] = [(1.5 * k, 1.5 * k + 1.5) for k in range(8)]
    clips = cut(path, spans)
    assert len(decoded) == 2 * FRAMES
    assert clips == each_from_the_start(path, spans)


def test_damage_is_met_once_and_told_for_each_window_behind_it(tmp_path: Path, decoded: list[int]) -> None:
    path = film(tmp_path / "x.avi", "-c:v", "mjpeg")
    data = bytearray(path.read_bytes())
    at = data.index(b"00dc", len(data) // 2) + 200
    data[at : at + 600] = b"\xff\xc4" * 300  # a table that no decoder accepts
    path.write_bytes(data)
    clips = cut(path, IN_A_ROW)
    assert len(decoded) < FRAMES
    assert clips == each_from_the_start(path, IN_A_ROW)
    assert isinstance(clips[0], EncodedClip)
    assert isinstance(clips[4], str)
    assert clips[4] == clips[5]


def test_a_long_way_to_a_window_asks_for_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "HEARTBEAT_SECONDS", 1.0)
    path = film(tmp_path / "x.ts", *CODECS["ts"])
    asked: list[int] = []
    with SpanCutter(path, CONFIG, alive=lambda: asked.append(1)) as cutter:
        cutter.cut(start_seconds=4.5, end_seconds=5.0)
    assert len(asked) == 4


def test_out_of_memory_in_one_window_is_not_the_end_of_the_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "x.ts", *CODECS["ts"])
    real, failures = regular_frames._stamped, [MemoryError()]

    def failing(container: Any, stream: Any) -> Iterator[Any]:
        for number, stamped in enumerate(real(container, stream)):
            if number == 30 and failures:
                raise failures.pop()
            yield stamped

    monkeypatch.setattr(regular_frames, "_stamped", failing)
    with SpanCutter(path, CONFIG) as cutter:
        with pytest.raises(MemoryError):
            cutter.cut(start_seconds=1.0, end_seconds=2.0)
        clip = cutter.cut(start_seconds=2.0, end_seconds=3.0)
    assert clip == transcode_span(path, start_seconds=2.0, end_seconds=3.0, config=CONFIG)
