"""Embeddings as files of shards that generations name: what is stored, interruption, other generations, damage."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from cliplift.configs.sections import ConfigError
from cliplift.sharding.build.finalize import remove_videos
from cliplift.sharding.build.verify import verify
from cliplift.sharding.manifest import DATASET_FILE, ManifestError
from cliplift.sharding.read.embeddings import stored_embeddings
from cliplift.sharding.read.generations import open_dataset
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.scores.carried import stored_scores
from cliplift.sharding.scores.vectors import EmbeddingFacts, part_file
from cliplift.sharding.scoring.embed import ClipPlace, EmbeddedClip, embed_dataset, read_clip
from cliplift.sharding.scoring.likeness import Likeness
from cliplift.sharding.scoring.run import ScoreError, score_dataset
from cliplift.sharding.storage import TEMPORARY_SUFFIX
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames

StopAfter = Callable[[int], AbstractContextManager[None]]
DAMAGED, CLIPS, WIDTH = 6, 9, 12
FACTS = EmbeddingFacts("rows_12", "0" * 64, "the first frame", WIDTH, 1)


class FirstRows:
    """Means of the first rows of the first frame: a function of the clip that any machine finds alike."""

    facts = FACTS

    def __init__(self) -> None:
        self.seen: list[int] = []

    def embed(self, clips: Iterable[ClipPlace]) -> Iterator[EmbeddedClip]:
        for place in clips:
            self.seen.append(place.offset)
            try:
                frames = decode_frames(read_clip(place), [0, 19], decoder="pyav")
            except VideoDecodeError as error:
                yield EmbeddedClip(None, reason=str(error))
                continue
            values = frames[0, :, : 4 * WIDTH, 0].reshape(64, WIDTH, 4).mean(axis=(0, 2)).astype(np.float32)
            yield EmbeddedClip(values, 0.5, frames[:, ::2, ::2, 1].astype(np.float32))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "set"))


def vectors(folder: Path | str) -> np.ndarray:
    with stored_embeddings(*open_dataset(str(folder))) as found:
        blocks = list(found.blocks())
        assert [first for first, _ in blocks] == np.cumsum([0, *(len(b) for _, b in blocks)])[:-1].tolist()
        return np.concatenate([block for _, block in blocks])


@pytest.fixture(scope="module")
def embedded(unscored: Path) -> Path:
    folder = Path(shutil.copytree(unscored, unscored.parent / "embedded"))
    report = embed_dataset(str(folder), FirstRows())
    assert (report.new, report.embedded, report.dataset.generation) == (True, CLIPS, 2)
    assert report.column is not None
    assert report.column.failed == 1
    assert report.reasons[0].startswith("s/1.tar, byte ")
    return folder


def test_each_clip_has_its_own_vector_and_sketch(unscored: Path, embedded: Path) -> None:
    dataset, found = ShardDataset(str(unscored)), vectors(embedded)
    with stored_embeddings(*open_dataset(str(embedded)), name="rows_12") as opened:
        assert (opened.facts, opened.rows, opened.width) == (FACTS, CLIPS, WIDTH)
        for i in range(CLIPS):
            if i == DAMAGED:
                assert np.isnan(found[i]).all()
                assert len(opened.sketch(i)[1]) == 0
                continue
            frames = decode_frames(dataset.read(i), [0, 19], decoder="pyav")
            means = np.array([frames[0, :, 4 * k : 4 * k + 4, 0].mean() for k in range(WIDTH)])
            np.testing.assert_allclose(found[i], means / np.linalg.norm(means), atol=1e-3)
            spacing, sketch = opened.sketch(i)
            assert spacing == 0.5
            np.testing.assert_allclose(sketch, frames[:, ::2, ::2, 1], atol=0.51)
            np.testing.assert_allclose(sketch.mean(axis=0), frames[:, ::2, ::2, 1].mean(axis=0), atol=0.51)


def test_tars_and_fingerprint_stay_and_other_generations_copy_no_vectors(
    unscored: Path, embedded: Path, tmp_path: Path
) -> None:
    before, after = contents(unscored), contents(embedded)
    assert {n: after[n] for n in before if n != DATASET_FILE} == {
        n: before[n] for n in before if n != DATASET_FILE
    }
    assert ShardDataset(str(embedded)).fingerprint == ShardDataset(str(unscored)).fingerprint
    assert b'"cliplift-shards/5"' in after[DATASET_FILE], "an earlier version is told that it cannot read it"
    files = {name for name in after if name.startswith("vectors/")}
    assert files == {part_file(shard, FACTS) for shard in range(3)}
    folder = copy(embedded, tmp_path)
    score_dataset(str(folder), ["duplicate"])
    remove_videos(str(folder), ["v0", "v7"])
    assert open_dataset(str(folder))[1].generation == 4
    assert {name for name in contents(folder) if name.startswith("vectors/")} == files
    left = [i for i in range(CLIPS) if i not in (0, 7)]
    np.testing.assert_array_equal(vectors(folder), vectors(embedded)[left])
    np.testing.assert_array_equal(vectors(f"{folder}@3"), vectors(embedded))
    assert [p for p in verify(str(folder), decode="none").problems if p.error] == []


def test_interrupted_or_in_parts_it_goes_on_to_the_same_bytes(
    unscored: Path, embedded: Path, tmp_path: Path, stop_after: StopAfter
) -> None:
    folder = copy(unscored, tmp_path / "stopped")
    for files in (1, 2):
        embedder = FirstRows()
        with stop_after(files), pytest.raises(KeyboardInterrupt):
            embed_dataset(str(folder), embedder)
        assert open_dataset(str(folder))[1].generation == 1, "the dataset is the generation before"
    embedder = FirstRows()
    embed_dataset(str(folder), embedder)
    assert len(embedder.seen) < CLIPS, "what is done is not done again"
    assert contents(folder) == contents(embedded)
    again = FirstRows()
    assert not embed_dataset(str(folder), again).new
    assert again.seen == []
    folder = copy(unscored, tmp_path / "parts")
    for part, clips in ((1, 4), (0, 5)):
        report = embed_dataset(str(folder), FirstRows(), part=(part, 2))
        assert (report.new, report.embedded) == (False, clips)
    assert embed_dataset(str(folder), FirstRows()).embedded == 0
    assert contents(folder) == contents(embedded)


def test_a_clip_whose_bytes_are_damaged_stops_it(unscored: Path, tmp_path: Path) -> None:
    folder = copy(unscored, tmp_path)
    data = bytearray((folder / "s/1.tar").read_bytes())
    data[600] ^= 1
    (folder / "s/1.tar").write_bytes(data)
    with pytest.raises(ScoreError, match=r"s/1\.tar, byte \d+: crc32 differs.*call it again"):
        embed_dataset(str(folder), FirstRows())
    assert open_dataset(str(folder))[1].generation == 1


@pytest.mark.parametrize(
    "place", ["head", "places", "values", "sketch", "checksums", "short", "long", "gone"]
)
def test_a_damaged_file_of_vectors_is_one_sentence(embedded: Path, tmp_path: Path, place: str) -> None:
    folder = copy(embedded, tmp_path)
    path = folder / part_file(1, FACTS)
    whole = bytearray(path.read_bytes())
    at = {
        "head": 5,
        "places": 1024,
        "values": 1024 + 32 + 7,
        "sketch": 1024 + 32 + 10 + 24 + 2048 + 9,
        "checksums": -1,
    }
    if place in at:
        whole[at[place]] ^= 1
    path.write_bytes({"short": whole[:-1], "long": whole + b"\0"}.get(place, whole))
    if place == "gone":
        path.unlink()
    with pytest.raises(ManifestError, match=r"vectors/000001/rows_12-\w+\.bin") as caught:
        vectors(folder)
    assert "\n" not in str(caught.value)
    assert any(p.error and p.file == "vectors.json" for p in verify(str(folder), decode="none").problems)
    assert len(ShardDataset(str(folder))) == CLIPS, "what needs no embeddings reads none"
    if place in ("places", "checksums", "short", "gone"):
        path.unlink(missing_ok=True)
        embed_dataset(str(folder), FirstRows())
        assert path.read_bytes() == (embedded / part_file(1, FACTS)).read_bytes()


def rewritten(folder: Path, change: Callable[[np.ndarray], None]) -> None:
    """A file of vectors that says something else, with all checksums right."""
    import dataclasses
    import json

    from cliplift.sharding.manifest import VECTORS_FILE, digest, dump_dataset
    from cliplift.sharding.scores.vectors import HEAD_BYTES, VectorPart, record_type, write_vectors

    store, dataset = open_dataset(str(folder))
    path, shard = folder / part_file(0, FACTS), dataset.shards[0]
    head = digest(path.read_bytes()[:HEAD_BYTES])
    part = VectorPart(path, shard, FACTS, head_sha256=head, file="f")
    records = part.records(np.arange(part.rows)).astype(record_type(WIDTH))
    change(records)
    write_vectors(path, shard, FACTS, part.offsets, [records])
    named = folder / dataset.file(VECTORS_FILE)
    tree = json.loads(named.read_text())
    tree["columns"][0]["shards"][0][1] = digest(path.read_bytes()[:HEAD_BYTES])
    named.write_text(json.dumps(tree))
    dataset = dataclasses.replace(dataset, vectors_sha256=digest(named.read_bytes()))
    store.write(DATASET_FILE, dump_dataset(dataset))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("values", np.inf),
        ("values", 2.0),
        ("frames", 25),
        ("frames", 0),
        ("spacing", np.nan),
        ("step", np.inf),
        ("spacing", -1),
    ],
)
def test_records_that_cannot_be_are_refused_though_their_checksums_are_right(
    embedded: Path, tmp_path: Path, name: str, value: float
) -> None:
    def change(records: np.ndarray) -> None:
        records[name][2] = value

    folder = copy(embedded, tmp_path)
    rewritten(folder, lambda _: None)
    np.testing.assert_array_equal(vectors(folder), vectors(embedded))
    rewritten(folder, change)
    with pytest.raises(ManifestError, match="clip 2 has an embedding that cannot be"):
        vectors(folder)


@pytest.mark.parametrize("damage", ["gone", "other", "bytes"])
def test_a_damaged_list_of_embeddings_is_one_sentence(embedded: Path, tmp_path: Path, damage: str) -> None:
    folder = copy(embedded, tmp_path)
    path = folder / "generations/000002/vectors.json"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"rows_12", b"rows/12") if damage == "other" else data + b" ")
    if damage == "gone":
        path.unlink()
    with pytest.raises(ManifestError, match=r"vectors\.json: .*copy it"):
        vectors(folder)


def test_what_is_not_there_is_said(unscored: Path, embedded: Path, tmp_path: Path) -> None:
    for folder, options, says in (
        (unscored, {}, "has no embeddings.*cliplift score .* embedding"),
        (embedded, {"name": "resnet50"}, "no embedding 'resnet50'.*it has rows_12-"),
        (embedded, {"facts_digest": "0"}, "by the same model and weights"),
    ):
        with pytest.raises(ConfigError, match=says), stored_embeddings(*open_dataset(str(folder)), **options):
            pass


class Twins:
    """Two clips side by side are the same, of other videos; nothing is decoded."""

    facts = EmbeddingFacts("twins", "0" * 64, "", WIDTH, 1)

    def embed(self, clips: Iterable[ClipPlace]) -> Iterator[EmbeddedClip]:
        for number, _ in enumerate(clips):
            rng = np.random.default_rng(number // 2)
            pictures = rng.integers(0, 255, (6, 32, 32)).astype(np.float32)
            yield EmbeddedClip(1 + 0.2 * rng.normal(size=WIDTH).astype(np.float32), 0.5, pictures)


def test_clusters_and_near_duplicates_are_columns_whatever_interrupts_them(
    unscored: Path, tmp_path: Path, stop_after: StopAfter
) -> None:
    folder = copy(unscored, tmp_path / "whole")
    with pytest.raises(ConfigError, match="has no embeddings"):
        score_dataset(str(folder), ["near_duplicate"])
    embed_dataset(str(folder), Twins())
    other = copy(folder, tmp_path / "other")
    names, likeness = ["cluster", "near_duplicate"], Likeness(clusters=3)
    assert score_dataset(str(folder), names, likeness=likeness).new
    with stored_scores(*open_dataset(str(folder))) as found:
        clusters, repeats = (found.column(name).tolist() for name in names)
        assert found.facts["cluster"].of == f"{Twins.facts.name}, 3 clusters, seed 0"
    # Number 3 is of `val`, whose clips stay; of the others the first does.
    assert repeats == [0, 1, 1, 0, 0, 1, 0, 1, 0]
    assert clusters[:8:2] == clusters[1:8:2]
    kept = ShardDataset(str(folder), where="not near_duplicate and cluster >= 0")
    assert [kept.row(i) for i in range(len(kept))] == [0, 3, 4, 6, 8]
    for files in (0, 1, 4):
        with stop_after(files), pytest.raises(KeyboardInterrupt):
            score_dataset(str(other), names, likeness=likeness)
        assert open_dataset(str(other))[1].generation == 2, "the dataset is the generation before"
    score_dataset(str(other), names, likeness=likeness)
    assert contents(other) == contents(folder)
    assert not score_dataset(str(folder), names, likeness=likeness).new
    assert score_dataset(str(folder), ["cluster"], likeness=Likeness(clusters=2)).new, "other clusters"


KILLED = """
import importlib, os, signal, sys

