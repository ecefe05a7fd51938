"""Which containers are opened: text formats and addresses would make FFmpeg touch other files and sockets."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.video.decode import Decoder, VideoDecodeError, decode_frames, probe
from cliplift.sharding.video.transcode import transcode_span

SDP = (
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    b"m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)


def film(path: Path) -> Path:
    """A second of FFmpeg's test picture."""
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-f",
        "lavfi",
        "-i",
        "testsrc=s=64x48:r=25:d=1",
        "-pix_fmt",
        "yuv420p",
    ]
    subprocess.run([*command, f"file:{path}"], check=True)
    return path


def texts(secret: Path) -> dict[str, bytes]:
    return {
        "concat": f"ffconcat version 1.0\nfile {secret.name}\n".encode(),
        "hls": (
            "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:5\n#EXTINF:1.0,\n"
            f"file://{secret}\n#EXT-X-ENDLIST\n"
        ).encode(),
        "sdp": SDP,
    }


@pytest.mark.parametrize("kind", ["concat", "hls", "sdp"])
def test_text_in_place_of_a_clip_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = texts(film(tmp_path / "secret.mp4"))[kind]
    with pytest.raises(VideoDecodeError, match="cannot be opened"):
        probe(text)
    decoders: tuple[Decoder, ...] = ("pyav", "decord")
    for decoder in decoders:
        with pytest.raises(VideoDecodeError, match=r"cannot be opened|not installed"):
            decode_frames(text, [0], decoder=decoder)
    for suffix in ("mp4", "m3u8", "sdp", "ffconcat"):
        (tmp_path / f"x.{suffix}").write_bytes(text)
        with pytest.raises(VideoDecodeError, match="cannot be opened"):
            transcode_span(
                tmp_path / f"x.{suffix}",
                start_seconds=0,
                end_seconds=None,
                config=TranscodeConfig(min_frames=1),
            )


def test_a_name_like_an_address_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        name = f"tcp:127.0.0.1:{server.getsockname()[1]}.mp4"
        film(tmp_path / "plain.mp4").rename(name)
        assert probe(name).width == 64
        assert probe(Path(name)).height == 48
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "ts", "mpg", "flv", "wmv", "ogv", "y4m", "mxf"])
def test_containers_of_video_are_still_read(ending: str, tmp_path: Path) -> None:
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-f",
        "lavfi",
        "-i",
        "testsrc=s=352x288:r=25:d=0.4",
        "-pix_fmt",
        "yuv420p",
    ]
    subprocess.run([*command, str(tmp_path / f"x.{ending}")], check=True)
    assert (probe(tmp_path / f"x.{ending}").width, probe(tmp_path / f"x.{ending}").height) == (352, 288)
