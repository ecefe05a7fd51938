"""Near-duplicates: clips that look alike although their bytes differ (another size, another encoding).

The look of a clip is one 64-bit difference hash per key frame: the picture shrunk to 9 x 8 gray levels, each bit
saying whether a level is below its right neighbour. Of 26 real clips stored again at 112 pixels and crf 32, 19 differ
by at most 3 bits in every key frame; different clips of one room and camera differ by 4 or more. So what is found is
worth a look, and not everything is found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from av.video.frame import VideoFrame

ALIKE_BITS = 3  # flipped bits of 64 up to which two pictures count as the same
BANDS = 4  # more than ALIKE_BITS, so that two alike pictures agree in at least one band
BAND_BITS = 16
FLAT_BITS = 4  # a picture with fewer set or clear bits is nearly even and says nothing


def picture_hash(frame: VideoFrame) -> int:
    """Difference hash of a PyAV frame, 64 bits."""
    gray = frame.reformat(width=9, height=8, format="gray", interpolation="AREA").to_ndarray()
    bits = (gray[:, :-1] < gray[:, 1:]).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def alike(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two looks show the same clip: as many key frames, each alike."""
    return len(first) == len(second) and all(
        (a ^ b).bit_count() <= ALIKE_BITS for a, b in zip(first, second, strict=True)
    )


def bands(hashes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Keys of which two alike looks share at least one; none for a clip without contrast, which is like many."""
    if hashes and FLAT_BITS <= hashes[0].bit_count() <= 64 - FLAT_BITS:
        for band in range(BANDS):
            yield band, hashes[0] >> band * BAND_BITS & (1 << BAND_BITS) - 1


def near_duplicates(clips: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Pairs of numbers of clips that look alike, each pair once; clips without contrast are left out."""
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, hashes in enumerate(clips):
        met: set[int] = set()
        for band in bands(hashes):
            bucket = buckets[band]
            met.update(bucket)
            bucket.append(number)
        yield from ((other, number) for other in sorted(met) if alike(clips[other], hashes))