folder, module, name = sys.argv[1:]
place = importlib.import_module(module)
real = getattr(place, name)

def killed(*arguments, **options):
    real(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(place, name, killed)
from cliplift.sharding.scoring.likeness import Likeness
from cliplift.sharding.scoring.run import score_dataset

score_dataset(folder, ["cluster", "near_duplicate"], likeness=Likeness(clusters=3))
"""


@pytest.mark.slow
def test_killed_with_signal_9_clustering_goes_on_to_the_same_bytes(unscored: Path, tmp_path: Path) -> None:
    folder = copy(unscored, tmp_path / "whole")
    embed_dataset(str(folder), Twins())
    other = copy(folder, tmp_path / "other")
    names, likeness = ["cluster", "near_duplicate"], Likeness(clusters=3)
    score_dataset(str(folder), names, likeness=likeness)
    for module, function in (
        ("cliplift.sharding.scoring.likeness", "centroids_of"),  # the clusters are known
        ("cliplift.sharding.scoring.likeness", "group_clips"),  # the near-duplicates are
        (
            "cliplift.sharding.scores.carried",
            "dump_scores_head",
        ),  # their values are stored, and nothing names them
    ):
        command = [sys.executable, "-c", KILLED, str(other), module, function]
        process = subprocess.run(command, check=False, capture_output=True)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert open_dataset(str(other))[1].generation == 2, "the dataset is the generation before"
    score_dataset(str(other), names, likeness=likeness)
    found = {name: data for name, data in contents(other).items() if not name.endswith(TEMPORARY_SUFFIX)}
    assert found == contents(folder)


def test_numbers_of_clusters_that_cannot_be(unscored: Path) -> None:
    for clusters in (0, -1, 10**6):
        with pytest.raises(ConfigError, match="asks for what cannot be"):
            score_dataset(str(unscored), ["cluster"], likeness=Likeness(clusters=clusters))
