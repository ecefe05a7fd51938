"""Scores as columns of a generation: their values, what interruption and other generations do to them, and filters."""

from __future__ import annotations

import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from cliplift.configs.data import DataConfig
from cliplift.configs.sections import ConfigError
from cliplift.launch import cli
from cliplift.sharding.build.finalize import remove_videos
from cliplift.sharding.build.verify import verify
from cliplift.sharding.manifest import DATASET_FILE, ManifestError
from cliplift.sharding.read.generations import open_dataset
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.read.subsets import Subset
from cliplift.sharding.scores.carried import stored_scores
from cliplift.sharding.scores.measures import score_clip
from cliplift.sharding.scoring.census import SplitCensus, census
from cliplift.sharding.scoring.run import ScoreError, score_dataset
from cliplift.sharding.storage import TEMPORARY_SUFFIX

StopAfter = Callable[[int], AbstractContextManager[None]]
STILL, DAMAGED, CLIPS = (1, 4, 5, 8), 6, 9


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "set"))


def columns(folder: Path | str) -> dict[str, list[float]]:
    with stored_scores(*open_dataset(str(folder))) as found:
        return {name: found.column(name).tolist() for name in found.facts}


def keys(folder: Path | str, where: str | None, split: str | None = None) -> list[str]:
    dataset = ShardDataset(str(folder), split=split, where=where)
    return [dataset.key(i) for i in range(len(dataset))]


def test_columns_hold_what_each_clip_scores_by_itself(unscored: Path, scored: Path) -> None:
    dataset = ShardDataset(str(unscored))
    found = columns(scored)
    for i in range(CLIPS):
        if i == DAMAGED:
            assert np.isnan([found["motion"][i], found["brightness"][i]]).all()
            continue
        expected = score_clip(dataset.read(i), ["motion", "brightness"])
        assert {n: found[n][i] for n in expected} == {n: float(np.float32(v)) for n, v in expected.items()}
        assert (found["motion"][i] < 1e-6) == (i in STILL)
    assert found["duplicate"] == [float(i == 7) for i in range(CLIPS)]


def test_tars_tables_and_fingerprint_stay(unscored: Path, scored: Path) -> None:
    before, after = contents(unscored), contents(scored)
    assert {n: after[n] for n in before if n != DATASET_FILE} == {
        n: before[n] for n in before if n != DATASET_FILE
    }
    assert after["generations/000001/dataset.json"] == before[DATASET_FILE]
    for name in ("samples.parquet", "catalog.json", "catalog.bin"):
        assert after[f"generations/000002/{name}"] == before[name]
    assert ShardDataset(str(scored)).fingerprint == ShardDataset(str(unscored)).fingerprint
    assert b'"cliplift-shards/4"' in after[DATASET_FILE], "an earlier version is told that it cannot read it"
    assert [p for p in verify(str(scored), decode="none").problems if p.error] == []


