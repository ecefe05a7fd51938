"""What a report says of a student's retrieval: ranks and neighbours by hand, pictures from real mp4 bytes."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import TranscodeConfig
from cliplift.pipelines.report.page import write_report
from cliplift.pipelines.runs.retrieval import (
    RETRIEVAL,
    ShownClip,
    read_retrieval,
    retrieval_of,
    write_retrieval,
)
from cliplift.sharding.video.transcode import encode_array

HOSTILE = "<script>alert(1)</script>"


def clips(count: int) -> list[ShownClip]:
    return [
        ShownClip(key=f"{i:04d}", video_id=f"video {i}", shard_url="shards", sample_index=i)
        for i in range(count)
    ]


def on_a_circle(degrees: list[float]) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


# Six clips around a circle, whose mean is 0. The student sees the last two where the other is.
TEACHER = on_a_circle([0, 60, 120, 180, 240, 300])
STUDENT = on_a_circle([0, 60, 120, 180, 300, 240])
# Clip 0 finds its frames at once; clip 1 finds two others first; the others one.
SCORES = np.array(
    [
        [9, 1, 1, 1, 1, 1],
        [6, 5, 6, 0, 0, 0],
        [7, 0, 6, 0, 0, 0],
        [7, 0, 0, 6, 0, 0],
        [7, 0, 0, 0, 6, 0],
        [7, 0, 0, 0, 0, 6],
    ],
    dtype=np.float64,
)


def test_ranks_and_neighbours_by_hand() -> None:
    found = retrieval_of(scores=SCORES, student=STUDENT, teacher=TEACHER, videos=np.arange(6), clips=clips(6))
    assert found.held_out_clips == 6
    assert found.median_rank == 2
    assert [(found.clips[q.clip].key, q.rank) for q in found.retrieved] == [
        ("0000", 1),
        ("0002", 2),
        ("0003", 2),
    ]
    assert [q.rank for q in found.missed] == [3, 2, 2]
    assert found.clips[found.missed[0].clip].key == "0001"
    assert found.neighbours == 4
    assert found.overlap_by_chance == pytest.approx(4 / 5)
    first = found.retrieved[0]
    # Of clip 0 the teacher's nearest two are 60 degrees away, the next two 120; the last is opposite.
    assert {found.clips[n].key for n in first.by_teacher[:2]} == {"0001", "0005"}
    assert {found.clips[n].key for n in first.by_student[:2]} == {"0001", "0004"}
    # Opposite of 0..5 by the teacher: 3 4 5 0 1 2; by the student: 3 5 4 0 2 1. Four of six disagree, by one of four.
    assert found.overlap == pytest.approx((2 * 1 + 4 * 3 / 4) / 6)


def test_clips_of_one_video_are_no_neighbours() -> None:
    videos = np.array([0, 0, 0, 1, 1, 1])
    found = retrieval_of(scores=SCORES, student=STUDENT, teacher=TEACHER, videos=videos, clips=clips(6))
    assert found.neighbours == 3
    assert found.overlap == found.overlap_by_chance == 1
    for query in (*found.retrieved, *found.missed):
        own = int(found.clips[query.clip].key)
        assert {videos[int(found.clips[n].key)] for n in query.by_teacher} == {1 - videos[own]}


class _Shards:
    """Six real clips, of which the last is damaged."""

    def __init__(self) -> None:
        noise = np.random.default_rng(0).integers(256, size=(6, 9, 64, 64, 3), dtype=np.uint8)
        whole = [encode_array(frames, fps=Fraction(12), config=TranscodeConfig()) for frames in noise]
        self.data = [*whole[:5], b"no video"]

    def __len__(self) -> int:
        return 6

    def facts(self, i: int) -> ShownClip:
        return clips(6)[i]

    def read(self, i: int) -> bytes:
        return self.data[i]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    tree = {"stage": "transfer", "name": "transfer", "data": {"val_split": "val"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "run.json").write_text(json.dumps({"stage": "transfer", "name": "transfer"}))
    shown = [
        clip.model_copy(update={"video_id": HOSTILE}) if i == 5 else clip for i, clip in enumerate(clips(6))
    ]
    found = retrieval_of(scores=SCORES, student=STUDENT, teacher=TEACHER, videos=np.arange(6), clips=shown)
    write_retrieval(found, folder)
    assert read_retrieval(folder) == found
    return folder


def test_the_page_shows_frames_ranks_and_what_cannot_be_read(run: Path, tmp_path: Path) -> None:
    wanted: list[str | None] = []

    def opened(url: str, *, split: str | None, fold: int | None) -> _Shards:
        wanted.append(split)
        return _Shards()

    page = write_report(
        runs=[run], output=tmp_path / "r.html", title=None, max_clips=4, open_shards=opened
    ).read_text()
    assert wanted == ["val"]
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(set(pictures)) == 5 * 3
    assert "the median rank is 2" in page
    assert "83.3 % are among the student" in page
    assert "Clip 0005 could not be read" in page
    assert HOSTILE not in page


def test_no_picture_is_read_when_no_clip_is_wanted(run: Path, tmp_path: Path) -> None:
    def opened(url: str, *, split: str | None, fold: int | None) -> _Shards:
        raise AssertionError(url)

    page = write_report(
        runs=[run], output=tmp_path / "r.html", title=None, max_clips=0, open_shards=opened
    ).read_text()
    assert "video 3" in page


@pytest.mark.parametrize("text", ["{", "[]", '{"clips": []}'])
def test_a_damaged_file_is_named(run: Path, text: str) -> None:
    (run / RETRIEVAL).write_text(text)
    with pytest.raises(ConfigError, match=f"{RETRIEVAL} is damaged"):
        read_retrieval(run)


def test_a_query_that_names_no_clip_is_damage(run: Path) -> None:
    tree = json.loads((run / RETRIEVAL).read_text())
    tree["missed"][0]["by_student"][0] = 6
    (run / RETRIEVAL).write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="names clip 6 of 6"):
        read_retrieval(run)
