"""Planted copies that `cliplift dedupe --against` finds, and strangers of one camera that it takes for the same.

    python benchmarks/leaks.py VIDEOS [--clips 400] [--seconds 10]

Half of the videos, every other one by name, are the searched set, and the others the test set: neighbours by name are
often of one camera, and none is the other. Every pair that is found is a false one, and is printed. Then a part of each
test video, made smaller and worse and cut elsewhere, is looked for in a set of such copies: those that are found are
counted, with how far off their place is.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.leaks.check import LOOKS_PER_SECOND
from cliplift.sharding.leaks.pictures import Comparison, compare_films, small_film
from cliplift.sharding.leaks.pictures import Film as SmallFilm
from cliplift.sharding.leaks.search import KeyFrames, LookTable
from cliplift.sharding.video.decode import VideoDecodeError
from cliplift.sharding.video.full_decode import CheckedClip, check_clip
from cliplift.sharding.video.transcode import SpanCutter

SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov")
COPY = TranscodeConfig(short_side_pixels=144, crf=32, preset="veryfast")
COPY_BEGINS, COPY_SECONDS = 0.37, 0.55  # where a copy begins, share of the clip, and how long it is


class Film:
    """A stored clip and its looks."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.data = name, data
        self.seen: CheckedClip = check_clip(data, hash_pictures=True, looks_per_second=LOOKS_PER_SECOND)

    @cached_property
    def small(self) -> SmallFilm:
        return small_film(self.data, float(self.seen.fps))

    @property
    def keys(self) -> KeyFrames:
        seconds = np.array(self.seen.keyframes) / float(self.seen.fps)
        return KeyFrames(seconds, np.array(self.seen.picture_hashes, dtype=np.uint64))

    @property
    def seconds(self) -> float:
        return self.seen.frames / float(self.seen.fps)


def cut(file: Path, config: TranscodeConfig, *, begin: float, end: float) -> Film | None:
    try:
        with SpanCutter(file, config, alive=lambda: None) as cutter:
            return Film(file.name, cutter.cut(start_seconds=begin, end_seconds=end).data)
    except VideoDecodeError as error:
        print(f"{file.name}: left out: {error}")
        return None


def matches(films: Sequence[Film], tests: Sequence[Film]) -> Iterator[tuple[Film, Film, Comparison, bool]]:
    """Of each film the test clips that are compared with it, until one is the same."""
    table = LookTable(
        [test.seen.looks for test in tests], [test.seen.look_step / float(test.seen.fps) for test in tests]
    )
    for film in films:
        for candidate in table.candidates(film.keys):
            test = tests[candidate.clip]
            compared = compare_films(film.small, test.small, candidate.offsets_seconds)
            if compared is None:
                continue
            yield film, test, compared, compared.same
            if compared.same:
                break


def line(film: Film, test: Film, found: Comparison) -> str:
    return (
        f"{film.name} {test.name} offset {found.offset_seconds:.2f} residual {found.residual:.2f} of"
        f" {found.contrast:.1f} change {found.change:.2f} correlation {found.correlation:.3f} gain {found.gain:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, nargs="+", help="videos, or folders of them")
    parser.add_argument("--clips", dest="most", type=int, default=400, help="videos used, evenly spread")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip at most, seconds")
    parser.add_argument("--all", action="store_true", help="print every comparison")
    arguments = parser.parse_args()
    files = sorted(
        file
        for path in arguments.videos
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.suffix.lower() in SUFFIXES
    )
    places = np.unique(np.linspace(0, len(files) - 1, min(arguments.most, len(files))).round().astype(int))
    began = time.process_time()
    made = [(files[k], cut(files[k], TranscodeConfig(), begin=0.0, end=arguments.seconds)) for k in places]
    films = [(file, film) for file, film in made if film is not None]
    searched, tests = films[::2], films[1::2]
    print(f"{len(films)} clips made in {time.process_time() - began:.0f} processor seconds")
    strangers([film for _, film in searched], [film for _, film in tests], every=arguments.all)
    copies(tests, every=arguments.all)


def strangers(searched: Sequence[Film], tests: Sequence[Film], *, every: bool) -> None:
    """Pairs of different videos that are taken for the same."""
    began = time.process_time()
    compared, wrong = 0, Counter[str]()
    for film, test, found, same in matches(searched, tests):
        compared += 1
        if same:
            wrong["still" if found.still else "pictures"] += 1
        if same or every:
            print(f"{'FALSE' if same else '     '} {line(film, test, found)}")
    pairs = len(searched) * len(tests)
    print(
        f"strangers: {wrong.total()} of {len(searched)} clips taken for one of {len(tests)} ({dict(wrong)});"
        f" {pairs} pairs, {compared} compared by pictures, {time.process_time() - began:.1f} processor seconds"
    )


def copies(tests: Sequence[tuple[Path, Film]], *, every: bool) -> None:
    """Copies of a part of every test clip, and which of them are found."""
    made: list[tuple[Film, Film, float]] = []
    for file, test in tests:
        begin = COPY_BEGINS * test.seconds
        copy = cut(file, COPY, begin=begin, end=begin + COPY_SECONDS * test.seconds)
        if copy is not None:
            made.append((copy, test, begin))
    began = time.process_time()
    found: dict[int, tuple[Film, Comparison, bool]] = {}
    for copy, group in itertools.groupby(
        matches([c for c, _, _ in made], [t for _, t in tests]), key=lambda row: row[0]
    ):
        *_, last = group
        found[id(copy)] = last[1:]
    right, off, missed = 0, list[float](), list[str]()
    for copy, test, begin in made:
        other, compared, same = found.get(id(copy), (None, None, False))
        if compared is not None and same and other is test:
            right += 1
            off.append(abs(compared.offset_seconds + begin))
        else:
            told = "nothing alike" if other is None or compared is None else line(copy, other, compared)
            missed.append(f"missed {test.name} ({test.seconds:.1f} s): {told}")
    print("\n".join(missed))
    far = np.quantile(off, [0.5, 0.95]).round(3).tolist() if off else []
    print(
        f"copies: {right} of {len(made)} found; their place is off by {far} s (median, 95 %);"
        f" {time.process_time() - began:.1f} processor seconds"
    )


if __name__ == "__main__":
    main()
