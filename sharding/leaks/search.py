"""Which test clips may show a part of what a clip shows, by the looks of their pictures.

The clip that is asked for is known by its key frames, whose hashes stand in the shards' indexes, so that a large
dataset is searched without decoding it. Another cut of the same film has other key frames; so of the test clips a dozen
pictures a second are hashed, and each key frame of the first has a picture of the second within a twenty-fourth of a
second. Key frames that match at one offset in time speak for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cliplift.sharding.video.likeness import PAIRS, Ints, Words, band_of, set_bits
from cliplift.sharding.video.picture_hash import ALIKE_BITS, BANDS, FLAT_BITS

LOOSE_BITS = 8  # up to which a key frame between two hashed pictures speaks for an offset
ALMOST_BITS = 2.0  # more than the likeliest offset's, mean, that a likely one may have
LEAST_SHARE = 0.6  # of the key frames that both clips show which must speak for it
MOST_CANDIDATES = 6  # test clips whose pictures are compared with a clip's, the likeliest first

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class KeyFrames:
    """A clip as the search sees it.

    Attributes:
        seconds: (K,) when its key frames are shown.
        looks: (K,) their picture hashes.
    """

    seconds: Floats
    looks: Words


@dataclass(frozen=True)
class Candidate:
    """A test clip that may show the same.

    Attributes:
        clip: its number in the table.
        offsets_seconds: (N,) the likely ones, rising: what is shown at t in the clip is shown at t - offset in the test
            clip. A view that hardly changes has many.
        bits: bits in which the key frames differ at the likeliest, mean.
        key_frames: how many of them both show there.
    """

    clip: int
    offsets_seconds: tuple[float, ...]
    bits: float
    key_frames: int


class LookTable:
    """The looks of some test clips, sorted so that those near a hash are found without comparing all.

    It takes 48 bytes a look and 20 MiB beside.

    Args:
        looks: of every clip, the hashes of evenly spaced pictures, the first one first.
        steps_seconds: of every clip, the time from one of them to the next.
    """

    def __init__(self, looks: Sequence[Sequence[int]], steps_seconds: Sequence[float]) -> None:
        self._starts = np.cumsum([0, *map(len, looks)], dtype=np.int64)
        self._looks = np.fromiter(
            (one for row in looks for one in row), dtype=np.uint64, count=int(self._starts[-1])
        )
        self._steps = np.asarray(steps_seconds, dtype=np.float64)
        told = np.flatnonzero(telling(self._looks))
        self._bands: list[tuple[Words, Ints]] = []
        for band in range(BANDS):
            values = band_of(self._looks[told], band)
            order = np.argsort(values, kind="stable")
            self._bands.append((values[order], told[order]))

    def candidates(self, keys: KeyFrames) -> list[Candidate]:
        """Test clips that may show a part of a clip, the likeliest first."""
        found: list[Candidate] = []
        places, near = self._near(keys.looks)
        clips = self._starts.searchsorted(near, side="right") - 1
        for clip in np.unique(clips).tolist():
            mine = clips == clip
            shown = (near[mine] - self._starts[clip]) * self._steps[clip]
            best = self._at_likely(clip, keys, keys.seconds[places[mine]] - shown)
            if best is not None:
                found.append(best)
        return sorted(found, key=likelihood)[:MOST_CANDIDATES]

    def _near(self, looks: Words) -> tuple[Ints, Ints]:
        """Pairs of a place among some hashes and a look of the table at most ALIKE_BITS away, each once."""
        places, near = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        asked = np.flatnonzero(telling(looks))
        for band, (values, rows) in enumerate(self._bands):
            wanted = band_of(looks[asked], band)
            firsts = values.searchsorted(wanted)
            counts = values.searchsorted(wanted, side="right") - firsts
            for mine in _chunks(counts):
                # All rows of each bucket: its first place, and how far behind it each row stands.
                inside = np.arange(counts[mine].sum()) - np.repeat(
                    np.cumsum(counts[mine]) - counts[mine], counts[mine]
                )
                found = rows[np.repeat(firsts[mine], counts[mine]) + inside]
                place = np.repeat(asked[mine], counts[mine])
                alike = set_bits(self._looks[found] ^ looks[place]) <= ALIKE_BITS
                places.append(place[alike])
                near.append(found[alike])
        pairs = np.unique(np.stack([np.concatenate(places), np.concatenate(near)]), axis=1)
        return pairs[0], pairs[1]

    def _at_likely(self, clip: int, keys: KeyFrames, offsets: Floats) -> Candidate | None:
        """A test clip at the likely ones of the offsets at which a key frame matches; None where there is none."""
        looks, step = self._looks[self._starts[clip] : self._starts[clip + 1]], float(self._steps[clip])
        bits = set_bits(keys.looks[:, None] ^ looks).astype(np.int64)
        padded = np.pad(bits, ((0, 0), (1, 1)), constant_values=64)
        bits = np.minimum(
            bits, np.minimum(padded[:, :-2], padded[:, 2:])
        )  # a key frame may lie between two pictures
        tried = np.unique(np.rint(offsets / step)) * step
        places = np.rint((keys.seconds - tried[:, None]) / step).astype(np.int64)
        both = (places >= 0) & (places < len(looks)) & telling(keys.looks)
        found = np.where(both, bits[np.arange(len(keys.looks)), np.clip(places, 0, len(looks) - 1)], 0)
        shared = both.sum(axis=1)
        speak = (both & (found <= LOOSE_BITS)).sum(axis=1)
        enough = (shared > 0) & (speak >= LEAST_SHARE * shared)
        if not enough.any():
            return None
        mean = np.where(enough, found.sum(axis=1) / np.maximum(shared, 1), np.inf)
        best = int(np.lexsort((np.abs(tried), -shared, mean))[0])
        likely = tried[mean <= mean[best] + ALMOST_BITS]
        return Candidate(clip, tuple(likely.tolist()), round(float(mean[best]), 3), int(shared[best]))


def telling(looks: Words) -> npt.NDArray[np.bool_]:
    """Whether each picture has enough contrast to be told from others."""
    bits = set_bits(looks)
    return (bits >= FLAT_BITS) & (bits <= 64 - FLAT_BITS)


def likelihood(candidate: Candidate) -> tuple[float, int, int]:
    """Sorts the likeliest candidate first."""
    return candidate.bits, -candidate.key_frames, candidate.clip


def _chunks(counts: Ints) -> Iterator[slice]:
    """Runs of buckets of about PAIRS rows together, one bucket at least."""
    ends = np.cumsum(counts)
    cuts = [0]
    while cuts[-1] < len(counts):
        before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(ends.searchsorted(before + PAIRS, side="right"))))
    return (slice(first, stop) for first, stop in pairwise(cuts))
