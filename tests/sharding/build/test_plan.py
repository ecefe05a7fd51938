"""The plan of a build against the rule written out: shuffled by a hash of seed and name, cut into shards by split."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build import plan as plan_module
from cliplift.sharding.build.plan import (
    Addition,
    Plan,
    PlannedVideos,
    load_plan,
    make_plan,
    plan_addition,
    plan_once,
    save_plan,
    settings_of,
)
from cliplift.sharding.manifest import Dataset, ManifestError, ShardFacts, SourceVideo
from cliplift.sharding.storage import LocalStore

COUNTS = {"train": 11, "val": 4, "test": 1}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    for split, count in COUNTS.items():
        for number in range(count):
            path = folder / split / "ab"[number % 2] / f"{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return folder


def made(run: ShardRun, **options: Any) -> tuple[Plan, list[SourceVideo], list[dict[str, Any]]]:
    """A plan, its videos, and the rows of those that do not exist."""
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(run, Path(folder), **options)
        missing = [json.loads(line) for line in (Path(folder) / "missing.jsonl").read_text().splitlines()]
        return plan, list(plan.videos), missing


def run_of(videos: Path, output: Path | str = "unused", **changes: Any) -> ShardRun:
    source = {"kind": "folder", "root": str(videos), "layout": "split/class"}
    tree = {"name": "set", "output": str(output), "source": source, "shards": {"videos_per_shard": 4}}
    return ShardRun.model_validate(tree | changes)


def listed(folder: Path, present: int, missing: int, **changes: Any) -> ShardRun:
    """A list of videos of which some do not exist."""
    for number in range(present):
        (folder / f"{number}.mp4").touch()
    rows = [f"{number}.mp4,a" for number in range(present + missing)]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    source = {"kind": "csv", "file": str(folder / "list.csv"), "root": str(folder)}
    return ShardRun.model_validate({"name": "set", "output": str(folder / "out"), "source": source} | changes)


def by_hash(names: list[str], seed: int) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}:None".encode()).hexdigest())


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_videos_are_dealt_by_a_hash_of_seed_and_name(videos: Path, seed: int) -> None:
    _, planned, missing = made(run_of(videos, shards={"videos_per_shard": 4, "seed": seed}))
    expected = [
        name
        for split in ("test", "train", "val")
        for name in by_hash([p.relative_to(videos).as_posix() for p in (videos / split).rglob("*.mp4")], seed)
    ]
    assert [video.source for video in planned] == expected
    assert missing == []


def test_a_seed_changes_the_shards_and_the_plan(videos: Path) -> None:
    """The default is 0, and where the seed stands in the settings is part of the plan's identity."""
    default, in_order, _ = made(run_of(videos))
    zero, _, _ = made(run_of(videos, shards={"videos_per_shard": 4, "seed": 0}))
    one, other, _ = made(run_of(videos, shards={"videos_per_shard": 4, "seed": 1}))
    assert default == zero
    assert [v.source for v in other] != [v.source for v in in_order]
    assert one.plan_id != zero.plan_id


def test_shards_are_full_but_for_the_last_of_a_split_and_hold_one_split(videos: Path) -> None:
    plan, planned, _ = made(run_of(videos))
    assert [(s.shard, s.split, s.tar, s.start, s.stop) for s in plan.shards] == [
        (0, "test", "test/set-test-000000.tar", 0, 1),
        (1, "train", "train/set-train-000001.tar", 1, 5),
        (2, "train", "train/set-train-000002.tar", 5, 9),
        (3, "train", "train/set-train-000003.tar", 9, 12),
        (4, "val", "val/set-val-000004.tar", 12, 16),
    ]
    assert [v.split for v in planned] == ["test"] + ["train"] * 11 + ["val"] * 4
    assert (plan.classes, plan.folds, plan.missing, plan.root) == (("a", "b"), 0, 0, str(videos))


def test_a_plan_cannot_be_changed(videos: Path) -> None:
    plan, _, _ = made(run_of(videos))
    for part in (plan, plan.shards[0], Addition((), 1, (), frozenset())):
        with pytest.raises(FrozenInstanceError):
            part.first = 3  # type: ignore[union-attr]


