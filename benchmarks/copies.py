"""Whether copies of clips are found among clips of the same cameras and films, and nothing else is taken for one.

    python benchmarks/copies.py DATA [--half 0] [--copies 113] [--seconds 4]

DATA has the folders ``unlabeled``, ``unlabeled_more``, ``clips``, ``arid6`` and ``tankwagon`` with its ``clips.csv``.
Cameras and films are divided into two halves by a digest of their names: thresholds were fitted to half 0, after lists
of the nearest pairs of both had been looked at. Of some clips a copy is made with ffmpeg, in one of five ways by turn;
all clips and copies are embedded by efficientnet_lite0 and compared as `cliplift score DATASET near_duplicate` does it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import subprocess
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray

from cliplift.pipelines.embeddings.embed import NetworkEmbedder
from cliplift.pipelines.embeddings.networks import frozen_network
from cliplift.sharding.scoring.embed import ClipPlace, EmbeddedClip
from cliplift.sharding.similar.exact import ArrayVectors
from cliplift.sharding.similar.groups import group_clips
from cliplift.sharding.similar.kmeans import centroids_of

SIZE = "scale=-2:'min(ih,240)'"
KINDS = {
    "encoded": ("scale=-2:112", 28),
    "cropped": (f"crop=floor(iw*0.95/2)*2:floor(ih*0.95/2)*2:iw*0.02:ih*0.03,{SIZE}", 23),
    "recoloured": (f"{SIZE},eq=brightness=0.05:contrast=1.15:saturation=1.4:gamma=1.1,hue=h=15", 23),
    "mirrored": (f"{SIZE},hflip", 23),
    "retimed": (f"{SIZE},setpts=PTS/1.25", 23),
}
PLAIN = (SIZE, 20)
SUFFIXES = (".mp4", ".avi", ".webm", ".mpg")


def order(name: str) -> str:
    """Clips in this order are in one that says nothing of them."""
    return hashlib.sha256(name.encode()).hexdigest()


def clips_of_half(data: Path, half: int) -> list[str]:
    """Names of the clips of one half of the cameras and films, relative to DATA, in order."""
    with (data / "tankwagon" / "clips.csv").open(encoding="utf-8") as table:
        cameras = {f"tankwagon/{row['path']}": row["group"] for row in csv.DictReader(table)}
    names = [
        file.relative_to(data).as_posix()
        for folder in ("unlabeled", "unlabeled_more", "clips", "tankwagon", "arid6")
        for file in (data / folder).rglob("*")
        if file.suffix in SUFFIXES
    ]

    def scene(name: str) -> str:
        return f"arid{Path(name).stem.split('_')[1]}" if name.startswith("arid6/") else name

    return [
        name
        for name in sorted(names, key=order)
        if int(order(cameras.get(name, scene(name))), 16) % 2 == half
    ]


def encode(source: Path, target: Path, filters: str, crf: int, *, seconds: float) -> None:
    """The beginning of a video through ffmpeg's filters. Raises CalledProcessError."""
    words = [
        "ffmpeg",
        "-v",
        "error",
        "-nostdin",
        "-threads",
        "1",
        "-t",
        str(seconds),
        "-i",
        str(source),
        "-an",
    ]
    words += ["-vf", f"{filters},format=yuv420p", "-c:v", "libx264", "-threads", "1", "-preset", "veryfast"]
    subprocess.run([*words, "-crf", str(crf), str(target)], check=True)


def place_of(file: Path) -> ClipPlace:
    """A file as if it were a clip of a shard."""
    data = file.read_bytes()
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate
        frames, fps, height, width = stream.frames, float(stream.average_rate), stream.height, stream.width
    return ClipPlace(str(file.parent), file.name, 0, len(data), zlib.crc32(data), frames, fps, height, width)


class Embedded(ArrayVectors):
    """Vectors and sketches of clips in memory."""

    def __init__(self, clips: Sequence[EmbeddedClip]) -> None:
        values = [clip.values for clip in clips if clip.values is not None]
        assert len(values) == len(clips)
        super().__init__(np.stack(values))
        self._clips = clips

    def sketch(self, row: int) -> tuple[float, NDArray[np.float32]]:
        """Spacing and pictures."""
        return self._clips[row].spacing, self._clips[row].sketch


@dataclass(frozen=True)
class Outcome:
    """What was found of copies.

    Attributes:
        found: copies by kind of which the original was found.
        made: copies by kind.
        missed: name and kind of the others.
        wrong: pairs of clips that were taken for the same and have other names.
        compared: pairs whose sketches were compared.
    """

    found: Counter[str]
    made: Counter[str]
    missed: list[tuple[str, str]]
    wrong: list[tuple[str, str]]
    compared: int


def find_copies(data: Path, names: Sequence[str], copied: Sequence[str], *, seconds: float) -> Outcome:
    """Make copies of some clips and look for them among all.

    Args:
        data: the folder.
        names: of all clips; files of one name and several suffixes are one film.
        copied: of the clips that are copied, some of them.
        seconds: length of a clip at most.
    """
    kinds = [list(KINDS)[number % len(KINDS)] for number in range(len(copied))]
    jobs = [(name, *PLAIN) for name in names]
    jobs += [(name, *KINDS[kind]) for name, kind in zip(copied, kinds, strict=True)]
    embedder = NetworkEmbedder(frozen_network("embedding"), device=torch.device("cpu"), workers=0)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number:04d}.mp4") for number in range(len(jobs))]
        for file, (name, filters, crf) in zip(files, jobs, strict=True):
            encode(data / name, file, filters, crf, seconds=seconds)
        clips = Embedded(list(embedder.embed(place_of(file) for file in files)))
        rows = np.arange(len(files))
        of = [name for name, *_ in jobs]
        stems = [Path(name).stem for name in of]
        video = np.array([*stems[: len(names)], *(f"copy of {stem}" for stem in stems[len(names) :])])
        centroids = centroids_of(clips, clusters=1, seed=0)
        grouped = group_clips(clips, centroids, rank=rows, video=video, folder=Path(folder))
    taken = {row: int(kept) for row, kept in enumerate(grouped.of.tolist()) if kept >= 0}
    outcome = Outcome(Counter(), Counter(kinds), [], [], grouped.compared)
    for row, kind in enumerate(kinds, len(names)):
        if row in taken and stems[taken[row]] == stems[row]:
            outcome.found[kind] += 1
        else:
            outcome.missed.append((of[row], kind))
    outcome.wrong.extend((of[row], of[kept]) for row, kept in taken.items() if stems[row] != stems[kept])
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--half", type=int, choices=(0, 1), default=1)
    parser.add_argument(
        "--copies", type=int, default=100, help="clips that are copied, the first ones in order"
    )
    parser.add_argument(
        "--clips", type=int, default=250, help="clips that are looked at, the copied ones among them"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a clip at most")
    arguments = parser.parse_args()
    names = clips_of_half(arguments.data, arguments.half)[: arguments.clips]
    found = find_copies(arguments.data, names, names[: arguments.copies], seconds=arguments.seconds)
    print(f"half {arguments.half}: {len(names)} clips, {found.compared} pairs compared")
    print(f"{found.found.total()} of {found.made.total()} copies found; by kind:")
    for kind in KINDS:
        print(f"  {kind:10} {found.found[kind]} of {found.made[kind]}")
    for name, kind in found.missed:
        print(f"  missed: {name}, {kind}")
    for name, other in found.wrong:
        print(f"  taken for the same: {name} and {other}")


if __name__ == "__main__":
    main()
