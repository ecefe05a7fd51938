"""Tars made to mislead: each sample that cannot be used is named, and nothing is read because a header says so."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cliplift.configs.sections import ConfigError
from cliplift.sharding.build.index_tars import index_tars
from cliplift.sharding.manifest import REFUSED_FILE
from cliplift.sharding.sources.lists import SourceError
from cliplift.sharding.sources.tars import MAX_CLS_BYTES, MAX_JSON_BYTES, TarContent, read_tar

VIDEO = b"v" * 3000
GIGABYTES = 12 * 10**9


def entry(name: str, data: bytes, *, kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    """A member as bytes; its header may state another size than it has."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data) if size is None else size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def sparse(name: str, size: int) -> bytes:
    """An old GNU sparse member without data that claims a size."""
    header = bytearray(entry(name, b"", kind=tarfile.GNUTYPE_SPARSE)[:512])
    header[386:410] = b"00000000000\0" * 2
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def read(tmp_path: Path, *parts: bytes, end: bytes = bytes(1024)) -> TarContent:
    file = tmp_path / "a.tar"
    file.write_bytes(b"".join(parts) + end)
    return read_tar(file, label_key="label")


def told(content: TarContent) -> dict[str, str]:
    return {item.name: item.reason for item in content.left_out}


GOOD = entry("good.mp4", VIDEO) + entry("good.cls", b"a")
LAST = entry("last.mp4", VIDEO) + entry("last.cls", b"a")  # more of it may lie behind the damage


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (entry("k.mp4", VIDEO) + entry("k.json", b"[" * 200_000 + b"]" * 200_000), "nested too deeply"),
        (entry("k.mp4", VIDEO) + entry("k.json", b'{"label": "\\ud800"}'), "cannot name a class"),
        (entry("k.mp4", VIDEO) + sparse("k.cls", GIGABYTES), f"more than {MAX_CLS_BYTES}"),
        (entry("k.mp4", VIDEO) + sparse("k.json", GIGABYTES), f"more than {MAX_JSON_BYTES}"),
        (sparse("k.mp4", GIGABYTES), "sparse"),
        (entry("k.mp4", VIDEO) + entry("k.cls", b"x" * (MAX_CLS_BYTES + 1)), f"more than {MAX_CLS_BYTES}"),
    ],
    ids=["deep", "surrogate", "sparse cls", "sparse json", "sparse video", "long cls"],
)
def test_a_bad_sample_is_named_and_the_next_is_used(tmp_path: Path, bad: bytes, reason: str) -> None:
    content = read(tmp_path, bad, GOOD)
    assert [video.key for video in content.videos] == ["good"]
    assert list(told(content)) == ["k"]
    assert reason in told(content)["k"]
    assert content.damage == ""


def test_a_json_that_only_describes_may_be_broken(tmp_path: Path) -> None:
    content = read(tmp_path, entry("k.mp4", VIDEO), entry("k.json", b"{"), entry("k.cls", b"a"))
    assert [(video.label, video.json_data) for video in content.videos] == [("a", b"")]


@pytest.mark.parametrize("cut", [512 + 100, 512 + 2999])
def test_a_cut_tar_keeps_what_is_whole(tmp_path: Path, cut: int) -> None:
    content = read(tmp_path, GOOD, entry("k.mp4", VIDEO)[:cut], end=b"")
    assert [video.key for video in content.videos] == ["good"]
    assert list(told(content)) == ["k"]
    assert content.damage


