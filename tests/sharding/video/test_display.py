"""How a video is to be shown and how long it says it is, against the ffmpeg command and arithmetic."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames, probe
from cliplift.sharding.video.transcode import transcode_span

ONE = 1 << 16
MATRICES = {
    "upright": (ONE, 0, 0, ONE), "hflip": (-ONE, 0, 0, ONE), "vflip": (ONE, 0, 0, -ONE), "half": (-ONE, 0, 0, -ONE),
    "clock": (0, ONE, -ONE, 0), "cclock": (0, -ONE, ONE, 0), "transpose": (0, ONE, ONE, 0),
    "anti-transpose": (0, -ONE, -ONE, 0), "zero": (0, 0, 0, 0),
}  # fmt: skip


def corners(picture: np.ndarray) -> list[int]:
    """Grey levels in the middles of the four quarters, in steps of 50."""
    height, width = picture.shape[:2]
    places = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return [round(float(picture[y, x].mean()) / 50) for y, x in places]


@pytest.mark.parametrize("name", MATRICES)
def test_display_matrix(name: str, tmp_path: Path) -> None:
    image = np.zeros((48, 64), np.uint8)
    image[:24, :32], image[:24, 32:], image[24:, :32], image[24:, 32:] = 50, 100, 150, 200
    plain = tmp_path / "plain.mp4"
    raw = [
        "ffmpeg",
        "-v",
        "error",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "gray",
        "-s",
        "64x48",
        "-r",
        "25",
        "-i",
        "-",
    ]
    subprocess.run([*raw, "-pix_fmt", "yuv420p", str(plain)], input=image.tobytes() * 10, check=True)
    data = plain.read_bytes()
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = MATRICES[name]
    path = tmp_path / "turned.mp4"
    path.write_bytes(data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :])
    clip = transcode_span(path, start_seconds=0, end_seconds=None, config=TranscodeConfig(min_frames=1))
    quarters = np.array([[1, 2], [3, 4]])
    shown = {
        "upright": quarters, "zero": quarters, "hflip": quarters[:, ::-1], "vflip": quarters[::-1],
        "half": quarters[::-1, ::-1], "clock": np.rot90(quarters, -1), "cclock": np.rot90(quarters),
        "transpose": quarters.T, "anti-transpose": quarters[::-1, ::-1].T,
    }  # fmt: skip
    assert corners(decode_frames(clip.data, [0], decoder="pyav")[0]) == shown[name].flatten().tolist()


def matroska(path: Path, *options: str) -> Path:
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=s=64x48:r=25:d=4"]
    command += ["-f", "lavfi", "-i", "sine=duration=6", "-pix_fmt", "yuv420p", "-g", "25", *options]
    subprocess.run([*command, str(path)], check=True)
    return path


def test_matroska_with_sound_states_the_length_of_its_video(tmp_path: Path) -> None:
    whole = matroska(tmp_path / "whole.mkv")
    assert probe(whole).duration_seconds == pytest.approx(4.0, abs=0.05)
    data = whole.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoDecodeError, match="truncated"):
        transcode_span(
            tmp_path / "cut.mkv", start_seconds=0, end_seconds=None, config=TranscodeConfig(min_frames=1)
        )


def test_matroska_that_starts_late_is_as_long_as_its_frames(tmp_path: Path) -> None:
    for options in (["-an"], []):
        late = matroska(tmp_path / f"late{len(options)}.mkv", *options, "-output_ts_offset", "60")
        assert probe(late).duration_seconds == pytest.approx(4.0, abs=0.1)
