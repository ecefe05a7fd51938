"""A dataset of nine clips in three shards, four of which are still pictures; built without encoding anything twice."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.build.finalize import add_catalog, describe
from cliplift.sharding.build.writer import ShardWriter
from cliplift.sharding.manifest import DATASET_FILE, DUPLICATES_FILE, SAMPLES_FILE, dump_dataset
from cliplift.sharding.scoring.run import score_dataset
from cliplift.sharding.storage import open_store
from cliplift.sharding.video.encode import encode

CLIPS, PER_SHARD, SIDE = 9, 4, 64
STILL = (1, 4, 5, 8)
DAMAGED = 6  # its bytes are as they were written, and no video
CLASSES = ("walk", "jump")


def clip(number: int) -> bytes:
    """Twenty frames of a random picture that moves by two pixels a frame, or not at all."""
    if number == DAMAGED:
        return b"no video, though its checksum is right"
    draw = np.random.default_rng(number)
    texture = np.kron(draw.integers(40, 200, size=(8, 16)), np.ones((8, 8))).astype(np.uint8)
    frames = []
    for t in range(20):
        planes = np.full((SIDE * 3 // 2, SIDE), 128, dtype=np.uint8)
        planes[:SIDE] = np.roll(texture, -2 * t if number not in STILL else 0, axis=1)[:, :SIDE]
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        frame.pts, frame.time_base = t, Fraction(1, 25)
        frames.append(frame)
    return encode(frames, fps=Fraction(25), config=TranscodeConfig(preset="ultrafast"))


def row(number: int) -> dict[str, Any]:
    return {
        "key": f"k{number}", "video_id": f"v{number}", "source": f"{number}.mp4",
        "split": "val" if number == 3 else "train", "label": number % 2, "labels": (), "folds": (), "group": None,
        "start_seconds": 0.0, "end_seconds": 0.8, "num_frames": 20, "fps": 25.0, "width": SIDE, "height": SIDE,
        "keyframes": (0, 16), "source_sha256": f"{number}",
    }  # fmt: skip


@pytest.fixture(scope="module")
def unscored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset without scores; read it, never change it."""
    folder = tmp_path_factory.mktemp("unscored") / "set"
    folder.mkdir()
    store, indexes = open_store(str(folder)), []
    for shard, first in enumerate(range(0, CLIPS, PER_SHARD)):
        writer = ShardWriter(store, f"s/{shard}.tar", shard=shard, split="s", plan_id="p")
        for i in range(first, min(CLIPS, first + PER_SHARD)):
            writer.add(mp4=clip(i), facts={"i": i}, picture_hashes=(), **row(i))
        indexes.append(writer.commit())
    dataset = describe(
        indexes, table=folder / SAMPLES_FILE, name="n", classes=CLASSES, folds=0, missing=0, plan_id="p", settings={}
    )  # fmt: skip
    store.write(DATASET_FILE, dump_dataset(dataset))
    store.write(DUPLICATES_FILE, json.dumps({"key": "k7", "of": "k0"}).encode() + b"\n")
    add_catalog(str(folder))
    return folder


@pytest.fixture(scope="module")
def scored(unscored: Path) -> Path:
    """The same with the columns motion, brightness and duplicate, computed by one worker."""
    import shutil

    folder = Path(shutil.copytree(unscored, unscored.parent / "scored"))
    score_dataset(str(folder), ["motion", "brightness", "duplicate"], workers=1)
    return folder
