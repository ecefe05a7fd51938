"""Clips dealt evenly over clusters: the same sequence for every number of ranks and workers, and after a stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction

import numpy as np
import pytest
from pydantic import ValidationError

from cliplift.configs.data import DataConfig
from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import TranscodeConfig
from cliplift.pipelines.data.loader import ClipLoader
from cliplift.sharding.build.finalize import add_catalog, describe
from cliplift.sharding.build.writer import ShardWriter
from cliplift.sharding.manifest import DATASET_FILE, SAMPLES_FILE, dump_dataset
from cliplift.sharding.scores.vectors import EmbeddingFacts
from cliplift.sharding.scoring.embed import ClipPlace, EmbeddedClip, embed_dataset
from cliplift.sharding.scoring.likeness import Likeness
from cliplift.sharding.scoring.run import score_dataset
from cliplift.sharding.storage import open_store
from cliplift.sharding.video.transcode import encode_array

CLIPS, PER_SHARD, G = 60, 25, 24
SIZES = (30, 12, 9, 6, 3)  # clips of each of five kinds

Step = list[tuple[int, bytes]]  # sample, and its pixels and draws; sorted


class ByKind:
    """A direction of its own for each kind of clip; nothing is decoded."""

    facts = EmbeddingFacts("by_kind", "0" * 64, "", 8, 1)

    def __init__(self) -> None:
        self.kinds = iter(np.repeat(np.arange(5), SIZES).tolist())

    def embed(self, clips: Iterable[ClipPlace]) -> Iterator[EmbeddedClip]:
        for _ in clips:
            values = np.eye(8, dtype=np.float32)[next(self.kinds)]
            yield EmbeddedClip(values, 1.0, np.zeros((1, 32, 32), dtype=np.float32))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clusters")
    store, indexes = open_store(str(folder)), []
    pictures = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3)).astype(np.uint8)
    clip = encode_array(pictures, fps=Fraction(25), config=TranscodeConfig(preset="ultrafast", min_frames=1))
    for shard, first in enumerate(range(0, CLIPS, PER_SHARD)):
        writer = ShardWriter(store, f"s/{shard}.tar", shard=shard, split="train", plan_id="p")
        for i in range(first, min(CLIPS, first + PER_SHARD)):
            writer.add(
                mp4=clip, facts={"i": i}, picture_hashes=(), key=f"k{i:02d}", video_id=f"v{i}", source=f"{i}.mp4",
                split="train", label=0, labels=(), folds=(), group=None, start_seconds=0.0, end_seconds=0.3,
                num_frames=8, fps=25.0, width=32, height=32, keyframes=(0,), source_sha256=f"{i}",
            )  # fmt: skip
        indexes.append(writer.commit())
    dataset = describe(
        indexes, table=folder / SAMPLES_FILE, name="n", classes=("one",), folds=0, missing=0, plan_id="p", settings={}
    )  # fmt: skip
    store.write(DATASET_FILE, dump_dataset(dataset))
    add_catalog(str(folder))
    with pytest.raises(ConfigError, match="no column 'cluster'; run `cliplift score"):
        loader(config(str(folder)))
    embed_dataset(str(folder), ByKind())
    score_dataset(str(folder), ["cluster"], likeness=Likeness(clusters=5))
    return str(folder)


def config(shards: str, **changes: object) -> DataConfig:
    tree = {
        "shards": shards,
        "sampling": {"frames": 2, "stride": 1},
        "crop_pixels": 24,
        "cluster_balanced": True,
    }
    return DataConfig.model_validate(tree | changes)


def loader(data: DataConfig, *, ranks: int = 1, rank: int = 0, accumulation: int = 1) -> ClipLoader:
    return ClipLoader(
        data, seed=0, global_batch=G, micro_batch=G // ranks // accumulation, rank=rank, world_size=ranks
    )


def steps(data: DataConfig, start: int, stop: int, *, ranks: int = 1, accumulation: int = 1) -> list[Step]:
    """The clips of each optimizer step over all ranks."""
    found: list[Step] = [[] for _ in range(start, stop)]
    for rank in range(ranks):
        one = loader(data, ranks=ranks, rank=rank, accumulation=accumulation)
        for number, batch in enumerate(one.micro_batches(start_step=start, stop_step=stop)):
            made = zip(batch.sample_index.tolist(), batch.clips, batch.draws, strict=True)
            found[number // accumulation] += [
                (i, c.numpy().tobytes() + d.numpy().tobytes()) for i, c, d in made
            ]
        one.close()
    return [sorted(step) for step in found]


def test_every_cluster_comes_equally_often_on_any_ranks_and_after_a_stop(shards: str) -> None:
    data = config(shards)
    clusters = loader(data).dataset.clusters
    assert sorted(np.bincount(clusters).tolist(), reverse=True) == list(SIZES)
    expected = steps(data, 0, 5)
    drawn = Counter(int(clusters[sample]) for step in expected for sample, _ in step)
    assert sum(drawn.values()) == 5 * G
    assert max(drawn.values()) - min(drawn.values()) <= 3, (
        "rounds of five; the tails of three epochs are left out"
    )
    for ranks, accumulation in ((2, 1), (3, 2)):
        assert steps(data, 0, 5, ranks=ranks, accumulation=accumulation) == expected
    assert steps(data, 2, 5, ranks=4) == expected[2:]


@pytest.mark.slow
def test_workers_change_nothing(shards: str) -> None:
    assert steps(config(shards, workers=2), 0, 2, ranks=2) == steps(config(shards), 0, 2)


def test_other_clusters_are_another_order(shards: str) -> None:
    balanced, plain = loader(config(shards)), loader(config(shards, cluster_balanced=False))
    assert balanced.fingerprint != plain.fingerprint
    score_dataset(shards, ["cluster"], likeness=Likeness(clusters=3))
    again, before = loader(config(shards)), loader(config(f"{shards}@3"))
    assert before.fingerprint == balanced.fingerprint
    assert again.fingerprint != balanced.fingerprint


def test_clips_are_dealt_in_one_way(shards: str) -> None:
    with pytest.raises(ValidationError, match="use one of the two"):
        config(shards, class_balanced=True)
    with pytest.raises(ValidationError, match="use one of the two"):
        DataConfig.model_validate({"shards": [{"url": shards, "weight": 1.0}], "cluster_balanced": True})
