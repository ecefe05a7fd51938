"""Something-Something v2, Diving48 and Kinetics-710 as they are published: lists, classes, and which entry is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.sources.lists import Listing, SourceError
from cliplift.sharding.sources.read import read_source

LABELS = {"Holding something": "1", "Closing something": "0", "Pushing something from left to right": "2"}
SOMETHING: dict[str, Any] = {
    "labels": LABELS,
    "train": [
        {"id": "7", "label": "holding a pen", "template": "Holding [something]"},
        {"id": "70", "label": "pushing a cup", "template": "Pushing [something] from left to right",
         "placeholders": ["a cup"]},
    ],
    "validation": [{"id": "8", "label": "closing a book", "template": "Closing [something]"}],
    "test": [{"id": "9"}, {"id": "10"}],
}  # fmt: skip
DIVES = [["Back", "15som", "05Twis", "FREE"], ["Forward", "25som", "NoTwis", "PIKE"]]
DIVING: dict[str, Any] = {
    "Diving48_vocab": DIVES,
    "Diving48_V2_train": [{"vid_name": "-mmq0PT-u8k_00155", "label": 1, "start_frame": 0, "end_frame": 48}],
    "Diving48_V2_test": [{"vid_name": "_8Vy3dlHg2w_00000", "label": 0, "start_frame": 0, "end_frame": 65}],
}
HEADER = "label,youtube_id,time_start,time_end,split"
# Three editions of two or three classes; 400's "drinking" is called "sipping cup" by 700, as is published.
EDITIONS = {
    "k400": ("drinking,aaaaaaaaaaa,0,10,train", "archery,bbbbbbbbbbb,3,13,train", "archery,ccccccccccc,1,11,val"),
    "k600": ("archery,bbbbbbbbbbb,3,13,train", "archery,ddddddddddd,0,10,train", "yoga,fffffffffff,2,12,validate"),
    "k700": (
        "sipping cup,aaaaaaaaaaa,5,15,train", "archery,ccccccccccc,7,17,train", "yoga,eeeeeeeeeee,0,10,train",
        "archery,ggggggggggg,2,12,train",
    ),
}  # fmt: skip
MAPS = {"k400": [2, 0], "k600": [2, 1], "k700": [2, 0, 1]}


def write_lists(folder: Path, trees: dict[str, Any], *, prefix: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for name, tree in trees.items():
        (folder / f"{prefix}{name}.json").write_text(json.dumps(tree))
    return folder


def listing_of(repository: Path, recipe: str, *words: str) -> Listing:
    run = load_run(repository / f"configs/shard/{recipe}.yaml", RUNS, list(words)).run
    assert isinstance(run, ShardRun)
    return read_source(run)


def write_video(path: Path, *, codec: str, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=Fraction(12))
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for picture in rng.integers(0, 255, (10, 32, 48, 3), dtype=np.uint8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_something_something(tmp_path: Path, repository: Path, prefix: str) -> None:
    """Templates in brackets, numbers as texts, the test part without classes; both names of the published files."""
    lists = write_lists(tmp_path / "lists", SOMETHING, prefix=prefix)
    for name in ("7", "8", "9"):
        (tmp_path / "20bn").mkdir(exist_ok=True)
        (tmp_path / "20bn" / f"{name}.webm").touch()
    listing = listing_of(
        repository, "something_something", f"source.lists={lists}", f"source.root={tmp_path}/20bn"
    )
    assert listing.classes == (
        "Closing something",
        "Holding something",
        "Pushing something from left to right",
    )
    found = {(v.source, v.split, v.label) for v in listing.videos}
    assert found == {("7.webm", "train", 1), ("8.webm", "val", 0), ("9.webm", "test", -1)}
    assert [(v.video_id, v.label) for v in listing.missing] == [("70", 2), ("10", -1)]
    (lists / f"{prefix}test.json").unlink()
    again = listing_of(
        repository, "something_something", f"source.lists={lists}", f"source.root={tmp_path}/20bn"
    )
    assert {v.split for v in again.videos} == {"train", "val"}


def test_something_something_is_built_from_webm(tmp_path: Path, make_run: Callable[..., ShardRun]) -> None:
    """Real videos, from the published lists to clips with their classes."""
    lists = write_lists(tmp_path / "lists", SOMETHING)
    for number, name in enumerate(("7", "70", "8")):
        write_video(tmp_path / "videos" / f"{name}.webm", codec="libvpx", seed=number)
    source = {"kind": "something_something", "lists": str(lists), "root": str(tmp_path / "videos")}
    run_shard(
        make_run(
            tmp_path / "out",
            source=source,
            limits={"max_missing_share": 0.5},
            splits={"rename": {"validation": "val"}},
        )
    )
    train = ShardDataset(str(tmp_path / "out"), split="train")
    assert sorted(train.classes[label] for label in train.labels.tolist()) == sorted(LABELS)[1:]
    assert len(ShardDataset(str(tmp_path / "out"), split="val")) == 1


def test_diving48(tmp_path: Path, repository: Path) -> None:
    lists = write_lists(tmp_path / "lists", DIVING)
    write_video(tmp_path / "rgb/-mmq0PT-u8k_00155.mp4", codec="mpeg4", seed=1)
    listing = listing_of(repository, "diving48", f"source.lists={lists}", f"source.root={tmp_path}/rgb")
    assert listing.classes == ("Back_15som_05Twis_FREE", "Forward_25som_NoTwis_PIKE")
    (video,) = listing.videos
    assert (video.source, video.split, video.label) == ("-mmq0PT-u8k_00155.mp4", "train", 1)
    assert video.group == "-mmq0PT-u8k", "clips of one competition stay together"
    (absent,) = listing.missing
    assert (absent.video_id, absent.split, absent.label, absent.group) == (
        "_8Vy3dlHg2w_00000",
        "test",
        0,
        "_8Vy3dlHg2w",
    )


def kinetics710(tmp_path: Path, **changed: Any) -> dict[str, Any]:
    for edition, rows in EDITIONS.items():
        (tmp_path / f"{edition}.csv").write_text("\n".join((HEADER, *rows)) + "\n")
        (tmp_path / f"map_{edition}.json").write_text(json.dumps(changed.get(edition, MAPS[edition])))
    table = "archery\t2\nyoga\t1\nsipping cup\t0\n"
    (tmp_path / "classes.txt").write_text(changed.get("table", table))
    (tmp_path / "videos").mkdir(exist_ok=True)
    lists = {edition: [str(tmp_path / f"{edition}.csv")] for edition in EDITIONS}
    return {"kind": "kinetics710", "lists": lists, "root": str(tmp_path / "videos"), "maps": str(tmp_path),
            "classes_file": str(tmp_path / "classes.txt")}  # fmt: skip


def read710(source: dict[str, Any]) -> Listing:
    return read_source(ShardRun.model_validate({"name": "set", "output": "unused", "source": source}))


def test_kinetics_710_merges_by_youtube_id(tmp_path: Path) -> None:
    """A video once, with its first edition's class and clip; out of training where any edition holds it out."""
    source = kinetics710(tmp_path)
    there = {
        "k400/drinking/aaaaaaaaaaa_000000_000010.mp4", "k600/ddddddddddd.mkv", "k400/val/ccccccccccc_000001_000011.mp4",
    }  # fmt: skip
    for name in there:
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).touch()
    listing = read710(source)
    assert listing.classes == ("sipping cup", "yoga", "archery")
    videos = {v.video_id: v for v in (*listing.videos, *listing.missing)}
    assert {name: (listing.classes[v.label], v.split) for name, v in videos.items()} == {
        "aaaaaaaaaaa": ("sipping cup", "train"),
        "bbbbbbbbbbb": ("archery", "train"),
        "ccccccccccc": ("archery", "val"),
        "ddddddddddd": ("archery", "train"),
        "eeeeeeeeeee": ("yoga", "train"),
        "fffffffffff": ("yoga", "val"),
        "ggggggggggg": ("archery", "train"),
    }
    assert {v.source for v in listing.videos} == there
    whole = videos["ddddddddddd"]
    assert (whole.start_seconds, whole.end_seconds) == (0.0, 10.0)
    assert videos["aaaaaaaaaaa"].start_seconds is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"k600": [2]}, "map_k600.json has 1 classes, the lists of k600 have 2"),
        ({"k600": [2, 9]}, "map_k600.json: 9 is none of the 3 classes"),
        ({"k600": [2, 2]}, "map_k600.json: two classes have one number"),
        ({"k600": [0, 2]}, "map_k600.json calls 'archery' 'sipping cup': it is not the map"),
        ({"k600": {"archery": 2}}, "map_k600.json: a list of class numbers"),
        ({"k600": ["2", "1"]}, "map_k600.json: a list of class numbers"),
        (
            {"table": "archery\t2\nyoga\t1\nsipping cup\t7\n"},
            "classes.txt: its 3 classes are to have the numbers",
        ),
        (
            {"table": "archery\t2\narchery\t1\nsipping cup\t0\n"},
            "classes.txt: a class name stands there twice",
        ),
        ({"table": "archery\tx\n"}, "classes.txt, line 1: a class name and its number"),
        ({"table": ""}, "classes.txt: its 0 classes"),
    ],
)
def test_maps_and_tables_that_are_not_of_each_other(tmp_path: Path, changed: Any, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        read710(kinetics710(tmp_path, **changed))


def test_a_row_of_kinetics_710_is_named(tmp_path: Path) -> None:
    source = kinetics710(tmp_path)
    (tmp_path / "k600.csv").write_text(f"{HEADER}\nyoga,fffffffffff,12,2,train\n")
    with pytest.raises(SourceError, match=r"k600.csv, line 2, column 'time_end': the clip does not end"):
        read710(source)
    (tmp_path / "k600.csv").write_text(f"{HEADER}\nyoga,fffffffffff,2,12,dev\n")
    (tmp_path / "map_k600.json").write_text("[1]")
    with pytest.raises(ConfigError, match="a row of k600 says 'dev'"):
        read710(source)


DEEP = "[" * 100_000
HOSTILE = [
    ("labels", "{", "labels.json: is not JSON"),
    ("labels", DEEP, "labels.json: is nested too deeply"),
    ("labels", "[]", "labels.json: an object of class names"),
    ("labels", '{"a": "0", "b": "2"}', "labels.json: its 2 classes are to have the numbers from 0 to 1"),
    ("labels", '{"a": "0", "b": "0"}', "labels.json: its 2 classes are to have the numbers"),
    ("labels", '{"": "0"}', "labels.json: its label is empty"),
    ("train", '{"id": "7"}', "train.json: a list is needed, and it is a dict"),
    ("train", "[7]", "train.json, entry 1: an object is needed, and it is a int"),
    ("train", '[{"template": "Holding [something]"}]', r"entry 1, 'id': a name is needed, and it is missing"),
    ("train", '[{"id": ["7"], "template": "Holding [something]"}]', r"entry 1, 'id': a name is needed"),
    ("train", '[{"id": true, "template": "Holding [something]"}]', r"entry 1, 'id': a name is needed"),
    ("train", '[{"id": "a\\u0000b", "template": "Holding [something]"}]', r"entry 1, 'id': a name is needed"),
    ("train", '[{"id": "7"}]', r"train.json, entry 1, 'template': a name is needed, and it is missing"),
    ("train", '[{"id": "7", "template": "Juggling [something]"}]', r"entry 1, 'template': 'Juggling something' is not"),
    ("validation", '[{"id": "7", "template": "Holding [something]"}]', r"validation.json, entry 1, 'id': '7' stands"),
    ("train", "[" + "9" * 5000 + "]", "train.json: is not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "said"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_wrong_entry_of_something_something_is_named(
    tmp_path: Path, repository: Path, name: str, text: str, said: str
) -> None:
    lists = write_lists(tmp_path / "lists", SOMETHING)
    (lists / f"{name}.json").write_text(text)
    with pytest.raises(SourceError, match=said):
        listing_of(repository, "something_something", f"source.lists={lists}", f"source.root={tmp_path}")


def test_an_id_is_looked_up_and_never_a_path(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "secret.webm").touch()
    rows = [
        {"id": "../secret", "template": "Holding [something]"},
        {"id": "/etc/passwd", "template": "Holding [something]"},
    ]
    lists = write_lists(tmp_path / "lists", SOMETHING | {"train": rows})
    (tmp_path / "videos").mkdir()
    words = [f"source.lists={lists}", f"source.root={tmp_path}/videos"]
    listing = listing_of(repository, "something_something", *words)
    assert listing.videos == ()
    assert {"../secret", "/etc/passwd"} <= {v.source for v in listing.missing}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("Diving48_vocab", "{}", "Diving48_vocab.json: a list of dives is needed"),
        ("Diving48_vocab", '[["Back", 3]]', "Diving48_vocab.json, dive 0: words are needed"),
        ("Diving48_vocab", '[["Back"], ["Back"]]', "a dive stands there twice"),
        ("Diving48_V2_train", '[{"vid_name": "a_0", "label": 2}]', "entry 1, 'label': 2 is none of the 2"),
        (
            "Diving48_V2_train",
            '[{"vid_name": "a_0", "label": -1}]',
            "entry 1, 'label': a whole number is needed",
        ),
        (
            "Diving48_V2_train",
            '[{"vid_name": "a_0", "label": "1"}]',
            "entry 1, 'label': a whole number is needed",
        ),
        ("Diving48_V2_test", '[{"vid_name": "-mmq0PT-u8k_00155", "label": 1}]', "stands in the lists twice"),
    ],
)
def test_a_wrong_entry_of_diving48_is_named(
    tmp_path: Path, repository: Path, name: str, text: str, said: str
) -> None:
    lists = write_lists(tmp_path / "lists", DIVING)
    (lists / f"{name}.json").write_text(text)
    with pytest.raises(SourceError, match=said):
        listing_of(repository, "diving48", f"source.lists={lists}", f"source.root={tmp_path}")


def test_lists_that_are_not_there_are_one_sentence(tmp_path: Path, repository: Path) -> None:
    with pytest.raises(ConfigError, match="no such file") as caught:
        listing_of(repository, "diving48", f"source.lists={tmp_path}", f"source.root={tmp_path}")
    assert caught.value.key == "source.lists"
