"""Lists as people and datasets publish them: what is read, how splits and groups come out, which row is wrong."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.configs.sources import SplitConfig
from cliplift.sharding.build.plan import Plan, make_plan
from cliplift.sharding.manifest import SourceVideo
from cliplift.sharding.sources.lists import SourceError
from cliplift.sharding.sources.read import assign_splits, read_source, without_suffix
from cliplift.sharding.sources.tfrecord import RecordError, crc32c, records

LOSSES = {"limits": {"max_missing_share": 1.0}}


def run_of(source: dict[str, Any], **changes: Any) -> ShardRun:
    return ShardRun.model_validate({"name": "set", "output": "unused", "source": source} | LOSSES | changes)


def plan_of(source: dict[str, Any], **changes: Any) -> tuple[Plan, tuple[SourceVideo, ...]]:
    run = run_of(source, **changes)
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(run, Path(folder))
        return replace(plan, videos=tuple(plan.videos)), read_source(run).missing


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


# Folders


def test_split_and_class_folders(tmp_path: Path) -> None:
    for file in (
        "train/b/1.mp4",
        "train/a/2.AVI",
        "test/a/deep/er/3.webm",
        "train/a/notes.txt",
        "train/.hidden/4.mp4",
    ):
        touch(tmp_path / file)
    plan, missing = plan_of({"kind": "folder", "root": str(tmp_path), "layout": "split/class"})
    assert plan.classes == ("a", "b")
    assert {(v.source, v.split, v.label) for v in plan.videos} == {
        ("train/b/1.mp4", "train", 1),
        ("train/a/2.AVI", "train", 0),
        ("test/a/deep/er/3.webm", "test", 0),
    }
    assert missing == ()


def test_a_video_outside_the_layout_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "train/1.mp4")
    with pytest.raises(ConfigError, match=r"'train/1\.mp4' does not lie in split/class folders"):
        plan_of({"kind": "folder", "root": str(tmp_path), "layout": "split/class"})
    with pytest.raises(ConfigError, match="holds no video"):
        plan_of({"kind": "folder", "root": str(tmp_path / "nothing")})


def test_given_classes_keep_their_order_and_must_cover(tmp_path: Path) -> None:
    for name in ("a", "b"):
        touch(tmp_path / name / "1.mp4")
    plan, _ = plan_of({"kind": "folder", "root": str(tmp_path), "classes": ["z", "b", "a"]})
    assert {v.source: v.label for v in plan.videos} == {"a/1.mp4": 2, "b/1.mp4": 1}
    with pytest.raises(ConfigError, match="does not name the class 'b'"):
        plan_of({"kind": "folder", "root": str(tmp_path), "classes": ["a"]})


# Splits and groups


def _videos(count: int) -> list[SourceVideo]:
    return [SourceVideo(video_id=f"v{i}", source=f"c/g{i // 4}_{i}.mp4", split="") for i in range(count)]


def test_groups_stay_together_and_shares_are_met() -> None:
    config = SplitConfig(shares={"train": 0.7, "val": 0.1, "test": 0.2}, group_pattern=r"g(\d+)_")
    assigned = list(assign_splits(_videos(8000), config, folds=0))
    for group in {v.group for v in assigned}:
        assert len({v.split for v in assigned if v.group == group}) == 1 or int(group or 0) > 50
    splits: dict[str | None, set[str]] = {}
    for video in assigned:
        splits.setdefault(video.group, set()).add(video.split)
    assert all(len(found) == 1 for found in splits.values())
    counts = Counter(next(iter(found)) for found in splits.values())
    # 2000 groups: four standard deviations of a binomial are at most 80.
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert abs(counts[split] - 2000 * share) < 80


def test_adding_videos_moves_none() -> None:
    config = SplitConfig(shares={"train": 0.5, "test": 0.5}, group_pattern=r"g(\d+)_")
    few = {v.source: v.split for v in assign_splits(_videos(100), config, folds=0)}
    many = {v.source: v.split for v in assign_splits(_videos(1000), config, folds=0)}
    assert all(many[source] == split for source, split in few.items())


def test_named_groups_and_renamed_splits() -> None:
    config = SplitConfig(groups={"test": ("3", "5")}, group_pattern=r"g(\d+)_")
    assigned = list(assign_splits(_videos(40), config, folds=0))
    assert {v.group for v in assigned if v.split == "test"} == {"3", "5"}
    with pytest.raises(ConfigError, match="no video belongs to group '99'"):
        list(
            assign_splits(
                _videos(40), SplitConfig(groups={"test": ("99",)}, group_pattern=r"g(\d+)_"), folds=0
            )
        )
    with pytest.raises(ConfigError, match=r"does not match 'c/g0_0\.mp4'"):
        list(assign_splits(_videos(4), SplitConfig(group_pattern=r"x(\d+)"), folds=0))
    video = SourceVideo(video_id="v", source="v.mp4", split="validate")
    assert next(assign_splits([video], SplitConfig(rename={"validate": "val"}), folds=0)).split == "val"


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"shares": {"train": 0.5}}, "sum to 1"),
        ({"group_pattern": "("}, "not a regular expression"),
        ({"group_pattern": "abc"}, "needs parentheses"),
        ({"shares": {"../x": 1.0}}, "cannot name a split"),
    ],
)
def test_impossible_split_settings(splits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitConfig.model_validate(splits)


# CSV and Parquet lists


def _csv(tmp_path: Path, text: str, **changes: Any) -> dict[str, Any]:
    (tmp_path / "list.csv").write_bytes(text.encode())
    return {"kind": "csv", "file": str(tmp_path / "list.csv")} | changes


def test_a_list_with_everything(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        touch(tmp_path / name)
    rows = [
        "path,label,split,who,from,to",
        'a.mp4,"x, y",train,p1,0.5,2',
        "",
        "b.mp4,z,test,p2,,",
        "gone.mp4,z,test,p2,,",
    ]
    text = "\ufeff" + "\r\n".join(rows)
    source = _csv(
        tmp_path, text, split_column="split", group_column="who", start_column="from", end_column="to"
    )
    plan, missing = plan_of(source)
    assert plan.classes == ("x, y", "z")
    found = {v.source: v for v in plan.videos}
    assert (found["a.mp4"].start_seconds, found["a.mp4"].end_seconds, found["a.mp4"].group) == (
        0.5,
        2.0,
        "p1",
    )
    assert (found["b.mp4"].start_seconds, found["b.mp4"].split) == (None, "test")
    assert [v.source for v in missing] == ["gone.mp4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.mp4,x\n", r"list.csv, line 1: column 'path' is missing; the columns are file, label"),
        ("path,label\na.mp4,x\nb.mp4\n", r"list.csv, line 3: 1 cells, the header has 2"),
        ("path,label\n,x\n", r"list.csv, line 2, column 'path': is empty"),
        ("path,label\na.mp4,x\na.mp4,y\n", r"a.mp4 is listed twice"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path / "a.mp4")
    with pytest.raises(SourceError, match=message):
        plan_of(_csv(tmp_path, text))


@pytest.mark.parametrize(
    ("cell", "message"), [("x", "'x' is not a time"), ("-1", "'-1' is not a time"), ("nan", "'nan'")]
)
def test_a_bad_time_is_named(tmp_path: Path, cell: str, message: str) -> None:
    source = _csv(tmp_path, f"path,label,t\na.mp4,x,{cell}\n", start_column="t")
    with pytest.raises(SourceError, match=rf"line 2, column 't': {message}"):
        plan_of(source)


def test_bytes_that_are_not_text_are_placed(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"path,label\na.mp4,caf\xe9\n")
    with pytest.raises(SourceError, match=r"list.csv, line 2: byte 20 is not UTF-8"):
        plan_of({"kind": "csv", "file": str(tmp_path / "list.csv")})


def test_a_parquet_list(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    touch(tmp_path / "a.mp4")
    pq.write_table(pa.table({"path": ["a.mp4"], "label": ["x"]}), tmp_path / "list.parquet")
    plan, _ = plan_of({"kind": "csv", "file": str(tmp_path / "list.parquet")})
    assert plan.classes == ("x",)


def test_too_many_missing_videos_stop_the_plan(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    source = _csv(tmp_path, "path,label\na.mp4,x\nb.mp4,x\n")
    with pytest.raises(ConfigError, match=r"1 of 2 listed videos do not exist, e.g. 'b.mp4'"):
        plan_of(source, limits={"max_missing_share": 0.1})
    with pytest.raises(ConfigError, match="no such file"):
        plan_of({"kind": "csv", "file": str(tmp_path / "no.csv")})


def test_order_of_the_list_does_not_matter(tmp_path: Path) -> None:
    for i in range(20):
        touch(tmp_path / f"{i}.mp4")
    rows = [f"{i}.mp4,c{i % 3}" for i in range(20)]
    plans = []
    for order in (rows, rows[::-1]):
        plans.append(
            plan_of(_csv(tmp_path, "\n".join(["path,label", *order])), shards={"videos_per_shard": 6})[0]
        )
    assert plans[0] == plans[1]
    assert [s.stop - s.start for s in plans[0].shards] == [6, 6, 6, 2]


# Kinetics


@pytest.mark.parametrize(
    ("name", "labelled", "split"),
    [
        ("kinetics-400_val", True, "val"),
        ("kinetics-600_val", True, "val"),
        ("k400_validate_rocksyne", True, "validate"),
        ("k700_validate_rocksyne", True, "validate"),
        ("kinetics-400_test", False, "test"),
        ("k700_test_rocksyne", False, "test"),
    ],
)
def test_official_kinetics_lists(
    shared_data: Path, tmp_path: Path, name: str, labelled: bool, split: str
) -> None:
    file = shared_data / "lists" / f"{name}.head500.csv"
    lines = [line.strip() for line in file.read_text().splitlines()][1:]
    touch(tmp_path / "any/x.mp4")
    first = lines[0].split(",")
    at = 1 if labelled else 0
    touch(tmp_path / "any" / f"{first[at]}_{int(first[at + 1]):06d}_{int(first[at + 2]):06d}.mp4")
    plan, missing = plan_of({"kind": "kinetics", "lists": [str(file)], "root": str(tmp_path)})
    assert len(plan.videos) + len(missing) == len(lines) == 500
    assert len(plan.videos) == 1
    assert {v.split for v in (*plan.videos, *missing)} == {split}
    assert (plan.videos[0].label >= 0) == labelled


def test_kinetics_folders_and_whole_videos(tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        '"air drumming",--nQbRBEz2s,104,114,val,0\nabseiling,-_-abcdefgh,3,13,val,1\nabseiling,zzzzzzzzzzz,0,10,val,0\n'
    )
    (tmp_path / "test.csv").write_text("youtube_id,time_start,time_end,split\nzzzzzzzzzzz,20,30,test\n")
    touch(tmp_path / "videos/air drumming/--nQbRBEz2s_000104_000114.mp4")
    touch(tmp_path / "videos/-_-abcdefgh_000003_000013.mkv")
    touch(tmp_path / "videos/zzzzzzzzzzz.webm")
    plan, missing = plan_of(
        {
            "kind": "kinetics",
            "lists": [str(tmp_path / "val.csv"), str(tmp_path / "test.csv")],
            "root": str(tmp_path / "videos"),
        }
    )
    assert plan.classes == ("abseiling", "air drumming")
    assert {(v.video_id, v.label, v.split, v.start_seconds, v.end_seconds) for v in plan.videos} == {
        ("--nQbRBEz2s", 1, "val", None, None),
        ("-_-abcdefgh", 0, "val", None, None),
        ("zzzzzzzzzzz", 0, "val", 0.0, 10.0),
        ("zzzzzzzzzzz", -1, "test", 20.0, 30.0),
    }
    assert missing == ()


# UCF101 and HMDB51


@pytest.mark.slow
def test_official_ucf101_lists(shared_data: Path, tmp_path: Path) -> None:
    lists = shared_data / "lists/ucf101"
    listed: dict[str, dict[int, str]] = {}
    for fold in (1, 2, 3):
        for split in ("train", "test"):
            for line in (lists / f"{split}list0{fold}.txt").read_text().split("\n"):
                if line.strip():
                    listed.setdefault(line.split()[0], {})[fold] = split
    for path in listed:
        touch(tmp_path / path)
    plan, missing = plan_of({"kind": "ucf101", "lists": str(lists), "root": str(tmp_path)})
    assert (len(plan.videos), len(missing), len(plan.classes), plan.folds) == (13320, 0, 101, 3)
    assert Counter(v.folds[0] for v in plan.videos) == {
        "train": 9537,
        "test": 3783,
    }  # the published sizes of split 1
    for video in plan.videos:
        assert plan.classes[video.label] == video.source.split("/")[0]
        assert dict(enumerate(video.folds, start=1)) == listed[video.source]
    by_group: dict[str | None, set[tuple[str, ...]]] = {}
    for video in plan.videos:
        by_group.setdefault(video.group, set()).add(video.folds)
    assert len(by_group) == 25 * 101
    assert all(len(folds) == 1 for folds in by_group.values())  # the official splits never divide a group


@pytest.mark.slow
def test_official_hmdb51_lists(shared_data: Path, tmp_path: Path) -> None:
    lists = shared_data / "lists/hmdb51_splits"
    for file in lists.glob("*_split1.txt"):
        for line in file.read_text().splitlines():
            if line.strip():
                touch(tmp_path / line.split()[0])  # a flat folder
    plan, missing = plan_of({"kind": "hmdb51", "lists": str(lists), "root": str(tmp_path)})
    assert (len(plan.videos) + len(missing), len(plan.classes), plan.folds) == (6766, 51, 3)
    for fold in range(3):
        counts = Counter((v.label, v.folds[fold]) for v in (*plan.videos, *missing))
        # The official protocol: 70 training and 30 test clips of every class, in every split.
        assert {counts[label, "train"] for label in range(51)} == {70}
        assert {counts[label, "test"] for label in range(51)} == {30}


def test_folds_reach_the_reader(demo_videos: Path, tmp_path: Path, make_run: Callable[..., ShardRun]) -> None:
    from cliplift.sharding.build.run import run_shard
    from cliplift.sharding.read.reader import ShardDataset

    lists, videos = tmp_path / "lists", tmp_path / "videos"
    lists.mkdir()
    films = sorted((demo_videos / "labelled/train").rglob("*.mp4"))[:6]
    for name, fold_marks in (("wave", ("1", "1", "2")), ("clap", ("1", "2", "0"))):
        for i, film in enumerate(films[:3] if name == "wave" else films[3:]):
            target = touch(videos / name / f"{name}_{i}.mp4")
            target.write_bytes(film.read_bytes())
        for fold, mark in enumerate(fold_marks, start=1):
            rows = "".join(f"{name}_{i}.mp4 {mark if i else '1'} \r\n" for i in range(3))
            (lists / f"{name}_test_split{fold}.txt").write_text(rows)
    run_shard(make_run(tmp_path / "out", source={"kind": "hmdb51", "lists": str(lists), "root": str(videos)}))
    sizes = {
        (fold, split): len(ShardDataset(str(tmp_path / "out"), fold=fold, split=split))
        for fold, split in ((1, "train"), (2, "train"), (2, "test"), (3, "train"), (3, "test"))
    }
    assert sizes == {(1, "train"): 6, (2, "train"): 4, (2, "test"): 2, (3, "train"): 2, (3, "test"): 2}
    with pytest.raises(ConfigError, match="3 folds"):
        ShardDataset(str(tmp_path / "out"), fold=4, split="train")


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (
            "trainlist01.txt",
            "Jump/v_Jump_g01_c01.avi 2\r\n",
            "trainlist01.txt, line 1, column 2: 2 is not the number of Jump",
        ),
        (
            "testlist02.txt",
            "Jmup/v_Jump_g01_c01.avi\r\n",
            "testlist02.txt, line 1, column 1: class 'Jmup' is not in classInd",
        ),
        ("classInd.txt", "Jump\r\n", "classInd.txt, line 1: expected a number and a class name"),
    ],
)
def test_a_wrong_ucf101_line_is_named(tmp_path: Path, file: str, line: str, message: str) -> None:
    (tmp_path / "classInd.txt").write_bytes(b"1 Jump\r\n2 Run\r\n")
    for fold in (1, 2, 3):
        for split in ("train", "test"):
            (tmp_path / f"{split}list0{fold}.txt").write_bytes(b"")
    (tmp_path / file).write_bytes(line.encode())
    with pytest.raises(SourceError, match=message):
        plan_of({"kind": "ucf101", "lists": str(tmp_path), "root": str(tmp_path)})


# YouTube-8M


def test_crc32c_against_its_published_values() -> None:
    # RFC 3720, appendix B.4.
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_youtube8m(tf_records: ModuleType, shared_data: Path, tmp_path: Path) -> None:
    vocabulary = shared_data / "lists/vocabulary.csv"
    frames = tf_records.field(2, tf_records.field(1, b"frame features are passed over"))
    (tmp_path / "records").mkdir()
    (tmp_path / "records/train0001.tfrecord").write_bytes(
        tf_records.record(tf_records.example("AbCd", [3, 7], extra=frames))
        + tf_records.record(tf_records.example("EfGh", [7]))
    )
    (tmp_path / "records/validate02.tfrecord").write_bytes(
        tf_records.record(tf_records.example("IjKl", [7], name="video_id"))
    )
    (tmp_path / "ids.csv").write_text("id,youtube_id\nAbCd,-abcdefghi_\n")
    touch(tmp_path / "videos/-abcdefghi_.mp4")
    touch(tmp_path / "videos/IjKl.mkv")
    source = {
        "kind": "youtube8m",
        "records": str(tmp_path / "records"),
        "vocabulary": str(vocabulary),
        "root": str(tmp_path / "videos"),
        "ids": str(tmp_path / "ids.csv"),
    }
    plan, missing = plan_of(source, splits={"rename": {"validate": "val"}})
    assert len(plan.classes) == 1000  # the classes of YouTube-8M Segments
    found = {v.video_id: ([plan.classes[n] for n in v.labels], v.split, v.label) for v in plan.videos}
    assert found == {"-abcdefghi_": (["Concert", "Car"], "train", -1), "IjKl": (["Car"], "val", -1)}
    assert [v.video_id for v in missing] == ["EfGh"]


def test_records_are_read_by_the_protobuf_library_too(tf_records: ModuleType) -> None:
    """The hand-written messages above mean what the published schema says (google.protobuf is the judge)."""
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    optional, repeated, kind_message = 1, 3, 11

    def add(name: str, *fields: tuple[str, int, int, int, str]) -> None:
        message = file.message_type.add(name=name)
        for field, number, label, kind, type_name in fields:
            message.field.add(name=field, number=number, label=label, type=kind, type_name=type_name or None)

    add("BytesList", ("value", 1, repeated, 12, ""))
    add("FloatList", ("value", 1, repeated, 2, ""))
    add("Int64List", ("value", 1, repeated, 3, ""))
    add("Feature", ("bytes_list", 1, optional, kind_message, ".t.BytesList"),
        ("float_list", 2, optional, kind_message, ".t.FloatList"),
        ("int64_list", 3, optional, kind_message, ".t.Int64List"))  # fmt: skip
    add("Entry", ("key", 1, optional, 9, ""), ("value", 2, optional, kind_message, ".t.Feature"))
    add("Features", ("feature", 1, repeated, kind_message, ".t.Entry"))
    add("Example", ("features", 1, optional, kind_message, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
    message.ParseFromString(tf_records.example("AbCd", [3, 300]))
    features = {entry.key: entry.value for entry in message.features.feature}
    assert list(features["id"].bytes_list.value) == [b"AbCd"]
    assert list(features["labels"].int64_list.value) == [3, 300]


@pytest.mark.parametrize("at", [0, 9, 14, -2])
def test_a_damaged_record_is_named(tf_records: ModuleType, at: int) -> None:
    data = bytearray(tf_records.record(tf_records.example("AbCd", [3])) * 2)
    data[len(data) // 2 + at if at >= 0 else at] ^= 1
    with pytest.raises(RecordError, match=r"x.tfrecord, record 1:"):
        list(records(bytes(data), file="x.tfrecord"))
    with pytest.raises(RecordError, match="ends inside"):
        list(records(bytes(tf_records.record(b"abc"))[:-1], file="x.tfrecord"))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="a/.\\é", max_size=12) | st.text(max_size=20))
def test_a_path_without_its_ending_is_pathlib_s(path: str) -> None:
    plain = PurePosixPath(path)
    # From Python 3.14 on, a name that ends in a dot has that for an ending.
    ended = plain.with_suffix("") if plain.name and not plain.name.endswith(".") else plain
    assert without_suffix(path) == str(ended)
