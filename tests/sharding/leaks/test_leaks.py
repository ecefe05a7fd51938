"""Test clips in a pretraining set: found whatever their cut and coding, told from others of one room, and removed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cliplift.launch import cli
from cliplift.sharding.build.finalize import remove_videos
from cliplift.sharding.leaks import check as checking
from cliplift.sharding.leaks.check import LeakError, LeakReport, find_leaks
from cliplift.sharding.leaks.records import LEAKS_FILE, add_checks, known_leaks, read_checks, shards_digest
from cliplift.sharding.manifest import ManifestError, index_file, load_index
from cliplift.sharding.read.generations import open_dataset
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.storage import open_store


def test_a_part_that_is_smaller_worse_and_cut_elsewhere_is_found(report: LeakReport) -> None:
    found = {leak.clip.sample.video_id: leak for leak in report.leaks}
    assert set(found) == {"planted", "walked"}, "rooms in which others walk, and clips of train, are none"
    planted = found["planted"]
    assert planted.of.sample.video_id == "t1"
    assert planted.begins_seconds == pytest.approx(0, abs=0.1)
    assert planted.of_begins_seconds == pytest.approx(21 / 16, abs=0.1), (
        "seconds, 21 frames of 16 a second in"
    )
    assert planted.shared_seconds == pytest.approx(3, abs=0.1)
    walked = found["walked"]
    assert walked.of.sample.video_id == "room7"
    assert walked.of_begins_seconds == pytest.approx(37 / 16, abs=0.1)
    assert (planted.kind, walked.kind) == ("pictures", "pictures")
    assert report.check.videos == ("planted", "walked")
    assert (report.check.clips, report.check.against_clips, report.check.splits) == (7, 3, ("test",))


@pytest.mark.slow
def test_parts_workers_and_order_give_the_same(
    report: LeakReport, leaking: Path, tests_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "LOOKS_AT_ONCE", 1)  # every test clip is a pass of its own
    again = find_leaks(str(leaking), str(tests_set), workers=2)
    assert again.listing() == report.listing()
    assert again.check == report.check


@pytest.mark.slow
def test_a_clip_without_looks_in_its_index_is_decoded(
    report: LeakReport, leaking: Path, tests_set: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(leaking, tmp_path / "set"))
    for path in folder.rglob("*.index.json"):
        tree = json.loads(path.read_bytes())
        path.write_text(json.dumps(tree | {"looks": []}))
        assert load_index(path.read_bytes(), file="i").picture_hashes == ()
    assert find_leaks(str(folder), str(tests_set), workers=1).listing() == report.listing()


@pytest.mark.slow
def test_found_removed_and_said(
    leaking: Path, tests_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, page = Path(shutil.copytree(leaking, tmp_path / "set")), tmp_path / "leaks.html"
    words = ["dedupe", str(folder), "--against", str(tests_set), "--output", str(page), "--workers", "1"]
    assert cli.main(words) == 1, "what was found stays"
    said = capsys.readouterr().out
    assert "tested (test): 2 of 7 clips show what one of its 3 clips shows, of 2 videos" in said
    assert "planted.mp4 from 0.0 s is t1.mp4 from 1.3 s, for 3.0 s (pictures)" in said
    rows = [json.loads(line) for line in page.with_suffix(".jsonl").read_text().splitlines()]
    assert [(row["source"], row["of_source"]) for row in rows] == [
        ("planted.mp4", "t1.mp4"),
        ("walked.mp4", "room7.mp4"),
    ]
    html = page.read_text()
    assert html.count("<figure class=pair>") == 2
    assert html.count("data:image/jpeg;base64,") == 2 * 2 * 4, "four moments of both clips of each pair"
    before = ShardDataset(str(folder)).fingerprint
    record = (folder / LEAKS_FILE).read_bytes()
    assert cli.main([*words, "--remove"]) == 0
    after = ShardDataset(str(folder))
    assert after.column("video_id") == ["a", "b", "room3", "room5", "own"]
    assert after.fingerprint != before
    assert "generation 2 has 5 clips, 2 fewer; its fingerprint is" in capsys.readouterr().out
    assert (folder / LEAKS_FILE).read_bytes() == record, "the same check, whatever became of what it found"
    assert cli.main(words) == 0, "nothing is found any more"
    known = known_leaks(str(folder))
    assert [(check.videos, left) for check, left in zip(known.checks, known.left, strict=True)] == [
        (("planted", "walked"), 0)
    ]


def test_what_is_known_holds_for_shards_and_not_for_generations(
    leaking: Path, tests_set: Path, report: LeakReport, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(leaking, tmp_path / "set"))
    assert known_leaks(str(folder)).checks == ()
    add_checks(open_store(str(folder)), [report.check])
    remove_videos(str(folder), ["planted", "a"])
    for url in (str(folder), f"{folder}@1"):
        assert known_leaks(url).left == (1,), "one is still there; what was removed is in no generation"
    tested = open_dataset(str(tests_set))[1]
    names = {"shards": report.check.shards, "tested_shards": shards_digest(tested)}
    assert report.check.covers(**names, split="test", fold=None)
    assert not report.check.covers(**names, split="train", fold=None)
    assert not report.check.covers(**{**names, "shards": names["tested_shards"]}, split="test", fold=None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: --against"),
        (["--against", "{leaking}"], "have the same shards"),
        (["--against", "{tests}", "--split", "tset"], "has no split 'tset'.*it has test, train"),
        (["--against", "{tests}", "--fold", "2"], "has no official split 2.*leave --fold out"),
        (["--against", "{tests}/none"], "holds no dataset.json"),
        (["--against", "{tests}", "--workers", "-1"], "asks for what cannot be"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    leaking: Path,
    tests_set: Path,
    tmp_path: Path,
    words: list[str],
    says: str,
    *,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [word.format(leaking=leaking, tests=tests_set) for word in words]
    try:
        status = cli.main(["dedupe", str(leaking), "--output", str(tmp_path / "p.html"), *filled])
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status == 2
    assert re.search(says, capsys.readouterr().err, flags=re.DOTALL)
    assert list(tmp_path.iterdir()) == []


def test_a_generation_is_not_searched(
    leaking: Path, tests_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["dedupe", f"{leaking}@1", "--against", str(tests_set)]) == 2
    assert "names a generation" in capsys.readouterr().err


@pytest.mark.slow
def test_damaged_clips_and_records_are_named(
    leaking: Path, tests_set: Path, report: LeakReport, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tests_set, tmp_path / "set"))
    tar = folder / "s/0.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    with pytest.raises(LeakError, match=r"s/0\.tar, tested-t1: crc32 differs.*call it again"):
        find_leaks(str(leaking), str(folder), workers=1)
    (folder / index_file("s/1.tar")).unlink()
    with pytest.raises(ManifestError, match=r"s/1\.index\.json: does not exist"):
        find_leaks(str(folder), str(leaking), splits=("train",), workers=1)
    store = open_store(str(folder))
    add_checks(store, [report.check])
    whole = store.read(LEAKS_FILE)
    changes = (
        (b"cliplift-leaks/1", b"cliplift-leaks/9"),
        (b'"fold":0', b'"fold":-1'),
        (b'"planted"', b'"zz"'),
    )
    for damaged in (whole[:-9], *(whole.replace(*change) for change in changes)):
        store.write(LEAKS_FILE, damaged)
        with pytest.raises(ManifestError, match=r"leaks\.json"):
            read_checks(store)


@pytest.mark.slow
def test_clips_of_one_file_are_found_by_their_source(
    dark_clip: bytes, tmp_path: Path, make_set: Callable[..., Path]
) -> None:
    """A dark clip looks like any other; it is found where both name the same source file and overlap in it."""
    one, other = {"x": ("train", dark_clip)}, {"x": ("test", dark_clip)}
    first, second = (make_set(tmp_path / n, n, clips) for n, clips in (("a", one), ("b", other)))
    assert find_leaks(str(first), str(second), workers=1).leaks == ()
    third = make_set(tmp_path / "c", "c", other, shared_sources=True)
    fourth = make_set(tmp_path / "d", "d", one, shared_sources=True)
    (leak,) = find_leaks(str(third), str(fourth), workers=1, splits=("train",)).leaks
    assert (leak.kind, leak.begins_seconds, leak.shared_seconds) == ("content", 0.0, 2.0)
