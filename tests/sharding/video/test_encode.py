"""Encoders: PyAV and the ffmpeg command line, three codecs; every clip decodes, one that cannot be made is an error."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun, TranscodeConfig
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.video import encode as module
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames
from cliplift.sharding.video.encode import LIBRARIES, require_encoder
from cliplift.sharding.video.full_decode import check_clip
from cliplift.sharding.video.transcode import encode_array, transcode_span

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not on the path")
HERE = [codec for codec, library in LIBRARIES.items() if library in av.codecs_available]


def picture(frames: int = 40) -> np.ndarray:
    """A smooth picture that moves, (T, 64, 96, 3)."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(64), np.arange(96), indexing="ij")
    field = 128 + 90 * np.sin((x + 2 * t) / 9) * np.cos((y + t) / 11)
    return np.stack([field, 255 - field, 128 + field / 4], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("codec", HERE)
@pytest.mark.parametrize("encoder", ["pyav", pytest.param("ffmpeg", marks=needs_ffmpeg)])
def test_every_codec_makes_regular_clips_that_decode(encoder: str, codec: str) -> None:
    config = TranscodeConfig(encoder=encoder, codec=codec)  # type: ignore[arg-type]
    require_encoder(config)
    frames = picture()
    data = encode_array(frames, fps=Fraction(25), config=config)
    checked = check_clip(data)
    assert (checked.frames, checked.width, checked.height, checked.fps) == (40, 96, 64, 25)
    assert checked.keyframes == (0, 16, 32)
    assert data.index(b"moov") < data.index(b"mdat")
    decoded = decode_frames(data, range(40), decoder="pyav").astype(int)
    right = np.abs(decoded - frames).mean()
    shifted = np.abs(decoded[1:] - frames[:-1].astype(int)).mean()
    assert (
        right < 8
    )  # a crf that visually loses little: below 3 % of full scale with the loss of chroma samples
    assert right < shifted / 1.5  # no frame is repeated or lost
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].codec_context.codec.id == av.Codec(LIBRARIES[codec], "w").id


@needs_ffmpeg
def test_both_encoders_see_the_same_frames(demo_videos: Path) -> None:
    """The same picture to within what two builds of x264 differ by, from the same span."""
    video = next((demo_videos / "unlabelled").glob("*.mp4"))
    clips = {}
    for encoder in ("pyav", "ffmpeg"):
        config = TranscodeConfig(encoder=encoder, crf=10)
        clips[encoder] = transcode_span(video, start_seconds=1.0, end_seconds=3.0, config=config)
    first, second = clips.values()
    assert replace(first.checked, picture_hashes=()) == replace(second.checked, picture_hashes=())
    pictures = [
        decode_frames(c.data, range(c.checked.frames), decoder="pyav").astype(int) for c in clips.values()
    ]
    assert np.abs(pictures[0] - pictures[1]).mean() < 1.0


@needs_ffmpeg
def test_an_ffmpeg_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(*arguments: object, **options: object) -> list[str]:
        return ["ffmpeg", "-v", "error", "-nosuchoption", "1"]

    monkeypatch.setattr(module, "ffmpeg_command", impossible)
    with pytest.raises(VideoDecodeError, match=r"ffmpeg: exit status \d+: .*nosuchoption|Option not found"):
        encode_array(picture(8), fps=Fraction(25), config=TranscodeConfig(encoder="ffmpeg"))


@pytest.mark.parametrize("encoder", ["pyav", "ffmpeg"])
def test_an_encoder_that_is_not_there_is_named_before_anything_is_built(
    encoder: str, monkeypatch: pytest.MonkeyPatch, make_run: Callable[..., ShardRun], tmp_path: Path
) -> None:
    if encoder == "pyav":
        monkeypatch.setattr(av, "codecs_available", frozenset({"libx264"}))
    else:
        monkeypatch.setenv("PATH", "")
    run = make_run(tmp_path / "out", transcode={"encoder": encoder, "codec": "av1"})
    with pytest.raises(ConfigError) as caught:
        run_shard(run)
    assert caught.value.key == ("transcode.codec" if encoder == "pyav" else "transcode.encoder")
    assert "h264" in str(caught.value) or "no ffmpeg" in str(caught.value)
    assert not list(tmp_path.rglob("*.tar"))


def test_crf_follows_the_codec_unless_given() -> None:
    assert [TranscodeConfig(codec=c).crf for c in ("h264", "hevc", "av1")] == [23, 26, 35]  # type: ignore[arg-type]
    assert TranscodeConfig(codec="av1", crf=20).crf == 20
    with pytest.raises(ValueError, match="end at 51"):
        TranscodeConfig(crf=60)


@pytest.mark.parametrize(
    "transcode",
    [
        pytest.param({"codec": "hevc"}, marks=pytest.mark.slow),
        pytest.param({"codec": "av1"}, marks=pytest.mark.slow),
        pytest.param({"encoder": "ffmpeg"}, marks=[needs_ffmpeg, pytest.mark.slow]),
    ],
    ids=lambda t: "-".join(t.values()),
)
def test_a_dataset_of_another_codec(
    transcode: dict[str, str], make_run: Callable[..., ShardRun], tmp_path: Path
) -> None:
    if transcode.get("codec", "h264") not in HERE:
        pytest.skip(f"this PyAV cannot encode {transcode['codec']}")
    videos = tmp_path / "videos/waves"
    videos.mkdir(parents=True)
    for number in range(4):
        clip = encode_array(picture(20 + 4 * number), fps=Fraction(25), config=TranscodeConfig())
        (videos / f"{number}.mp4").write_bytes(clip)
    source = {"kind": "folder", "root": str(videos.parent)}
    report = run_shard(make_run(tmp_path / "out", transcode=transcode, source=source, verify_decode="full"))
    assert report.clips_written == 4
    assert report.verified is not None
    assert report.verified.ok
    dataset = ShardDataset(str(tmp_path / "out"))
    assert decode_frames(dataset.read(0), [0, 5], decoder="pyav").shape[0] == 2
    run_shard(make_run(tmp_path / "again", transcode=transcode, source=source, workers=1))
    tars = [sorted(p.read_bytes() for p in (tmp_path / name).rglob("*.tar")) for name in ("out", "again")]
    assert tars[0] == tars[1]


def test_hevc_refuses_pictures_its_encoder_is_not_safe_with() -> None:
    config = TranscodeConfig(codec="hevc")
    with pytest.raises(
        VideoDecodeError, match="not safe below 64 pixels, the clip has 96x62; use codec: h264"
    ):
        encode_array(picture()[:, :62], fps=Fraction(25), config=config)
