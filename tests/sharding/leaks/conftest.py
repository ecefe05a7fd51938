"""Two small datasets, one of which holds a clip of the other, smaller, worse and cut elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.build.finalize import add_catalog, describe
from cliplift.sharding.build.writer import ShardWriter
from cliplift.sharding.leaks.check import LeakReport, find_leaks
from cliplift.sharding.manifest import DATASET_FILE, SAMPLES_FILE, dump_dataset
from cliplift.sharding.storage import open_store
from cliplift.sharding.video.full_decode import check_clip
from cliplift.sharding.video.transcode import encode_array

RATE, SIDE = 16, 96
Film = NDArray[np.uint8]
Clips = Mapping[str, tuple[str, bytes]]  # by video: its split and its mp4


def film(seed: int, *, frames: int = 80) -> Film:
    """Smooth blobs that drift, unlike those of any other seed, (frames, SIDE, SIDE, 3)."""
    rng = np.random.default_rng(seed)
    waves, phase = rng.normal(size=(6, 2)) * 7, rng.uniform(0, 6, 6)
    speed = rng.uniform(0.5, 1.5, 6)
    axis = np.linspace(0, 1, SIDE)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    out = [
        sum(np.sin(a * x + b * y + p + s * t / 12) for (a, b), p, s in zip(waves, phase, speed, strict=True))
        for t in range(frames)
    ]
    return np.repeat(np.clip(128 + 40 * np.stack(out), 0, 255)[..., None], 3, axis=-1).astype(np.uint8)


def watched(seed: int, *, frames: int = 80) -> Film:
    """A room that is always the same, through which something walks that is another one for each seed."""
    out = film(1000, frames=1).repeat(frames, axis=0)
    rng = np.random.default_rng(seed)
    size, speed, row = int(rng.integers(12, 24)), float(rng.uniform(0.6, 1.4)), int(rng.integers(10, 60))
    for t in range(frames):
        left = int((rng.integers(0, 1) + seed * 17 + speed * t) % (SIDE - size))
        out[t, row : row + size, left : left + size] = 30 + 40 * (seed % 5)
    return out


def encoded(frames: Film, *, crf: int = 20) -> bytes:
    return encode_array(frames, fps=Fraction(RATE), config=TranscodeConfig(crf=crf, preset="veryfast"))


def smaller(frames: Film) -> Film:
    halves = frames.reshape(len(frames), SIDE // 2, 2, SIDE // 2, 2, 3).astype(np.float64)
    shrunk: Film = halves.mean(axis=(2, 4)).astype(np.uint8)
    return shrunk


def write_set(
    folder: Path, name: str, clips: Clips, *, per_shard: int = 3, shared_sources: bool = False
) -> Path:
    """A finalized dataset of these clips, with the looks of their key frames in the indexes."""
    folder.mkdir(parents=True)
    store, indexes = open_store(str(folder)), []
    items = list(clips.items())
    for shard, first in enumerate(range(0, len(items), per_shard)):
        writer = ShardWriter(store, f"s/{shard}.tar", shard=shard, split="s", plan_id=name)
        for video, (split, mp4) in items[first : first + per_shard]:
            seen = check_clip(mp4, hash_pictures=True)
            writer.add(
                mp4=mp4, facts={}, picture_hashes=seen.picture_hashes, key=f"{name}-{video}", video_id=video,
                source=f"{video}.mp4", split=split, label=0, labels=(), folds=(), group=None, start_seconds=0.0,
                end_seconds=seen.frames / float(seen.fps), num_frames=seen.frames, fps=float(seen.fps),
                width=seen.width, height=seen.height, keyframes=seen.keyframes,
                source_sha256=video if shared_sources else f"{name} {video}",
            )  # fmt: skip
        indexes.append(writer.commit())
    dataset = describe(
        indexes, table=folder / SAMPLES_FILE, name=name, classes=("c",), folds=0, missing=0, plan_id=name, settings={}
    )  # fmt: skip
    store.write(DATASET_FILE, dump_dataset(dataset))
    add_catalog(str(folder))
    return folder


@pytest.fixture(scope="session")
def make_set() -> Callable[..., Path]:
    return write_set


@pytest.fixture(scope="session")
def dark_clip() -> bytes:
    """Two seconds of black."""
    return encoded(np.zeros((32, SIDE, SIDE, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def tests_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three test clips and a training clip; of the same films other sets hold parts. Read it, never change it."""
    clips = {
        "t1": ("test", encoded(film(1))),
        "t2": ("test", encoded(film(2))),
        "room7": ("test", encoded(watched(7))),
        "own": ("train", encoded(film(3))),
    }
    return write_set(tmp_path_factory.mktemp("tests") / "tested", "tested", clips)


@pytest.fixture(scope="session")
def leaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips: a part of t1, small and worse; rooms like room7, and room7 itself from its middle on; others."""
    clips = {
        "a": ("train", encoded(film(11))),
        "planted": ("train", encoded(smaller(film(1)[21:69]), crf=30)),
        "b": ("train", encoded(film(12))),
        "room3": ("train", encoded(watched(3))),
        "room5": ("train", encoded(watched(5))),
        "walked": ("train", encoded(watched(7)[37:], crf=28)),
        "own": ("train", encoded(film(3), crf=28)),
    }
    return write_set(tmp_path_factory.mktemp("leaking") / "pretraining", "pretraining", clips)


@pytest.fixture(scope="session")
def report(leaking: Path, tests_set: Path) -> LeakReport:
    """What a search of one for the other finds."""
    return find_leaks(str(leaking), str(tests_set), workers=1)


@pytest.fixture(scope="session")
def mirrored_sets() -> tuple[dict[str, tuple[str, bytes]], dict[str, tuple[str, bytes]]]:
    """A set that holds the mirror image of a test clip, and the tests; one clip of these is of train."""
    searched = {
        "a": ("train", encoded(film(21))),
        "mirrored": ("train", encoded(film(1)[:, :, ::-1])),
        "other": ("train", encoded(film(3)[:, :, ::-1])),
    }
    tested = {
        "t1": ("test", encoded(film(1))),
        "t2": ("test", encoded(film(2))),
        "own": ("train", encoded(film(3))),
    }
    return searched, tested