def test_nothing_is_computed_twice(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy(scored, tmp_path)
    monkeypatch.setattr("cliplift.sharding.scoring.run.WorkerPool", None)  # no clip is decoded below
    report = score_dataset(str(folder), ["motion"])
    assert (report.new, report.dataset.generation, report.scored) == (False, 2, 0)
    # Killed before its generation was there: the parts are, and the generation has the same bytes.
    first = (folder / "generations/000001/dataset.json").read_bytes()
    shutil.rmtree(folder / "generations")
    (folder / DATASET_FILE).write_bytes(first)
    again = score_dataset(str(folder), ["duplicate", "brightness", "motion"])
    assert (again.new, again.scored) == (True, 0)
    assert contents(folder) == contents(scored)


def test_interrupted_at_any_file_scoring_goes_on_to_the_same_bytes(
    unscored: Path, scored: Path, tmp_path: Path, stop_after: StopAfter
) -> None:
    for files in (
        1,
        2,
        5,
    ):  # inside the first shard; of whole shards before and after the table of the generation
        folder = copy(unscored, tmp_path / f"{files}")
        if files > 1:
            shutil.copytree(scored / "scores", folder / "scores")
        with stop_after(files), pytest.raises(KeyboardInterrupt):
            score_dataset(str(folder), ["motion", "brightness", "duplicate"], workers=1)
        assert open_dataset(str(folder))[1].generation == 1, "the dataset is the generation before"
    score_dataset(str(folder), ["motion", "brightness", "duplicate"], workers=1)
    assert contents(folder) == contents(scored)


@pytest.mark.slow
def test_workers_parts_and_damaged_parts_give_the_same_bytes(
    unscored: Path, scored: Path, tmp_path: Path
) -> None:
    expected = contents(scored)
    names = ["motion", "brightness", "duplicate"]
    folder = copy(unscored, tmp_path / "workers")
    score_dataset(str(folder), names, workers=3)
    assert contents(folder) == expected
    folder = copy(unscored, tmp_path / "parts")
    for part in (1, 0):
        report = score_dataset(str(folder), names, workers=1, part=(part, 2))
        assert (report.new, report.scored) == (False, {0: 5, 1: 4}[part])
    (folder / "scores/000001/motion-1.bin").write_bytes(b"damaged")
    assert score_dataset(str(folder), names, workers=1).scored == 4
    assert contents(folder) == expected


def test_a_clip_whose_bytes_are_damaged_stops_scoring(unscored: Path, tmp_path: Path) -> None:
    folder = copy(unscored, tmp_path)
    tar = folder / "s/1.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ScoreError, match=r"s/1\.tar, byte \d+: crc32 differs.*call it again"):
        score_dataset(str(folder), ["motion"], workers=1)
    assert open_dataset(str(folder))[1].generation == 1


def test_a_filter_chooses_clips_of_a_split(scored: Path) -> None:
    moving = [i for i in range(CLIPS) if i not in (*STILL, DAMAGED)]
    assert keys(scored, "motion > 0.00098") == [f"k{i}" for i in moving]
    assert keys(scored, "not motion > 0.00098") == [f"k{i}" for i in STILL], "what has no score is left out"
    assert keys(scored, "motion > 0.00098 and not duplicate", "train") == [
        f"k{i}" for i in moving if i not in (3, 7)
    ]
    assert keys(scored, 'class == "jump" and seconds < 1 and height == 64') == ["k1", "k3", "k5", "k7"]
    taken = Subset(label_share=0.5)
    both = ShardDataset(str(scored), split="train", subset=taken, where="motion > 0.00098")
    whole = ShardDataset(str(scored), split="train", subset=taken)
    rows = [both.row(i) for i in range(len(both))]
    assert rows == [r for r in (whole.row(i) for i in range(len(whole))) if r in moving]


def test_a_filter_is_part_of_the_fingerprint_and_travels_to_workers(scored: Path) -> None:
    url = str(scored)
    one = ShardDataset(url, where="motion > 0.00098")
    prints = {
        text: ShardDataset(url, where=text).fingerprint
        for text in (" (motion)>.00098", "motion > 0.00099", "motion > 0.00098 or false", "height > 0")
    }
    assert prints.pop(" (motion)>.00098") == one.fingerprint, "spaces and brackets mean nothing"
    assert len({*prints.values(), one.fingerprint, ShardDataset(url).fingerprint}) == 5
    sent = pickle.loads(pickle.dumps(one))
    assert sent.fingerprint == one.fingerprint
    assert [sent.key(i) for i in range(len(sent))] == [one.key(i) for i in range(len(one))]
    assert sent.read(0) == one.read(0)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("sharpness > 1", r"there is no column 'sharpness'; run `cliplift score \S+/scored sharpness`"),
        ("motoin > 1", "no column 'motoin'; did you mean motion"),
        ("class == 'walks'", "no class is called 'walks'; did you mean 'walk'"),
        ("motion > 99", "leaves none of the 9 clips"),
    ],
)
def test_a_filter_that_cannot_be_is_one_sentence(scored: Path, where: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ShardDataset(f"{scored}@2", where=where)


def test_training_is_filtered_and_evaluation_is_not(scored: Path) -> None:
    from cliplift.pipelines.data.source import ClipSource

    data = DataConfig(shards=(str(scored),), where="motion > 0.00098", val_split="val")
    train, every = ClipSource(data, split="train"), ClipSource(data, split=None)
    assert [train.facts(i).key for i in range(len(train))] == ["k0", "k2", "k7"]
    assert len(every) == CLIPS
    assert train.fingerprint != ClipSource(data.model_copy(update={"where": None}), split="train").fingerprint
    strict = data.model_copy(update={"where": "motion < 0.00098"})
    assert len(ClipSource(strict, split="val")) == 1, "a moving clip, and all of evaluation"


def test_scores_of_what_stays_are_carried_over_when_videos_are_removed(scored: Path, tmp_path: Path) -> None:
    folder = copy(scored, tmp_path)
    remove_videos(str(folder), ["v0", "v6", "v8"])
    found, before = columns(folder), columns(scored)
    left = [i for i in range(CLIPS) if i not in (0, 6, 8)]
    assert found == {name: [values[i] for i in left] for name, values in before.items()}
    assert keys(folder, "motion > 0.00098") == ["k2", "k3", "k7"]
    assert keys(f"{folder}@2", "motion > 0.00098") == ["k2", "k3", "k7"], (
        "what was removed is in no generation"
    )
    kept = ShardDataset(f"{folder}@2", where="motion > 0.00098", keep_numbers=True)
    assert [kept.row(i) for i in range(len(kept))] == [0, 2, 3, 7], "a run goes on with its numbers"
    assert kept.fingerprint == ShardDataset(f"{scored}@2", where="motion > 0.00098").fingerprint
    assert [p for p in verify(str(folder), decode="none").problems if p.error] == []


@pytest.mark.parametrize("file", ["scores.bin", "scores.json"])
def test_damaged_columns_are_found(scored: Path, tmp_path: Path, file: str) -> None:
    folder = copy(scored, tmp_path)
    path = folder / "generations/000002" / file
    whole = path.read_bytes()
    for damaged in (
        whole[:-1],
        bytes([whole[0] ^ 1]) + whole[1:],
        whole + b"\0",
        whole[:-1] + bytes([whole[-1] ^ 1]),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ManifestError, match=file.replace(".", r"\.")):
            ShardDataset(str(folder), where="brightness > 0").read(0)
        assert any(p.error for p in verify(str(folder), decode="none").problems)
    path.unlink()
    with pytest.raises(ManifestError, match="copy"):
        ShardDataset(str(folder), where="brightness > 0")
    assert len(ShardDataset(str(folder))) == CLIPS, "what needs no scores reads none"


def test_the_command_line(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(scored, tmp_path)
    assert cli.main(["score", str(folder), "motion"]) == 0
    assert "scored before; generation 2 stays, with brightness, duplicate, motion" in capsys.readouterr().out
    for words, says in (
        ([str(folder)], "names no score; there are motion"),
        ([str(folder), "motoin"], "there is no score 'motoin'; did you mean motion?"),
        ([f"{folder}@1", "motion"], "names a generation"),
        ([str(tmp_path / "none"), "motion"], "holds no dataset.json"),
        ([str(folder), "motion", "--part", "2/2"], "--part '2/2' is not I/N"),
        ([str(folder), "motion", "--workers", "-1"], "--workers 0 or more"),
    ):
        assert cli.main(["score", *words]) == 2
        assert says in capsys.readouterr().err


def test_what_a_filter_leaves_by_split_and_class(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = census(str(scored), "motion > 0.00098")
    assert train == SplitCensus("train", {"walk": (2, 5), "jump": (1, 3)})
    assert val == SplitCensus("val", {"jump": (1, 1)})
    (train, val) = census(str(scored), "motion < 0.00098 and class == 'walk'")
    assert (train.left, train.clips, train.lost, val.lost) == (2, 8, ("jump",), ("jump",))
    page = str(tmp_path / "page.html")
    assert cli.main(["show", str(scored), "--where", "motion > 0.00098", "--output", page]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["train: 3 of 8 clips (37.5%)", "  jump  1 of 3", "  walk  2 of 5"]
    assert lines[3:5] == ["val: 1 of 1 clips (100.0%)", "  jump  1 of 1"]
    assert cli.main(["show", str(scored), "--where", "motion >"]) == 2
    assert "data.where: it ends where a value is expected" in capsys.readouterr().err


def test_check_says_what_a_filter_leaves(scored: Path) -> None:
    from cliplift.launch.check.fit import Known, _filter
    from cliplift.launch.check.machine import Machine
    from cliplift.launch.commands.subject import load_training
    from cliplift.pipelines.data.source import ClipSource

    words = [f"data.shards={scored}", "data.where=motion > 0.00098 and class == 'walk'", "data.val_share=0"]
    run = load_training("finetune/small", words).run
    known = Known(train=ClipSource(run.data, split="train"))
    machine = Machine.__new__(Machine)  # nothing of it is asked
    train, val = _filter(run, machine, known)
    assert train.found.endswith("train: 2 of 8 clips; jump 0 of 3, walk 2 of 5")
    assert train.remedy == "nothing is left of 1 classes, such as jump: relax data.where"
    assert val.found.endswith("val: 0 of 1 clips; jump 0 of 1")
    assert val.remedy == "evaluation takes all of them"


@pytest.mark.slow
def test_killed_with_signal_9_scoring_goes_on_to_the_same_bytes(
    unscored: Path, scored: Path, tmp_path: Path
) -> None:
    folder = copy(unscored, tmp_path)
    words = ["score", str(folder), "motion", "brightness", "duplicate", "--workers", "1"]
    command = [sys.executable, "-m", "cliplift.launch.cli", *words]
    for files in (0, 1, 3):  # before the first shard's scores, between its two, in the second shard
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list((folder / "scores").rglob("*.bin"))) < files:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert open_dataset(str(folder))[1].generation == 1, "the dataset is the generation before"
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    found = {name: data for name, data in contents(folder).items() if not name.endswith(TEMPORARY_SUFFIX)}
    assert found == contents(scored)
