"""What a transfer run's student can and cannot retrieve of its held-out clips: a small file for the report.

A clip is a query for its own frames among those of all held-out clips. Beside it stand the clips nearest to it by the
student, which saw clips, and by the teacher, which saw frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from cliplift.configs.sections import ConfigError, Section
from cliplift.pipelines.runs.folder import write_text

RETRIEVAL = "retrieval.json"
NEIGHBOURS = 4  # of a query, shown and compared
QUERIES = 6  # shown of those that were retrieved, and of those that were not

Rows = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]


class ShownClip(Section):
    """A held-out clip and where it is stored."""

    key: str
    video_id: str
    shard_url: str
    sample_index: int = Field(ge=0)


class Query(Section):
    """A clip by its number in ``Retrieval.clips``, the rank of its own frames, 1 at best, and its nearest clips."""

    clip: int = Field(ge=0)
    rank: int = Field(ge=1)
    by_teacher: tuple[int, ...]
    by_student: tuple[int, ...]


class Retrieval(Section):
    """Some queries of a run, best first and worst first, and what holds for all of its held-out clips."""

    held_out_clips: int = Field(ge=1)
    median_rank: float
    neighbours: int = Field(ge=1, description="k of the overlap")
    overlap: float = Field(ge=0, le=1, description="share of the teacher's k nearest among the student's")
    overlap_by_chance: float = Field(ge=0, le=1)
    clips: tuple[ShownClip, ...]
    retrieved: tuple[Query, ...]
    missed: tuple[Query, ...]

    @model_validator(mode="after")
    def _known_clips(self) -> Retrieval:
        named = {n for q in (*self.retrieved, *self.missed) for n in (q.clip, *q.by_teacher, *q.by_student)}
        if named and not 0 <= min(named) <= max(named) < len(self.clips):
            raise ValueError(f"names clip {max(named)} of {len(self.clips)}")
        return self


def retrieval_of(
    *, scores: Rows, student: Rows, teacher: Rows, videos: Integers, clips: Sequence[ShownClip]
) -> Retrieval:
    """The table of N held-out clips.

    Args:
        scores: (N, N) of clip i with the frames of clip j.
        student, teacher: (N, D) and (N, E), what each says of the clips. Compared by cosine after the mean over the
            clips is taken off; clips of one video are no neighbours of each other.
        videos: (N,) source video of each.
        clips: the N clips.
    """
    ranks = 1 + (scores > np.diagonal(scores)[:, None]).sum(axis=1)
    apart = videos[:, None] != videos[None, :]
    k = min(NEIGHBOURS, int(apart.sum(axis=1).min()))
    by_teacher, by_student = (_nearest(rows, apart, k) for rows in (teacher, student))
    shared = [len(set(a) & set(b)) / k for a, b in zip(by_teacher.tolist(), by_student.tolist(), strict=True)]
    order = np.argsort(ranks, kind="stable")
    half = min(QUERIES, len(order) // 2)
    best = [int(i) for i in order[:half]]
    worst = [int(i) for i in order[::-1][:half]]
    named = sorted({int(n) for i in (*best, *worst) for n in (i, *by_teacher[i], *by_student[i])})
    place = {n: at for at, n in enumerate(named)}

    def queries(rows: Sequence[int]) -> tuple[Query, ...]:
        return tuple(
            Query(
                clip=place[i],
                rank=int(ranks[i]),
                by_teacher=tuple(place[n] for n in by_teacher[i].tolist()),
                by_student=tuple(place[n] for n in by_student[i].tolist()),
            )
            for i in rows
        )

    return Retrieval(
        held_out_clips=len(clips),
        median_rank=float(np.median(ranks)),
        neighbours=k,
        overlap=float(np.mean(shared)),
        overlap_by_chance=float(np.mean(k / apart.sum(axis=1))),
        clips=tuple(clips[n] for n in named),
        retrieved=queries(best),
        missed=queries(worst),
    )


def _nearest(rows: Rows, allowed: npt.NDArray[np.bool_], k: int) -> npt.NDArray[np.int64]:
    """(N, k) the nearest allowed rows of each, nearest first."""
    centred = rows.astype(np.float64) - rows.mean(axis=0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    similarity = np.where(allowed, centred @ centred.T, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]


def write_retrieval(found: Retrieval, folder: Path) -> None:
    write_text(folder / RETRIEVAL, found.model_dump_json(indent=1))


def read_retrieval(folder: Path) -> Retrieval | None:
    """Of a run's folder; None where it has none.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / RETRIEVAL
    if not path.is_file():
        return None
    try:
        return Retrieval.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(
            f"{path} is damaged ({error.errors()[0]['msg']})",
            key="runs",
            value=str(folder),
            hint="remove it, or run the evaluation again",
        ) from None
