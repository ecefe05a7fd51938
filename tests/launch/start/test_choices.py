"""What `cliplift start` reads from names, and how it divides: known names, groups whole, every class everywhere."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cliplift.configs.sections import ConfigError
from cliplift.launch.check.machine import Machine
from cliplift.launch.start.groups import propose_groups
from cliplift.launch.start.looks import Looks, choose
from cliplift.launch.start.numbers import Numbers, choose_numbers
from cliplift.launch.start.splits import SPLITS, divide
from cliplift.launch.start.videos import find_videos
from cliplift.sharding.manifest import SourceVideo
from cliplift.sharding.video.glance import Glance

GIB = 2**30
HOST = Machine(nodes=1, ranks_per_node=1, gpu=None, memory_bytes=16 * GIB, peak_tflops=None, cores_per_node=4)
CARD = Machine(nodes=1, ranks_per_node=1, gpu="L4", memory_bytes=24e9, peak_tflops=121, cores_per_node=16)


def names(
    *templates: str, classes: tuple[str, ...] = ("up", "down"), takes: int = 3
) -> list[tuple[str, str]]:
    """(path, class) for every class, template and take."""
    return [
        (f"{name}/{template.format(name=name, take=take)}", name)
        for name, template, take in itertools.product(classes, templates, range(1, takes + 1))
    ]


@pytest.mark.parametrize(
    ("templates", "groups"),
    [
        # CCTV: the camera with its place, the same in both classes
        (("gate_cam0_01{take}ab", "dock_cam0_{take}", "dock_cam1_{take}"), {"gate_cam0", "dock_cam0", "dock_cam1"}),
        (("v_{name}_g01_c0{take}", "v_{name}_g02_c0{take}"), {"g01", "g02"}),  # UCF101
        (("{name}_8_{take}", "{name}_11_{take}"), {"8", "11"}),  # ARID
        (("person01_{name}_d{take}", "person02_{name}_d{take}"), {"person01", "person02"}),  # KTH
        (("Heat_{name}_u_nm_{take}", "Alien_{name}_u_nm_{take}"), {"Heat", "Alien"}),  # HMDB51
        (("-0b9j0c8AbC_00000{take}_000019", "zzzzzzzzzz1_00000{take}_000029"), {"-0b9j0c8AbC", "zzzzzzzzzz1"}),
        (("monday/{take}", "friday/{take}"), {"monday", "friday"}),
        # the class stands first, and the camera saw both classes
        (("{name}_cam1_{take}", "{name}_cam2_{take}"), {"cam1", "cam2"}),
    ],
)  # fmt: skip
def test_groups_of_names_that_people_use(templates: tuple[str, ...], groups: set[str]) -> None:
    listed = names(*templates)
    rule = propose_groups([f"{path}.mp4" for path, _ in listed], [label for _, label in listed])
    assert rule is not None
    assert set(rule.groups) == groups
    read = [re.search(rule.pattern, f"{path}.mp4") for path, _ in listed]
    assert [match and match.group(1) for match in read] == list(rule.groups)


@pytest.mark.parametrize(
    "template", ["{take}", "clip{take}", "{name}_{take}", "take {take}", "{name}{take}_cut"]
)
def test_names_that_say_nothing_give_no_groups(template: str) -> None:
    listed = names(template)
    assert propose_groups([f"{path}.mp4" for path, _ in listed], [label for _, label in listed]) is None


def test_one_name_that_does_not_fit_is_enough() -> None:
    listed = [*names("gate_cam0_{take}", "yard_cam0_{take}"), ("up/holiday", "up")]
    rule = propose_groups([f"{path}.mp4" for path, _ in listed], [label for _, label in listed])
    assert rule is None


def videos_of(groups: dict[str, str], clips: int = 4) -> list[SourceVideo]:
    """``groups`` has the letters of the classes that each group shows."""
    return [
        SourceVideo(
            video_id=f"{group}{letter}{n}", source=f"{letter}/{group}_{n}.mp4", split="", label=ord(letter) - 97,
            group=group,
        )
        for group, letters in groups.items()
        for letter in letters
        for n in range(clips)
    ]  # fmt: skip


@pytest.mark.parametrize("groups", [7, 20, 60])
def test_every_class_is_in_every_split_and_groups_stay_whole(groups: int) -> None:
    # Class c is seen by every third group alone: a division that does not look at classes may lose it.
    videos = videos_of({f"g{n}": "abc" if n % 3 == 0 else "ab" for n in range(groups)})
    division = divide(videos, classes=3, pattern=None, grouped=True)
    assert division.lacking == dict.fromkeys(SPLITS, ())
    for group in {video.group for video in videos}:
        assert len({s for v, s in zip(videos, division.splits, strict=True) if v.group == group}) == 1
    assert abs(division.clips("train") / len(videos) - 0.6) < 0.15


def test_a_class_of_two_groups_is_trained_and_tested_on() -> None:
    videos = videos_of({"g1": "a", "g2": "a", "g3": "b", "g4": "b", "g5": "b", "g6": "b"})
    division = divide(videos, classes=2, pattern=None, grouped=True)
    assert division.lacking == {"train": (), "val": (0,), "test": ()}


def test_videos_that_stand_alone_are_divided_by_class() -> None:
    videos = [replace(video, group=None) for video in videos_of({"g": "abcd"}, clips=10)]
    videos = [video for video in videos if video.label or video.video_id < "ga6"]  # six of the first class
    division = divide(videos, classes=4, pattern=None, grouped=False)
    assert division.lacking == dict.fromkeys(SPLITS, ())
    assert set(division.section) == {"shares", "seed"}


def test_looks_are_shared_by_the_classes() -> None:
    videos = videos_of({"g": "aaaaab"}, clips=5)
    labels = [videos[number].label for number in choose(videos, 6)]
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]
    assert len(choose(videos, 0)) == len(videos)


def numbers_of(
    machine: Machine = HOST, *, clips: int = 100, classes: tuple[str, ...] = ("a", "b"), **seen: float
) -> Numbers:
    glance = Glance(
        width=320, height=int(seen.get("height", 240)), fps=seen.get("fps", 25), seconds=seen.get("seconds", 10),
        codec="h264", container="mov", picture_hashes=[1], brightness=seen.get("brightness", 0.4),
    )  # fmt: skip
    looks = Looks(((0, glance),), (), (), (), 1, False, True)
    counts = [clips - clips // 5, clips // 5]
    return choose_numbers(looks, machine, train_videos=clips, videos=clips, per_class=counts, classes=classes)


def test_a_clip_spans_what_is_seen() -> None:
    assert numbers_of(seconds=10).sampling.yaml == "{frames: 8, mode: segments}"
    assert numbers_of(CARD, seconds=10).frames == 16
    dense = numbers_of(seconds=40)  # 5 s of 25 frames/s in 8 frames: every 16th
    assert dense.sampling.yaml == "{frames: 8, stride: 16}"
    assert dense.test_clips == 3
    assert numbers_of(seconds=0.24).frames == 6  # 6 frames of 25 a second
    windowed = numbers_of(seconds=100, clips=20)
    assert windowed.window is not None
    assert windowed.clips == 200
    assert windowed.sampling.yaml == "{frames: 8, mode: segments}"


def test_crops_fit_into_the_frames_and_batches_into_the_clips() -> None:
    for height in (48, 64, 90, 120, 240, 1080):
        for machine in (HOST, CARD):
            numbers = numbers_of(machine, height=height)
            for crop, side in (numbers.frame_crop, numbers.clip_crop):
                assert crop <= side <= max(height, numbers.stored_pixels)
            assert numbers.stored_pixels <= height
    assert numbers_of(height=240).frame_crop == (160, 183)
    for clips in (2, 5, 30, 1000):
        G = int(numbers_of(clips=clips).batch.yaml)
        assert 1 <= G <= clips
    assert numbers_of(clips=1000).batch.yaml == "16"
    assert numbers_of(CARD, clips=1000).batch.yaml == "32"
    small = Machine(
        nodes=1, ranks_per_node=1, gpu=None, memory_bytes=2 * GIB, peak_tflops=None, cores_per_node=1
    )
    micro = numbers_of(small).micro_batch
    assert micro is not None
    assert 16 % int(micro.yaml) == 0


def test_what_the_classes_and_the_light_ask_for() -> None:
    numbers = numbers_of(classes=("turn_left", "turn_right"))
    assert numbers.flip.yaml == "false"
    assert numbers.balanced is not None  # 80 and 20
    assert numbers.dark is None
    dark = numbers_of(brightness=0.1)
    assert dark.dark is not None
    assert dark.flip.yaml == "true"


def touched(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def test_layouts(tmp_path: Path) -> None:
    flat = find_videos(str(touched(tmp_path / "flat", "1.mp4", "2.mkv", "notes.txt")))
    assert not flat.labelled
    assert flat.source["layout"] == "flat"
    split = find_videos(str(touched(tmp_path / "split", "Train/a/1.mp4", "valid/a/2.mp4", "valid/b/3.mp4")))
    assert split.rename == {"Train": "train", "valid": "val"}
    assert split.classes == ("a", "b")
    one = find_videos(str(touched(tmp_path / "one", "train/a/1.mp4", "train/b/2.mp4")))
    assert (one.source["layout"], one.has_splits) == ("class", False)
    assert str(one.source["root"]).endswith("one/train")
    with pytest.raises(ConfigError, match=r"1 videos lie beside the class folders, such as x\.mp4"):
        find_videos(str(touched(tmp_path / "mixed", "a/1.mp4", "x.mp4")))
    with pytest.raises(ConfigError, match="holds no video"):
        find_videos(str(touched(tmp_path / "none", "a/1.txt")))
    with pytest.raises(ConfigError, match="is not a folder"):
        find_videos(str(tmp_path / "gone"))


def test_lists(tmp_path: Path) -> None:
    folder = touched(tmp_path, "a/1.mp4", "a/2.mp4", "b/3.mp4")
    (folder / "prices.csv").write_text("item,price\nrope,3\n")
    (folder / "clips.csv").write_text(
        "File,Class,camera\na/1.mp4,up,yard\nb/3.mp4,down,gate\nb/4.mp4,down,gate\n"
    )
    found = find_videos(str(folder))
    assert found.classes == ("down", "up")
    assert [video.group for video in found.videos] == ["yard", "gate"]
    assert found.missing == ("b/4.mp4",)
    assert found.unlisted == 1
    (folder / "more.csv").write_text("path,label\na/1.mp4,up\n")
    with pytest.raises(ConfigError, match=r"holds the lists clips\.csv, more\.csv; say which: --list"):
        find_videos(str(folder))
    assert len(find_videos(str(folder), listed="more.csv").videos) == 1
    with pytest.raises(ConfigError, match="has no column with the paths"):
        find_videos(str(folder), listed="prices.csv")
