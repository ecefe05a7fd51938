"""A build gives the same bytes whatever interrupts or divides it, and loses nothing silently."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.launch.commands.shard import summary
from cliplift.sharding.build.finalize import BuildError
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.build.unit import Progress
from cliplift.sharding.build.verify import verify
from cliplift.sharding.manifest import BUILD_FILE, DATASET_FILE, PLAN_FILE, REFUSED_FILE
from cliplift.sharding.read.reader import ShardDataset

MakeRun = Callable[..., ShardRun]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset except the record of how long the build took."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != BUILD_FILE
    }


def test_shards_stream_with_stock_webdataset(built: Path) -> None:
    manifest = json.loads((built / DATASET_FILE).read_text())
    keys = []
    for shard in manifest["shards"]:
        for sample in webdataset.WebDataset(str(built / shard["file"]), shardshuffle=False):
            facts = json.loads(sample["json"])
            assert facts["key"] == sample["__key__"]
            assert sample["mp4"][4:8] == b"ftyp"
            # The index of the file stands in front, so that a decoder can start before the end has arrived.
            assert sample["mp4"].index(b"moov") < sample["mp4"].index(b"mdat")
            keys.append(sample["__key__"])
    dataset = ShardDataset(str(built))
    assert keys == [dataset.facts(i).key for i in range(len(dataset))]
    assert len(set(keys)) == 40


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(
    built: Path, make_run: MakeRun, tmp_path: Path, workers: int
) -> None:
    run_shard(make_run(tmp_path / "other", workers=workers))
    assert contents(tmp_path / "other") == contents(built)


@pytest.mark.slow
def test_parts_make_the_same_dataset(built: Path, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "parts")
    first = run_shard(run, part=(0, 2))
    assert first.dataset is None  # the other part's shards are missing, so nothing is finalized
    assert not (tmp_path / "parts" / DATASET_FILE).exists()
    with pytest.raises(BuildError, match=r"4 of 8 shards are not built: 1, 3, 5, 7"):
        run_shard(run, phases=["finalize"])
    second = run_shard(run, part=(1, 2))
    assert second.dataset is not None
    assert contents(tmp_path / "parts") == contents(built)


def test_phases_can_be_run_one_by_one(built: Path, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "phases")
    assert run_shard(run, phases=["plan"]).shards_built == 0
    assert run_shard(run, phases=["build"]).shards_built == 8
    assert run_shard(run, phases=["finalize"]).dataset is not None
    verified = run_shard(run, phases=["verify"]).verified
    assert verified is not None
    assert verified.ok
    assert contents(tmp_path / "phases") == contents(built)


def _start(run: ShardRun, tmp_path: Path) -> subprocess.Popen[bytes]:
    config = tmp_path / "run.json"
    config.write_text(run.model_dump_json())
    script = (
        "import sys; from pathlib import Path; from cliplift.configs.sharding import ShardRun; "
        "from cliplift.sharding.build.run import run_shard; "
        "run_shard(ShardRun.model_validate_json(Path(sys.argv[1]).read_text()))"
    )
    return subprocess.Popen([sys.executable, "-c", script, str(config)], start_new_session=True)


def _kill_at_random_moments(run: ShardRun, tmp_path: Path, *, kills: int, seed: int) -> int:
    """Start the build, kill it with SIGKILL once it writes, again and again; then let it finish. Kills that hit."""
    draw = random.Random(seed)
    hits = 0
    for _ in range(kills):
        process = _start(run, tmp_path)
        folder = Path(run.output)
        before = len(list(folder.rglob("*.index.json")))
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < 60:
            grown = len(list(folder.rglob("*.index.json"))) > before or list(folder.rglob("*.tmp"))
            if grown:
                break
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.25))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            hits += 1
        process.wait()
    run_shard(run)
    return hits


@pytest.mark.slow
def test_a_killed_build_resumes_to_the_same_bytes(built: Path, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "killed")
    assert _kill_at_random_moments(run, tmp_path, kills=3, seed=0) >= 1
    leftovers = list((tmp_path / "killed").rglob("*.tmp"))
    for orphan in leftovers:  # verify names them as warnings; they never stand in the way
        assert any(
            p.file.endswith(orphan.name) and not p.error for p in verify(run.output, decode="none").problems
        )
        orphan.unlink()
    assert contents(tmp_path / "killed") == contents(built)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_build_killed_ten_times_resumes_to_the_same_bytes(
    built: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "killed", workers=1)
    assert _kill_at_random_moments(run, tmp_path, kills=10, seed=1) >= 5
    for orphan in (tmp_path / "killed").rglob("*.tmp"):
        orphan.unlink()
    assert contents(tmp_path / "killed") == contents(built)


@pytest.mark.slow
def test_no_worker_outlives_a_killed_build(make_run: MakeRun, tmp_path: Path) -> None:
    process = _start(make_run(tmp_path / "killed", workers=2), tmp_path)
    workers: set[int] = set()
    deadline = time.monotonic() + 60
    while len(workers) < 2 and process.poll() is None and time.monotonic() < deadline:
        workers = _workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while (left := {pid for pid in workers if _is_worker(pid)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def _workers_of(parent: int) -> set[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children")
    try:
        return {int(pid) for pid in children.read_text().split() if _is_worker(int(pid))}
    except OSError:
        return set()


def _is_worker(pid: int) -> bool:
    try:
        return b"cliplift.sharding.build.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_second_run_builds_nothing(dataset: Path, make_run: MakeRun) -> None:
    report = run_shard(make_run(dataset))
    assert (report.shards_built, report.shards_kept) == (0, 8)


@pytest.mark.parametrize(
    "damage",
    ["flip", *(pytest.param(d, marks=pytest.mark.slow) for d in ("cut", "remove", "index", "foreign plan"))],
)
def test_a_damaged_shard_is_built_again(dataset: Path, built: Path, make_run: MakeRun, damage: str) -> None:
    tar = sorted(dataset.rglob("*.tar"))[3]
    index = tar.with_suffix(".index.json")
    if damage == "flip":
        data = bytearray(tar.read_bytes())
        data[len(data) // 2] ^= 1
        tar.write_bytes(data)
    elif damage == "cut":
        tar.write_bytes(tar.read_bytes()[:-1024])
    elif damage == "remove":
        tar.unlink()
    elif damage == "index":
        index.write_text(index.read_text()[:200])
    else:
        index.write_text(json.dumps(json.loads(index.read_text()) | {"plan_id": "0" * 64}))
    report = run_shard(make_run(dataset))
    assert (report.shards_built, report.shards_kept) == (1, 7)
    assert contents(dataset) == contents(built)


def test_changed_settings_are_refused_and_named(dataset: Path, make_run: MakeRun) -> None:
    run = make_run(dataset, transcode={"crf": 30})
    with pytest.raises(ConfigError, match=r"30 here, but the shards in .* were planned with 23") as caught:
        run_shard(run)
    assert caught.value.key == "transcode.crf"


def test_a_plan_made_before_a_setting_existed_goes_on_with_its_default(
    dataset: Path, make_run: MakeRun
) -> None:
    plan = json.loads((dataset / PLAN_FILE).read_text())
    del plan["settings"]["duplicates"]
    for name in ("mode", "encoder", "codec"):
        del plan["settings"]["transcode"][name]
    (dataset / PLAN_FILE).write_text(json.dumps(plan))
    assert run_shard(make_run(dataset)).shards_built == 0
    with pytest.raises(ConfigError, match=r"'remove' here, but the shards in .* were planned with 'report'"):
        run_shard(make_run(dataset, duplicates="remove"))


def test_number_of_workers_and_limits_may_change(dataset: Path, make_run: MakeRun) -> None:
    report = run_shard(make_run(dataset, workers=1, limits={"clip_timeout_seconds": 5.0}))
    assert report.shards_built == 0


def test_progress_counts_everything(make_run: MakeRun, tmp_path: Path) -> None:
    seen: list[Progress] = []
    counts = []
    run_shard(
        make_run(tmp_path / "seen"),
        on_progress=lambda p: (seen.append(p), counts.append((p.videos_done, p.clips))),
    )
    assert counts == [(n, n) for n in range(1, 41)]
    last = seen[-1]
    assert (last.videos_total, last.shards_done, last.shards_total) == (40, 8, 8)
    assert last.bytes > 0
    assert last.seconds_left == 0
    record = json.loads((tmp_path / "seen" / BUILD_FILE).read_text())
    assert record["clips_written"] == 40
    assert record["verified"] is True


def test_windows_cover_a_video_and_share_its_id(demo_videos: Path, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "windows",
        source={"kind": "folder", "root": str(demo_videos / "unlabelled"), "layout": "flat"},
        cut={"kind": "windows", "length_seconds": 1.4, "stride_seconds": 0.7, "min_seconds": 1.4},
        splits={"shares": {"train": 1.0}},
    )
    run_shard(run)
    dataset = ShardDataset(run.output, split="train")
    # 4.53 s (68 frames at 15/s) hold 5 windows of 1.4 s that start every 0.7 s: at 0, 0.7, 1.4, 2.1 and 2.8 s.
    assert len(dataset) == 4 * 5
    for first in range(0, 20, 5):
        facts = [dataset.facts(i) for i in range(first, first + 5)]
        assert len({f.video_id for f in facts}) == 1
        assert [f.span_seconds[0] for f in facts] == pytest.approx([0.0, 0.7, 1.4, 2.1, 2.8])
        assert all(f.num_frames == 21 and f.label is None for f in facts)


def test_a_window_shows_the_frames_of_its_span(demo_videos: Path, make_run: MakeRun, tmp_path: Path) -> None:
    from cliplift.sharding.video.decode import decode_frames

    run = make_run(
        tmp_path / "windows",
        source={"kind": "folder", "root": str(demo_videos / "unlabelled"), "layout": "flat"},
        cut={"kind": "windows", "length_seconds": 2.0, "max_per_video": 2},
        splits={"shares": {"train": 1.0}},
        transcode={"crf": 10},
    )
    run_shard(run)
    dataset = ShardDataset(run.output)
    for i in range(len(dataset)):
        facts = dataset.facts(i)
        source = (demo_videos / "unlabelled" / facts.source).read_bytes()
        start = round(facts.span_seconds[0] * 15)
        expected = decode_frames(source, range(start, start + facts.num_frames), decoder="pyav").astype(int)
        found = decode_frames(dataset.read(i), range(facts.num_frames), decoder="pyav").astype(int)
        right = np.abs(found - expected).mean()
        shifted = np.abs(found[1:] - expected[:-1]).mean()
        assert right < shifted / 2  # one frame off would be seen


def test_refused_clips_are_in_the_ledger(demo_videos: Path, make_run: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "videos" / "some class"
    folder.mkdir(parents=True)
    good = sorted((demo_videos / "labelled/train/recede").glob("*.mp4"))[0].read_bytes()
    (folder / "good.mp4").write_bytes(good)
    (folder / "cut.mp4").write_bytes(good[: len(good) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    source = {"kind": "folder", "root": str(tmp_path / "videos")}
    with pytest.raises(BuildError, match=r"3 of 4 clips were refused.*max_refused_share"):
        run_shard(make_run(tmp_path / "out", source=source))
    report = run_shard(make_run(tmp_path / "out", source=source, limits={"max_refused_share": 0.8}))
    assert report.refused == {"transcode": 3}
    ledger = [json.loads(line) for line in (tmp_path / "out" / REFUSED_FILE).read_text().splitlines()]
    assert {entry["source"]: entry["reason"].split(":")[0] for entry in ledger} == {
        "some class/cut.mp4": "decode",
        "some class/empty.mp4": "cannot be opened",
        "some class/text.mp4": "cannot be opened",
    }
    assert ShardDataset(str(tmp_path / "out")).facts(0).source == "some class/good.mp4"


@pytest.mark.slow
def test_retry_failed_builds_only_what_may_succeed_now(
    demo_videos: Path, make_run: MakeRun, tmp_path: Path, built: Path
) -> None:
    import shutil

    videos = tmp_path / "labelled"
    shutil.copytree(demo_videos / "labelled", videos)
    gone = videos / "train/recede/train_recede_0000.mp4"
    run = make_run(
        tmp_path / "out",
        source={"kind": "folder", "root": str(videos), "layout": "split/class"},
        limits={"max_refused_share": 0.5},
    )
    run_shard(run, phases=["plan"])
    gone.rename(tmp_path / "away.mp4")  # a file system that is down for a while
    strict = run.model_copy(update={"limits": run.limits.model_copy(update={"max_refused_share": 0.0})})
    with pytest.raises(BuildError, match=r"1 of \d+ clips were refused.*--retry-failed"):
        run_shard(strict)
    report = run_shard(run)
    assert report.refused == {"read": 1}
    assert "--retry-failed" in summary(report)
    (tmp_path / "away.mp4").rename(gone)
    assert run_shard(run).shards_built == 0
    report = run_shard(run, retry_failed=True)
    assert (report.shards_built, report.refused) == (1, {})
    tars = {name: data for name, data in contents(tmp_path / "out").items() if name.endswith(".tar")}
    assert tars == {name: data for name, data in contents(built).items() if name.endswith(".tar")}


def test_a_run_can_be_read_from_yaml(make_run: MakeRun, tmp_path: Path) -> None:
    from cliplift.configs.load import load_run

    run = make_run(tmp_path / "out")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert load_run(file, {"shard": ShardRun}).run == run