def test_windows_of_one_video_are_dealt_apart_and_in_order_of_their_start(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").touch()
    starts = ("0.0", "2.5", "10.0", "30.0")
    rows = [f"v.mp4,a,{start},{float(start) + 1}" for start in starts]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,start,end", *rows]) + "\n")
    source = {"kind": "csv", "file": str(tmp_path / "list.csv"), "root": str(tmp_path),
              "start_column": "start", "end_column": "end"}  # fmt: skip
    _, planned, _ = made(ShardRun.model_validate({"name": "set", "output": "unused", "source": source}))
    keys = {float(s): hashlib.sha256(f"0:v.mp4:{float(s)}".encode()).hexdigest() for s in starts}
    assert [v.start_seconds for v in planned] == sorted(keys, key=lambda start: keys[start])


def test_up_to_the_allowed_share_of_videos_may_be_missing(tmp_path: Path) -> None:
    """3 of 12 are a quarter: allowed at exactly that, refused just below, and named."""
    run = listed(tmp_path, 9, 3, limits={"max_missing_share": 0.25})
    plan, planned, missing = made(run)
    assert (len(planned), plan.missing, len(missing)) == (9, 3, 3)
    assert {row["source"] for row in missing} == {"9.mp4", "10.mp4", "11.mp4"}
    strict = listed(tmp_path, 9, 3, limits={"max_missing_share": 0.24})
    with pytest.raises(ConfigError, match="3 of 12 listed videos do not exist") as caught:
        made(strict)
    assert (caught.value.key, caught.value.value) == ("limits.max_missing_share", 0.24)
    assert "allow 0.25" in str(caught.value)


def test_what_the_source_leaves_out_is_written_where_there_is_a_store(
    videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(str(tmp_path / "out"))
    made(run_of(videos), store=store)
    assert store.list() == [], "nothing is left out"
    (videos / "train" / "a" / "notes.txt").touch()
    (videos / "train" / "b" / ".5.mp4").touch()
    made(run_of(videos), store=None)
    assert "all are in" not in caplog.text
    made(run_of(videos, "there"), store=store)
    assert "2 left out" in caplog.text
    assert "all are in there/left_out.jsonl" in caplog.text
    lines = [json.loads(line) for line in store.read("left_out.jsonl").splitlines()]
    assert {line["name"]: line["reason"] for line in lines} == {
        "train/a/notes.txt": "the ending .txt is not among those taken for videos",
        "train/b/.5.mp4": "hidden",
    }


def test_a_plan_comes_back_as_it_was_saved(videos: Path, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "out"))
    assert load_plan(store) is None
    (videos / "train" / "a" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    run = run_of(videos, limits={"max_missing_share": 0.1})
    (tmp_path / "made").mkdir()
    plan = make_plan(run, tmp_path / "made")
    planned = list(plan.videos)
    save_plan(plan, tmp_path / "made", store)
    found = load_plan(store)
    assert found == plan
    assert list(found.videos) == planned
    assert [found.videos[n] for n in (7, 0, 15)] == [planned[n] for n in (7, 0, 15)]
    assert found.videos[3:9] == tuple(planned[3:9])
    assert (
        store.read("missing.jsonl")
        == b'{"source":"train/a/gone.mp4","split":"train","video_id":"train/a/gone"}\n'
    )
    text = store.read("plan/plan.json").decode()
    head = json.loads(text)
    assert text == json.dumps(head, indent=1, ensure_ascii=False, sort_keys=True) + "\n", (
        "the same bytes anywhere"
    )
    assert "videos" not in head
    assert head["shards"][1] == {
        "shard": 1,
        "split": "train",
        "start": 1,
        "stop": 5,
        "tar": plan.shards[1].tar,
    }


def test_the_plan_is_written_last(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its presence says that the rest is there."""
    names: list[str] = []
    for verb in ("write", "publish"):
        done = getattr(LocalStore, verb)

        def noted(self: LocalStore, *arguments: Any, done: Any = done) -> None:
            names.append(next(name for name in arguments if isinstance(name, str)))
            done(self, *arguments)

        monkeypatch.setattr(LocalStore, verb, noted)
    plan_once(run_of(videos, tmp_path / "out"), LocalStore(str(tmp_path / "out")))
    assert names == ["plan/videos.parquet", "missing.jsonl", "plan/plan.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not whole JSON"), ('{"format": "other"}', "not a plan of this version"), ("{}", "not a plan")],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, text: str, said: str) -> None:
    store = LocalStore(str(tmp_path))
    store.write("plan/plan.json", text.encode())
    with pytest.raises(ManifestError, match=f"plan/plan.json: {said}"):
        load_plan(store)


def test_a_file_in_place_of_the_folder_holds_no_plan(tmp_path: Path) -> None:
    (tmp_path / "plan").write_text("")
    assert load_plan(LocalStore(str(tmp_path))) is None


def test_a_plan_is_made_once(videos: Path, tmp_path: Path) -> None:
    """A video that comes later is not in it; other settings are refused with the key, the same ones are not."""
    output = tmp_path / "out"
    store = LocalStore(str(output))
    first = plan_once(run_of(videos, output), store)
    (videos / "val" / "a" / "later.mp4").touch()
    assert plan_once(run_of(videos, output, workers=3), store) == first
    with pytest.raises(ConfigError, match=r"8 here, but the shards in .* were planned with 4") as caught:
        plan_once(run_of(videos, output, shards={"videos_per_shard": 8}), store)
    assert (caught.value.key, caught.value.value) == ("shards.videos_per_shard", 8)
    with pytest.raises(ConfigError, match="were planned with 0") as caught:
        plan_once(run_of(videos, output, shards={"videos_per_shard": 4, "seed": 1}), store)
    assert caught.value.key == "shards.seed"


def test_a_plan_of_before_a_setting_existed_is_gone_on_with(videos: Path, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "out"))
    run = run_of(videos, tmp_path / "out")
    first = plan_once(run, store)
    head = json.loads(store.read("plan/plan.json"))
    del head["settings"]["duplicates"], head["settings"]["shards"]["seed"]
    store.write("plan/plan.json", json.dumps(head).encode())
    assert plan_once(run, store).plan_id == first.plan_id


def test_flow_is_a_setting_only_where_it_is_asked_for(videos: Path) -> None:
    assert set(settings_of(run_of(videos))) == {
        "name", "source", "splits", "cut", "transcode", "shards", "duplicates"
    }  # fmt: skip
    assert settings_of(run_of(videos, flow={}))["flow"]["method"] == "dis"


def test_a_setting_that_becomes_nothing_is_another_one_too(videos: Path, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "out"))
    plan_once(run_of(videos, tmp_path / "out", shards={"seed": 1}), store)
    with pytest.raises(ConfigError, match=r"0 here, .* were planned with 1") as caught:
        plan_once(run_of(videos, tmp_path / "out", shards={"seed": 0}), store)
    assert (caught.value.key, caught.value.value) == ("shards.seed", 0)


@pytest.fixture
def twenty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PlannedVideos, list[int]]:
    """Videos 0 to 19 of a table in row groups of 7, read by 3; and the number of each that was read."""
    names = [f"{number}" for number in range(20)]
    rows = {"video_id": names, "source": names, "split": ["train"] * 20, "label": [0] * 20}
    pq.write_table(pa.table(rows), tmp_path / "videos.parquet", row_group_size=7)
    read: list[int] = []

    def noted(table: pa.Table) -> list[int]:
        numbers = [int(name) for name in table.column("video_id").to_pylist()]
        read.extend(numbers)
        return numbers

    monkeypatch.setattr(plan_module, "VIDEOS_READ", 3)
    monkeypatch.setattr(plan_module, "videos_of", noted)
    return PlannedVideos(LocalStore(str(tmp_path)), "videos.parquet"), read


def test_planned_videos_are_those_of_their_rows_wherever_one_goes(
    twenty: tuple[Sequence[Any], list[int]],
) -> None:
    videos, _ = twenty
    draw = random.Random(0)
    for _ in range(300):
        start = draw.randrange(20)
        stop = draw.randrange(start, 21)
        assert videos[start:stop] == tuple(range(start, stop))
        assert videos[start] == start
    for place in (-1, 20):
        with pytest.raises(IndexError, match=f"video {place} of 20"):
            videos[place]
    assert len(videos) == 20


def test_planned_videos_in_order_are_read_once(twenty: tuple[Sequence[Any], list[int]]) -> None:
    videos, read = twenty
    assert list(videos) == list(range(20))
    assert [videos[n] for n in (18, 19)] == [18, 19]
    assert read == list(range(20)), "none twice"


def test_planned_videos_of_a_later_part_are_reached_over_groups(
    twenty: tuple[Sequence[Any], list[int]],
) -> None:
    """Group 7 to 13 is passed over, and going back costs one group."""
    videos, read = twenty
    assert videos[1] == 1
    assert read == [0, 1, 2]
    assert videos[15] == 15
    assert read[3:] == [14, 15, 16]
    assert videos[9:11] == (9, 10)
    assert read[6:] == [7, 8, 9, 10, 11, 12]
    assert videos[13] == 13
    assert read[12] == 13, "the next of the same group goes on"


def dataset_of(plan: Plan) -> Dataset:
    """A finished build of a plan, as far as an addition looks at it."""
    shards = tuple(
        ShardFacts(shard=s.shard, file=s.tar, split=s.split, samples=1, bytes=1, sha256="")
        for s in plan.shards
    )
    return Dataset(
        name=plan.name, classes=plan.classes, shards=shards, samples=1, samples_sha256="", splits={}, folds=0,
        refused={}, missing=0, plan_id=plan.plan_id, settings=plan.settings, versions={}, fingerprint="",
    )  # fmt: skip


def test_an_addition_plans_what_is_new_after_the_shards_that_are_there(videos: Path, tmp_path: Path) -> None:
    """Its missing videos are listed beside it; the list of the first plan stays. It is made once too."""
    output = tmp_path / "out"
    store = LocalStore(str(output))
    first = plan_once(run_of(videos, output), store)
    (videos / "train" / "b" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    for name in ("train/a/new.mp4", "train/b/newer.mp4", "val/a/taken_down.mp4"):
        (videos / name).touch()
    run = run_of(videos, output, limits={"max_missing_share": 0.1})
    plan = plan_addition(run, dataset_of(first), frozenset({"val/a/taken_down"}), store)
    assert [video.source for video in plan.videos] == by_hash(["train/a/new.mp4", "train/b/newer.mp4"], 0)
    assert [(s.shard, s.tar, s.start, s.stop) for s in plan.shards] == [
        (5, "train/set-train-000005.tar", 0, 2)
    ]
    assert store.read("missing.jsonl") == b""
    assert json.loads(store.read("plan/000005/missing.jsonl"))["source"] == "train/b/gone.mp4"
    (videos / "train" / "a" / "later.mp4").touch()
    assert plan_addition(run, dataset_of(first), frozenset(), store) == plan, "the one under way"
    with pytest.raises(ConfigError, match="were planned with 4") as caught:
        plan_addition(
            run_of(videos, output, shards={"videos_per_shard": 9}), dataset_of(first), frozenset(), store
        )
    assert caught.value.key == "shards.videos_per_shard"


def test_nothing_new_makes_no_plan(videos: Path, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "out"))
    first = plan_once(run_of(videos, tmp_path / "out"), store)
    before = store.list()
    plan = plan_addition(run_of(videos, tmp_path / "out"), dataset_of(first), frozenset(), store)
    assert (plan.shards, list(plan.videos)) == ((), [])
    assert store.list() == before


def test_videos_are_added_only_where_the_dataset_was_built(videos: Path, tmp_path: Path) -> None:
    plan, _, _ = made(run_of(videos))
    elsewhere = LocalStore(str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"holds no plan/plan\.json") as caught:
        plan_addition(run_of(videos, "elsewhere"), dataset_of(plan), frozenset(), elsewhere)
    assert (caught.value.key, caught.value.value) == ("output", "elsewhere")


def test_an_addition_is_cut_as_the_dataset_was(videos: Path, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "out"))
    first = plan_once(run_of(videos, tmp_path / "out"), store)
    other = run_of(videos, tmp_path / "out", cut={"kind": "windows", "length_seconds": 4})
    with pytest.raises(ConfigError) as caught:
        plan_addition(other, dataset_of(first), frozenset(), store)
    assert str(caught.value.key).startswith("cut.")


def test_the_classes_of_an_addition_have_the_numbers_of_the_dataset() -> None:
    """What a source numbers a, c is 2, 0 in a dataset of c, b, a; no label stays none."""
    addition = Addition(("c", "b", "a"), 4, (), frozenset())
    assert addition.labels(("a", "c"), [0, 1, -1, 0]) == [2, 0, -1, 2]
    with pytest.raises(ConfigError, match="names the class 'd', which the dataset does not have") as caught:
        addition.labels(("a", "d"), [0, 1])
    assert (caught.value.key, caught.value.value) == ("source", "d")


def test_a_split_that_lacks_a_class_or_everything_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in ("a/g1_1.mp4", "a/g2_1.mp4", "b/g2_2.mp4"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()

    def said(**splits: object) -> list[str]:
        caplog.clear()
        source = {"kind": "folder", "root": str(tmp_path)}
        made(run_of(tmp_path, source=source, splits={"group_pattern": r"(g\d)_"} | splits))
        return [record.getMessage() for record in caplog.records]

    (lacking,) = said(shares={"train": 1.0}, groups={"test": ["g1"]})
    assert lacking.startswith("split 'test' has no video of 'b': few groups")
    assert "splits.groups" in lacking
    (empty,) = said(shares={"train": 1.0}, groups={"test": ["g1", "g2"]})
    assert empty.startswith("split 'train' has no video: few groups")
    assert said(shares={"train": 1.0}) == []  # one split alone has all there is
    assert said(shares={"train": 1.0, "test": 0.0}) == []  # none is wanted there
    (tmp_path / "b/g1_2.mp4").touch()
    assert said(shares={"train": 1.0}, groups={"test": ["g1"]}) == []
