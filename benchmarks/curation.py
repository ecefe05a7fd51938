"""What scores cost beside transcoding, and whether motion tells still clips from moving ones.

    python benchmarks/curation.py VIDEOS [--clips 20] [--seconds 10] [--rows 10000000]

Each video is cut and encoded as `cliplift shard` does it; its scores are then made from the stored clip. The still
clips are made of the videos themselves: one frame of each, repeated, encoded in the same way. Processor seconds of
this process, one thread, are what is compared. Last, a filter over a column of random scores.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from cliplift.configs.sharding import TranscodeConfig
from cliplift.configs.where_reader import parse
from cliplift.sharding.scores.chosen import ClipColumn, chosen_rows
from cliplift.sharding.scores.measures import SCORES, score_clip
from cliplift.sharding.video.decode import VideoDecodeError, open_container, video_stream
from cliplift.sharding.video.encode import encode
from cliplift.sharding.video.transcode import SpanCutter

CHEAP = [name for name, score in SCORES.items() if not score.every_picture]
STILL_FRAMES = 90


def still_clip(stored: bytes) -> bytes:
    """A frame out of the middle of a stored clip, repeated and encoded anew."""
    with open_container(stored) as container:
        stream = video_stream(container)
        frames = list(itertools.islice(container.decode(stream), 60))
    planes = frames[len(frames) // 2].to_ndarray()

    def repeated() -> Iterator[av.VideoFrame]:
        for number in range(STILL_FRAMES):
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            yield frame

    return encode(repeated(), fps=Fraction(30), config=TranscodeConfig())


def visible_change(file: Path) -> float:
    """How much of the picture changes, whatever the scores say of it: of pictures of 120 lines out of the first four
    seconds, half a second apart and blurred, the largest share of pixels that differ by more than 12 levels."""
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 25)
        step = max(1, round(rate / 2))
        pictures = [
            frame.reformat(width=max(16, frame.width * 120 // frame.height), height=120, format="gray")
            .to_ndarray()
            .astype(np.float64)
            for number, frame in enumerate(itertools.islice(container.decode(stream), int(4 * rate)))
            if number % step == 0
        ]
    for axis in (0, 1):
        pictures = [
            (np.roll(p, 1, axis=axis) + 2 * p + np.roll(p, -1, axis=axis))[1:-1, 1:-1] / 4 for p in pictures
        ]
    changes = [b - a for a, b in itertools.pairwise(pictures)]
    return max((float((np.abs(c - np.median(c)) > 12).mean()) for c in changes), default=0.0)


def area_under_curve(moving: NDArray[np.float64], still: NDArray[np.float64]) -> float:
    """How often a moving clip scores above a still one; a tie counts as half."""
    return float((moving[:, None] > still).mean() + 0.5 * (moving[:, None] == still).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, nargs="+", help="videos, or folders of them")
    parser.add_argument("--clips", type=int, default=20, help="videos used, evenly spread over the list")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip at most, seconds")
    parser.add_argument("--rows", type=int, default=0, help="rows of the table that is filtered")
    arguments = parser.parse_args()
    files = sorted(
        file
        for path in arguments.videos
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.suffix.lower() in (".mp4", ".avi", ".webm", ".mkv", ".mov")
    )
    places = np.unique(np.linspace(0, len(files) - 1, min(arguments.clips, len(files))).round().astype(int))
    spent: dict[str, float] = defaultdict(float)
    moving, still, visible = list[float](), list[float](), list[float]()
    for file in (files[place] for place in places):
        try:
            began = time.process_time()
            with SpanCutter(file, TranscodeConfig(), alive=lambda: None) as cutter:
                stored = cutter.cut(start_seconds=0.0, end_seconds=arguments.seconds).data
            spent["transcoding"] += time.process_time() - began
        except VideoDecodeError as error:
            print(f"{file.name}: left out: {error}")
            continue
        for name, asked in (
            ("cheap scores", CHEAP),
            ("motion alone", ["motion"]),
            ("all, with shots", list(SCORES)),
        ):
            began = time.process_time()
            found = score_clip(stored, asked)
            spent[name] += time.process_time() - began
        moving.append(found["motion"])
        still.append(score_clip(still_clip(stored), ["motion"])["motion"])
        visible.append(visible_change(file))
    print(f"{len(moving)} clips of at most {arguments.seconds:g} s, processor seconds:")
    for name, seconds in spent.items():
        print(f"  {name:16} {seconds:8.3f}  {seconds / spent['transcoding']:6.1%} of transcoding")
    a, b = np.array(moving), np.array(still)
    print(
        f"motion of moving clips: quartiles {np.quantile(a, [0.25, 0.5, 0.75]).round(5).tolist()}, least {a.min():.6f}"
    )
    print(f"motion of still clips: largest {b.max():.6f}; area under the curve {area_under_curve(a, b):.4f}")
    seen = np.array(visible) >= 0.001
    area = area_under_curve(a[seen], b[seen]) if seen.any() else float("nan")
    print(
        f"of the {seen.sum()} clips in which a thousandth of the picture or more changes visibly: {area:.4f}"
    )
    print(f"below .00098: {np.mean(a < 0.00098):.1%} of the moving, {np.mean(b < 0.00098):.1%} of the still")
    if arguments.rows:
        filter_rows(arguments.rows)


def filter_rows(rows: int) -> None:
    """What it costs to choose among random scores, and what is kept of the answer."""
    values = np.random.default_rng(0).random(rows, dtype=np.float32)
    columns = {"motion": ClipColumn("number", lambda first, stop: values[first:stop])}
    began = time.process_time()
    firsts, lengths = chosen_rows(
        parse("motion > 0.3 and not motion > 0.99"), columns, np.array([0]), np.array([rows])
    )
    seconds = time.process_time() - began
    kept = (firsts.nbytes + lengths.nbytes) / 2**20
    print(
        f"{lengths.sum()} of {rows} rows chosen in {seconds:.2f} processor seconds; {kept:.1f} MiB hold the answer"
    )


if __name__ == "__main__":
    main()
