"""What clusters and near-duplicates cost among many clips: processor seconds and the most memory held.

    python benchmarks/near_duplicates.py [--rows 1000000] [--width 256] [--clusters K] [--threshold 0.9]

Vectors are drawn around as many centres as there are clusters, a block at a time, and one in a hundred is another one
with a little noise. Nothing is decoded, and no sketches are compared: what is measured grows with the number of clips.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.similar.dealt import DealtVectors
from cliplift.sharding.similar.kmeans import centroids_of, default_clusters
from cliplift.sharding.similar.pairs import MOST_PER_CLIP, similar

BLOCK = 4096
COPIES = 100  # one vector in so many is a copy of the one before


class DrawnVectors:
    """Vectors that are drawn as they are read: a function of their numbers."""

    def __init__(self, rows: int, width: int, centres: int) -> None:
        self.rows, self.width = rows, width
        self._centres = np.random.default_rng(0).normal(size=(centres, width)).astype(np.float32)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float16]]]:
        for first in range(0, self.rows, BLOCK):
            rng = np.random.default_rng([1, first])
            count = min(BLOCK, self.rows - first)
            values = self._centres[rng.integers(0, len(self._centres), count)]
            values += rng.normal(size=values.shape).astype(np.float32)
            copies = np.arange(1, count, COPIES)
            values[copies] = values[copies - 1] + 0.3 * rng.normal(size=(len(copies), self.width))
            yield first, (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def told(what: str, began: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{what:34} {time.process_time() - began:8.1f} processor seconds, {peak:.2f} GiB at most so far",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="clips")
    parser.add_argument("--width", type=int, default=256, help="of an embedding")
    parser.add_argument("--clusters", type=int, default=0, help="0 is the square root of the clips")
    parser.add_argument("--threshold", type=float, default=0.9, help="of the cosine")
    arguments = parser.parse_args()
    clusters = arguments.clusters or default_clusters(arguments.rows)
    vectors = DrawnVectors(arguments.rows, arguments.width, clusters)
    began = time.process_time()
    for _ in vectors.blocks():
        pass
    told("drawing the vectors once", began)
    began = time.process_time()
    centroids = centroids_of(vectors, clusters=clusters, seed=0)
    told(f"{len(centroids)} centroids", began)
    with scratch_folder() as folder:
        began = time.process_time()
        dealt = DealtVectors(vectors, centroids, Path(folder))
        told("every clip in its cluster", began)
        began = time.process_time()
        found = similar(
            dealt,
            dealt,
            threshold=arguments.threshold,
            most=MOST_PER_CLIP,
            allowed=lambda first, second: first > second,
        )
        told("pairs in and beside the clusters", began)
        dealt.close()
    rows = np.arange(arguments.rows)
    planted = {(int(r), int(r) - 1) for r in rows[(rows % BLOCK % COPIES) == 1]}
    listed = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    print(f"{len(planted & listed)} of {len(planted)} planted copies found; {len(listed)} pairs in all")


if __name__ == "__main__":
    main()
