"""The clips that the runs of a report most often get wrong, each with what it is taken for."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cliplift.pipelines.report.clips import EmbeddedClips
from cliplift.pipelines.runs.records import RunGroup, RunRecord

MOST_HARDEST = 8
Clip = tuple[str, str, str]  # video, key and true class


@dataclass(frozen=True)
class HardClip:
    """One clip over all runs that were tested on it."""

    key: str
    video_id: str
    truth: str
    tests: int
    right: int
    probability: float  # of the true class, mean over the runs
    taken_for: str  # the wrong class that most runs say
    taken: int  # by so many runs
    source: str | None  # data:video/mp4;base64,..., None where it cannot be shown


@dataclass
class _Tested:
    """What the runs say of a clip."""

    run: RunRecord
    row: int
    probabilities: list[float] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)

    @property
    def right(self) -> int:
        return len(self.probabilities) - self.wrong.total()

    @property
    def difficulty(self) -> tuple[float, float]:
        """Sorts the hardest first: by the share of runs that are right, then by the true class's probability."""
        return self.right / len(self.probabilities), statistics.fmean(self.probabilities)


def hardest_clips(
    groups: Sequence[RunGroup], embedded: EmbeddedClips, *, most: int = MOST_HARDEST
) -> list[HardClip]:
    """The clips that several runs were tested on and most of them got wrong; empty where there is one run alone.

    Args:
        groups: of runs with predictions.
        embedded: reads the clips.
        most: clips at most.
    """
    tested = _tested([run for group in groups for run in group.runs])
    wrong = {clip: said for clip, said in tested.items() if said.wrong and len(said.probabilities) > 1}
    return [
        _hard(clip, wrong[clip], embedded)
        for clip in sorted(wrong, key=lambda clip: (*wrong[clip].difficulty, clip))[:most]
    ]


def _tested(runs: Sequence[RunRecord]) -> dict[Clip, _Tested]:
    found: dict[Clip, _Tested] = {}
    for run in runs:
        table, classes = run.predictions, run.classes()
        if table is None:
            continue
        predicted = table.predicted.tolist()
        for row, label in enumerate(table.labels.tolist()):
            if label < 0:
                continue
            clip = (table.video_ids[row], table.keys[row], classes[label])
            said = found.setdefault(clip, _Tested(run, row))
            said.probabilities.append(float(table.probabilities[row, label]))
            if predicted[row] != label:
                said.wrong[classes[predicted[row]]] += 1
    return found


def _hard(clip: Clip, said: _Tested, embedded: EmbeddedClips) -> HardClip:
    video_id, key, truth = clip
    taken_for, taken = min(said.wrong.items(), key=lambda item: (-item[1], item[0]))
    return HardClip(
        key=key,
        video_id=video_id,
        truth=truth,
        tests=len(said.probabilities),
        right=said.right,
        probability=statistics.fmean(said.probabilities),
        taken_for=taken_for,
        taken=taken,
        source=embedded.source(said.run, said.row),
    )
