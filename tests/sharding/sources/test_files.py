"""Nothing below a source vanishes without a word: links are followed, and what is not used is named."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.plan import plan_once
from cliplift.sharding.manifest import LEFT_OUT_FILE
from cliplift.sharding.sources.files import MAX_WAYS, NO_FILE, TOO_MANY_WAYS, find_files, is_hidden, printable
from cliplift.sharding.sources.lists import SourceError
from cliplift.sharding.sources.read import read_source
from cliplift.sharding.storage import open_store


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def run_of(source: dict[str, Any], **changes: Any) -> ShardRun:
    losses = {"limits": {"max_missing_share": 1.0}}
    return ShardRun.model_validate({"name": "s", "output": "unused", "source": source} | losses | changes)


def test_linked_folders_are_entered_and_loops_are_not(tmp_path: Path) -> None:
    touch(tmp_path / "videos/run/1.mp4")
    touch(tmp_path / "elsewhere/walk/2.mp4")
    (tmp_path / "videos/walk").symlink_to(tmp_path / "elsewhere/walk")
    (tmp_path / "elsewhere/walk/again").symlink_to(tmp_path / "videos")
    (tmp_path / "videos/run/self").symlink_to("self")
    listing = read_source(run_of({"kind": "folder", "root": str(tmp_path / "videos")}))
    assert listing.classes == ("run", "walk")
    assert sorted(v.source for v in listing.videos) == ["run/1.mp4", "walk/2.mp4"]
    reasons = {item.name: item.reason for item in listing.left_out}
    assert reasons["walk/again"] == "a link to a folder that it lies in"
    assert "cannot be opened" in reasons["run/self"] or reasons["run/self"] == "a link to nothing"


def test_a_folder_linked_twice_counts_twice(tmp_path: Path) -> None:
    touch(tmp_path / "videos/a/1.mp4")
    (tmp_path / "videos/b").symlink_to("a")
    assert find_files(open_store(str(tmp_path / "videos"))).files == ("a/1.mp4", "b/1.mp4")


def test_links_to_nothing_are_missing_and_keep_their_class(tmp_path: Path) -> None:
    touch(tmp_path / "a/1.mp4")
    touch(tmp_path / "c/3.mp4")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/2.mp4").symlink_to(tmp_path / "gone.mp4")
    listing = read_source(run_of({"kind": "folder", "root": str(tmp_path)}))
    assert listing.classes == ("a", "b", "c")
    assert {v.source: v.label for v in listing.videos} == {"a/1.mp4": 0, "c/3.mp4": 2}
    assert [v.source for v in listing.missing] == ["b/2.mp4"]
    with pytest.raises(ConfigError, match=r"1 of 3 listed videos do not exist, e\.g\. 'b/2\.mp4'"):
        plan_once(
            run_of({"kind": "folder", "root": str(tmp_path)}, limits={"max_missing_share": 0.1}),
            open_store(str(tmp_path / "out")),
        )


@pytest.mark.parametrize("suffix", [".mts", ".vob", ".divx", ".f4v", ".M2T", ".3g2", ".ogm", ".mpe"])
def test_endings_of_cameras_and_discs_are_videos(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path / f"a/1{suffix}")
    listing = read_source(run_of({"kind": "folder", "root": str(tmp_path)}))
    assert [v.source for v in listing.videos] == [f"a/1{suffix}"]


def test_what_is_left_out_is_told_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for file in ("a/1.mp4", "b/1.film", "b/2.film", "a/._1.mp4", "a/none"):
        touch(tmp_path / "videos" / file)
    latin = os.fsencode(tmp_path / "videos/a") + b"/caf\xe9.mp4"
    os.close(os.open(latin, os.O_CREAT | os.O_WRONLY))
    run = run_of({"kind": "folder", "root": str(tmp_path / "videos")}, output=str(tmp_path / "out"))
    plan = plan_once(run, open_store(run.output))
    assert [v.source for v in plan.videos] == ["a/1.mp4"]
    assert (
        "5 left out: 2 (the ending .film is not among those taken for videos; e.g. 'b/1.film')" in caplog.text
    )
    lines = (tmp_path / "out" / LEFT_OUT_FILE).read_text().splitlines()
    assert {(row["name"], row["reason"].split(" is ")[0]) for row in map(json.loads, lines)} == {
        ("a/._1.mp4", "hidden"),
        ("a/caf\\xe9.mp4", "its name"),
        ("a/none", "the ending none"),
        ("b/1.film", "the ending .film"),
        ("b/2.film", "the ending .film"),
    }


def test_a_build_beside_a_name_that_is_not_utf8(
    demo_videos: Path, tmp_path: Path, make_run: Callable[..., ShardRun]
) -> None:
    from cliplift.sharding.build.run import run_shard

    film = sorted((demo_videos / "labelled/train").rglob("*.mp4"))[0].read_bytes()
    (tmp_path / "v/a").mkdir(parents=True)
    (tmp_path / "v/a/1.mp4").write_bytes(film)
    Path(os.fsdecode(os.fsencode(tmp_path / "v/a") + b"/caf\xe9.mp4")).write_bytes(film)
    run = make_run(tmp_path / "out", source={"kind": "folder", "root": str(tmp_path / "v")}, workers=1)
    assert run_shard(run).clips_written == 1
    assert "caf\\\\xe9.mp4" in (tmp_path / "out" / LEFT_OUT_FILE).read_text()


@pytest.mark.parametrize(
    "path", ["y" * 300 + ".mp4", "d/" * 3000 + "1.mp4", "/" + "y" * 300, "a\0b.mp4", ".", "/", "0.mp4/1.mp4"]
)
def test_a_path_that_no_file_can_have_is_missing(tmp_path: Path, path: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    touch(tmp_path / "0.mp4")
    pq.write_table(pa.table({"path": ["0.mp4", path], "label": ["a", "b"]}), tmp_path / "list.parquet")
    listing = read_source(run_of({"kind": "csv", "file": str(tmp_path / "list.parquet")}))
    assert [v.source for v in listing.videos] == ["0.mp4"]
    assert [v.source for v in listing.missing] == [path]
    assert listing.classes == ("a", "b")


def test_kinetics_classes_are_those_of_the_list(tmp_path: Path) -> None:
    names = ("abseiling", "yoga", "zumba")
    rows = [f"{name},{i},0,10,val" for i, name in enumerate(names)]
    (tmp_path / "val.csv").write_text("\n".join(["label,youtube_id,time_start,time_end,split", *rows]))
    for i in (0, 2):
        touch(tmp_path / f"{i}_000000_000010.mp4")
    listing = read_source(
        run_of({"kind": "kinetics", "lists": [str(tmp_path / "val.csv")], "root": str(tmp_path)})
    )
    assert listing.classes == names
    assert {v.video_id: v.label for v in (*listing.videos, *listing.missing)} == {"0": 0, "2": 2, "1": 1}


def test_hmdb51_clips_of_a_film_are_a_group(shared_data: Path, tmp_path: Path) -> None:
    lists = shared_data / "lists/hmdb51_splits"
    files = ("April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "April_09_brush_hair_u_nm_np1_ba_goo_1.avi")
    for name in (*files, "Aussie_Brunette_Brushing_Hair_II_brush_hair_u_nm_np1_ba_goo_4.avi"):
        touch(tmp_path / name)
    listing = read_source(run_of({"kind": "hmdb51", "lists": str(lists), "root": str(tmp_path)}))
    groups = {v.source: v.group for v in listing.videos}
    assert [groups[name] for name in files] == ["April_09", "April_09"]
    assert set(groups.values()) == {"April_09", "Aussie_Brunette_Brushing_Hair_II"}
    assert all(v.group for v in listing.missing)  # all 6,766 published names tell their film


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4,x\nb.mp4,y\n", r"line 1: .* the list has no header: put a line with path,label above it"),
        ("path,label\na.mp4,x\nb.mp4,x\na.mp4,y\n", r"a\.mp4 is listed twice, list\.csv, line 2 and list\.csv, line 4"),
        ("path,label,label\na.mp4,x,y\n", r"line 1: 2 columns are called 'label'"),
        ('path,label\na.mp4,"' + "x" * 200_000, r"line 2: .* a quotation mark that is never closed\?"),
        ("path,label\na.mp4,07\nb.mp4,7\n", r"'07' and '7' are one number written in two ways"),
    ],
    ids=["no header", "twice", "two columns", "quotation mark", "one number"],
)  # fmt: skip
def test_a_wrong_list_says_what_to_do(tmp_path: Path, text: str, message: str) -> None:
    for name in ("a.mp4", "b.mp4"):
        touch(tmp_path / name)
    (tmp_path / "list.csv").write_text(text)
    run = run_of({"kind": "csv", "file": str(tmp_path / "list.csv")})
    with pytest.raises((SourceError, ConfigError), match=message):
        plan_once(run, open_store(str(tmp_path / "out")))


def test_names_are_printable() -> None:
    assert printable("café") == "café"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert printable("\ud800") == "\\ud800"
    assert [is_hidden(name) for name in ("a/b.mp4", ".cache/b.mp4", "a/._b.mp4")] == [False, True, True]


def test_pipes_sockets_and_devices_are_named_and_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.mp4"))
        found = find_files(open_store(str(tmp_path)))
    assert found.files == ()
    assert {item.name: item.reason for item in found.left_out} == dict.fromkeys(
        ("pipe.mp4", "socket.mp4", "zero.mp4"), NO_FILE
    )
    (tmp_path / "list.csv").write_text("path\npipe.mp4\nzero.mp4\n")
    source = {"kind": "csv", "file": str(tmp_path / "list.csv"), "label_column": None}
    assert [video.source for video in read_source(run_of(source)).missing] == ["pipe.mp4", "zero.mp4"]


def test_folders_that_all_link_to_each_other_come_to_an_end(tmp_path: Path) -> None:
    names = [f"f{k:02d}" for k in range(12)]
    for name in names:
        touch(tmp_path / name / "x.mp4")
        for other in names:
            if other != name:
                (tmp_path / name / other).symlink_to(tmp_path / other)
    found = find_files(open_store(str(tmp_path)))
    assert {f"{name}/x.mp4" for name in names} <= set(found.files)
    assert len(found.files) <= (MAX_WAYS + 1) * len(names)
    assert TOO_MANY_WAYS in {item.reason for item in found.left_out}
