"""Time stamps that do not rise: every frame the decoder gives is stored once, in its order.

The frames carry their number as eight bars of bits, so what is stored is told without any decoder's clock.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cliplift.configs.sharding import ShardRun, TranscodeConfig, WindowsCut
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.manifest import REFUSED_FILE
from cliplift.sharding.video.cuts import spans
from cliplift.sharding.video.decode import decode_frames
from cliplift.sharding.video.transcode import EncodedClip, transcode_span

BITS, BAR, HEIGHT = 8, 16, 48


def numbered(path: Path, numbers: range, *options: str, scale: int = 1) -> Path:
    """A film at 25 frames/s whose frames show the numbers as bars, lowest bit first."""
    pictures = [
        np.kron([[16 + 219 * (n >> bit & 1) for bit in range(BITS)]], np.ones((HEIGHT * scale, BAR * scale)))
        for n in numbers
    ]
    size = f"{BITS * BAR * scale}x{HEIGHT * scale}"
    raw = np.stack(pictures).astype(np.uint8).tobytes()
    source = ["-f", "rawvideo", "-pix_fmt", "gray", "-s", size, "-r", "25", "-i", "-"]
    command = ["ffmpeg", "-v", "error", *source, "-pix_fmt", "yuv420p", *options, str(path)]
    subprocess.run(command, input=raw, check=True)
    return path


def stored(path: Path, *, start: float = 0.0, end: float | None = None) -> tuple[EncodedClip, list[int]]:
    """The clip made of a video, and the numbers its frames show."""
    clip = transcode_span(path, start_seconds=start, end_seconds=end, config=TranscodeConfig(min_frames=1))
    frames = decode_frames(clip.data, range(clip.checked.frames), decoder="pyav")
    width = frames.shape[2] / BITS
    middles = [int((bit + 0.5) * width) for bit in range(BITS)]
    lit = frames[:, frames.shape[1] // 2, middles].mean(axis=-1) > 120
    return clip, [sum(1 << bit for bit in range(BITS) if row[bit]) for row in lit]


H264 = ("-c:v", "libx264", "-crf", "12", "-g", "12")


@pytest.mark.parametrize("b_frames", ["0", "2", "3"])
def test_b_frames_in_avi_are_all_stored_in_order(b_frames: str, tmp_path: Path) -> None:
    film = numbered(tmp_path / "x.avi", range(50), *H264, "-bf", b_frames)
    assert stored(film)[1] == list(range(50))
    assert stored(film, start=1.0, end=1.4)[1] == list(range(25, 35))


@pytest.mark.parametrize(("ending", "codec"), [("ts", H264), ("mpg", ("-c:v", "mpeg2video", "-q:v", "2"))])
def test_joined_recordings_are_stored_whole(ending: str, codec: tuple[str, ...], tmp_path: Path) -> None:
    first = numbered(tmp_path / f"1.{ending}", range(50), *codec, "-bf", "2")
    second = numbered(tmp_path / f"2.{ending}", range(100, 150), *codec, "-bf", "2")
    both = tmp_path / f"both.{ending}"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    assert stored(both)[1] == [*range(50), *range(100, 150)]


def test_another_size_after_a_join_is_scaled_to_the_first(tmp_path: Path) -> None:
    first = numbered(tmp_path / "1.ts", range(30), *H264)
    second = numbered(tmp_path / "2.ts", range(100, 130), *H264, scale=2)
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    clip, numbers = stored(both)
    assert numbers == [*range(30), *range(100, 130)]
    assert (clip.checked.width, clip.checked.height) == (BITS * BAR, HEIGHT)


def test_a_gap_of_a_minute_in_a_transport_stream_is_closed(tmp_path: Path) -> None:
    first = numbered(tmp_path / "1.ts", range(50), *H264)
    second = numbered(tmp_path / "2.ts", range(100, 150), *H264, "-output_ts_offset", "60")
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    assert stored(both)[1] == [*range(50), *range(100, 150)]


def test_a_pause_of_two_seconds_in_a_transport_stream_stays(tmp_path: Path) -> None:
    first = numbered(tmp_path / "1.ts", range(50), *H264, "-bf", "0")
    second = numbered(tmp_path / "2.ts", range(100, 150), *H264, "-bf", "0", "-output_ts_offset", "4")
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    assert stored(both)[1] == [*range(50), *[49] * 50, *range(100, 150)]


@pytest.mark.parametrize("ending", ["mp4", "mkv", "gif"])
def test_the_last_slide_is_shown_as_long_as_the_others(ending: str, tmp_path: Path) -> None:
    # 5 slides of 2 s: 10 s, each slide in a fifth of the stored frames.
    codec = ("-c:v", "gif") if ending == "gif" else H264
    slow = ["-vf", "setpts=50*PTS", "-r", "1/2"]
    if ending == "gif":
        slow += ["-pix_fmt", "gray", "-final_delay", "200"]
    film = numbered(tmp_path / f"slides.{ending}", range(1, 6), *codec, *slow)
    clip, numbers = stored(film)
    assert clip.checked.frames / clip.checked.fps == 10
    assert numbers == [n for n in range(1, 6) for _ in range(2 * int(clip.checked.fps))]


@pytest.mark.parametrize("offset", ["0", "60"])
def test_windows_reach_the_end_of_joined_recordings_and_no_further(offset: str, tmp_path: Path) -> None:
    first = numbered(tmp_path / "1.ts", range(50), *H264)
    second = numbered(tmp_path / "2.ts", range(100, 150), *H264, "-output_ts_offset", offset)
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    cut = WindowsCut(length_seconds=1.0, min_seconds=1.0)
    windows = spans(cut, both, start=0.0, end=None)
    assert windows == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]
    shown = [n for begin, end in windows for n in stored(both, start=begin, end=end)[1]]
    assert shown == [*range(50), *range(100, 150)]


def test_windows_of_flv_with_longer_sound_stop_at_the_last_frame(
    tmp_path: Path, make_run: Callable[..., ShardRun]
) -> None:
    # 2 s of pictures and 6 s of sound: the container says 6 s, and nothing says how long the pictures last.
    folder = tmp_path / "videos"
    folder.mkdir()
    pictures = numbered(tmp_path / "x.mp4", range(50), *H264)
    sound = ["-f", "lavfi", "-i", "sine=duration=6", "-c:v", "copy"]
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(pictures), *sound, str(folder / "x.flv")], check=True)
    run = make_run(
        tmp_path / "out",
        source={"kind": "folder", "root": str(folder), "layout": "flat"},
        cut={"kind": "windows", "length_seconds": 1.0},
        limits={"max_refused_share": 0.9},
    )
    report = run_shard(run)
    assert report.clips_written == 2
    entries = [json.loads(line) for line in (tmp_path / "out" / REFUSED_FILE).read_text().splitlines()]
    assert [entry["reason"] for entry in entries] == ["the video ends before 2.00 s"]


def test_every_decoded_frame_is_stored_or_counted(tmp_path: Path) -> None:
    film = numbered(tmp_path / "x.mp4", range(100), *H264, "-vf", "setpts=PTS/2", "-r", "50")
    clip, numbers = stored(film)
    assert clip.checked.fps == 25
    assert len(numbers) == 50
    assert clip.source["frames_left_out"] == 50
    parts = [stored(film, start=0.0, end=1.0), stored(film, start=1.0)]
    assert sum(one.source["frames_left_out"] + len(set(shown)) for one, shown in parts) == 100


def test_nothing_is_left_out_at_the_rate_of_the_source(tmp_path: Path) -> None:
    clip, numbers = stored(numbered(tmp_path / "x.mp4", range(50), *H264))
    assert numbers == list(range(50))
    assert "frames_left_out" not in clip.source
