"""Where both datasets have embeddings of one network, clips are found that no hash finds: mirrored ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cliplift.sharding.leaks.check import find_leaks
from cliplift.sharding.scores.vectors import EmbeddingFacts
from cliplift.sharding.scoring.embed import ClipPlace, EmbeddedClip, embed_dataset, read_clip
from cliplift.sharding.similar.sketches import picture, sketch_frames
from cliplift.sharding.video.decode import decode_frames

WIDTH = 24
pytestmark = pytest.mark.slow


class Levels:
    """Counts of gray levels over the clip: the same for a mirrored one."""

    facts = EmbeddingFacts("levels", "0" * 64, "evenly spaced frames", WIDTH, 1)

    def embed(self, clips: Iterable[ClipPlace]) -> Iterator[EmbeddedClip]:
        for place in clips:
            numbers, spacing = sketch_frames(place.num_frames, place.fps)
            frames = decode_frames(read_clip(place), numbers.tolist(), decoder="pyav")
            counts = np.histogram(frames, bins=WIDTH, range=(0, 256))[0].astype(np.float32)
            yield EmbeddedClip(
                counts - counts.mean(), spacing, np.stack([picture(frame) for frame in frames])
            )


def test_a_mirrored_clip_is_found_by_embedding_alone(
    mirrored_sets: tuple[dict[str, tuple[str, bytes]], dict[str, tuple[str, bytes]]],
    make_set: Callable[..., Path],
    tmp_path: Path,
) -> None:
    searched, tested = (
        make_set(tmp_path / name, name, clips)
        for name, clips in zip(("one", "two"), mirrored_sets, strict=True)
    )
    assert find_leaks(str(searched), str(tested), workers=1).leaks == ()
    for folder in (searched, tested):
        assert embed_dataset(str(folder), Levels()).new
    report = find_leaks(str(searched), str(tested), workers=1)
    assert [(leak.clip.sample.video_id, leak.of.sample.video_id, leak.kind) for leak in report.leaks] == [
        ("mirrored", "t1", "embedding")
    ], "its copy in train is not looked for"
    assert report.check.method.startswith("looks-1, levels-")
    (row,) = [leak.row() for leak in report.leaks]
    assert row["likeness"] is not None
