"""Which containers are opened: text formats and addresses would make FFmpeg touch other files and sockets."""

from __future__ import annotations

import io
import json
import socket
import struct
import subprocess
import tarfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import pytest

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.build.index_tars import index_tars
from cliplift.sharding.manifest import REFUSED_FILE
from cliplift.sharding.video.decode import Decoder, VideoDecodeError, decode_frames, probe
from cliplift.sharding.video.full_decode import check_clip
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
    decoders: tuple[Decoder, ...] = ("pyav", "decord", "torchcodec")
    for decoder in decoders:
        with pytest.raises(VideoDecodeError, match="cannot be opened"):
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


def png_of_zeros(width: int, height: int) -> bytes:
    """A picture of one bit per pixel, all black: 32 kB for 16,000 x 16,000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + -(-width // 8)) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def film_of_pictures(pictures: list[bytes], container: str) -> bytes:
    data = io.BytesIO()
    with av.open(data, "w", format=container) as out:
        stream = out.add_stream("png", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "monob"
        for number, picture in enumerate(pictures):
            packet = av.Packet(picture)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 5)
            packet.is_keyframe = True
            out.mux(packet)
    return data.getvalue()


@pytest.mark.parametrize("container", ["avi", "mov"])
@pytest.mark.parametrize("at", [0, 4])
def test_a_picture_too_large_is_refused_before_it_is_decoded(at: int, container: str, tmp_path: Path) -> None:
    small, huge = png_of_zeros(64, 48), png_of_zeros(16_000, 16_000)
    data = film_of_pictures([small] * at + [huge] * 3, container)
    with pytest.raises(VideoDecodeError, match="exceeds 67108864 pixels"):
        check_clip(data)
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(VideoDecodeError, match="exceeds 67108864 pixels"):
        transcode_span(
            tmp_path / "x", start_seconds=0, end_seconds=None, config=TranscodeConfig(min_frames=1)
        )
    assert check_clip(film_of_pictures([png_of_zeros(8192, 1024)] * 2, container)).width == 8192


def test_a_header_with_a_picture_too_large_is_refused(tmp_path: Path) -> None:
    # The header alone: 44 bytes of uncompressed video.
    (tmp_path / "x.y4m").write_bytes(b"YUV4MPEG2 W16000 H16000 F25:1 Ip C420\nFRAME\n")
    with pytest.raises(VideoDecodeError, match="16000 x 16000 pixels exceed 67108864"):
        probe(tmp_path / "x.y4m")


def test_a_picture_too_large_is_in_the_ledger_of_an_index(tmp_path: Path) -> None:
    members = {
        "bomb.mp4": film_of_pictures([png_of_zeros(16_000, 16_000)] * 3, "mov"),
        "good.mp4": film_of_pictures([png_of_zeros(64, 48)] * 3, "mov"),
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members.items():
            for member, content in ((name, data), (name.replace("mp4", "cls"), b"0")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert index_tars(str(tmp_path), name="x", workers=1).samples == 1
    (entry,) = [json.loads(line) for line in (tmp_path / REFUSED_FILE).read_text().splitlines()]
    assert (entry["video_id"], entry["stage"]) == ("bomb", "decode")
    assert "exceeds 67108864 pixels" in entry["reason"]