@pytest.mark.parametrize(
    "bad",
    [
        entry("k.mp4", b"", size=GIGABYTES),
        entry("x", b"", kind=tarfile.GNUTYPE_LONGNAME, size=GIGABYTES),
        entry("x", b"", kind=tarfile.XHDTYPE, size=GIGABYTES),
        entry("x", b"99 size=12\n", kind=tarfile.XHDTYPE) + entry("k.mp4", VIDEO),
        entry("x", b"20 GNU.sparse.map=a\n", kind=tarfile.XHDTYPE) + entry("k.mp4", VIDEO),
        entry("x", b"aaaa\0", kind=tarfile.GNUTYPE_LONGNAME) * 3000,
        b"x" * 512,
    ],
    ids=["size", "long name", "pax size", "pax length", "pax map", "chain of names", "no header"],
)
def test_misleading_headers_end_the_tar_with_a_word(tmp_path: Path, bad: bytes) -> None:
    content = read(tmp_path, GOOD, LAST, bad)
    assert [video.key for video in content.videos][:1] == ["good"]
    assert content.damage
    assert list(told(content)) in (["k"], ["last"])  # the sample that the damage is in or behind


def test_a_member_of_negative_size_does_not_lead_round_in_circles(tmp_path: Path) -> None:
    header = bytearray(entry("k.mp4", b"")[:512])
    header[124:136] = (-3 * 512 & (1 << 96) - 1).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert read(tmp_path, GOOD, bytes(header)).damage


def test_names_with_dots_and_second_videos_are_told(tmp_path: Path) -> None:
    content = read(
        tmp_path,
        entry("one.mp4", VIDEO),
        entry("my.holiday.mp4", VIDEO),
        entry("two.mp4", VIDEO) + entry("two.avi", VIDEO),
        entry("clip.mp4", VIDEO) + entry("clip.flow.mp4", VIDEO),
        entry("caption.txt", b"words"),
    )
    assert [video.key for video in content.videos] == ["one", "two", "clip"]
    assert told(content).keys() == {"my.holiday.mp4", "two.avi"}
    assert "ends at the first dot" in told(content)["my.holiday.mp4"]


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("café.mp4", "good.mp4"):
            info = tarfile.TarInfo(name)
            info.size = len(VIDEO)
            tar.addfile(info, io.BytesIO(VIDEO))
    content = read_tar(tmp_path / "a.tar", label_key="label")
    assert told(content) == {"caf\\xe9": "its name is not UTF-8"}


def test_index_names_the_first_of_what_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.tar").write_bytes(entry("k.mp4", VIDEO) + entry("k.json", b"{") + bytes(1024))
    with pytest.raises(ConfigError, match=r"no video that decodes; 1 are refused, the first, k: its json"):
        index_tars(str(tmp_path), name="x", workers=1)
    (row,) = [json.loads(line) for line in (tmp_path / REFUSED_FILE).read_text().splitlines()]
    assert (row["video_id"], row["source"], row["stage"]) == ("k", "train/a.tar", "read")


def test_a_cut_tar_is_no_source(tmp_path: Path) -> None:
    from cliplift.configs.sources import TarsSource
    from cliplift.sharding.sources.tars import read_tars

    (tmp_path / "a.tar").write_bytes(GOOD + entry("x", b"", kind=tarfile.XHDTYPE, size=GIGABYTES))
    with pytest.raises(SourceError, match=r"a\.tar: its headers are damaged: .*fetch it again"):
        list(read_tars(TarsSource(root=str(tmp_path))).entries)


def test_no_header_makes_it_take_memory(tmp_path: Path) -> None:
    """Everything above once more, in a process that may hold less than one gigabyte."""
    parts = [
        entry("x", b"", kind=tarfile.XHDTYPE, size=GIGABYTES),
        entry("x", b"", kind=tarfile.GNUTYPE_LONGNAME, size=GIGABYTES),
        entry("k.mp4", VIDEO) + sparse("k.cls", GIGABYTES),
        entry("k.mp4", VIDEO) + entry("k.json", b"", size=GIGABYTES),
    ]
    for number, part in enumerate(parts):
        (tmp_path / f"{number}.tar").write_bytes(GOOD + LAST + part + bytes(1024))
    code = (
        "import sys; from pathlib import Path; from cliplift.sharding.sources.tars import read_tar\n"
        "for name in sys.argv[1:]: print(len(read_tar(Path(name), label_key='label').videos))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *sorted(map(str, tmp_path.glob("*.tar")))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30,) * 2),
    )
    assert (done.stdout.split(), done.stderr) == (["1", "1", "2", "2"], "")
