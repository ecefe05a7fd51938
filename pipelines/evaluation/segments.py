"""What happens when in a long video: stretches of time in which the windows over it agree, with exact ends.

Windows that slide in large steps find where the answer changes; between two that differ, further ones are looked at,
each halving the time between its neighbours, until the change is known to a frame. A stretch shorter than a step that
lies between two windows of the same answer is not found. One window is held at a time, so that memory does not grow
with the video's length.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Probabilities = npt.NDArray[np.float32]
Present = frozenset[int]

LEAST_OF_SEVERAL = 0.5  # probability of a class that is present, where classes are judged one by one
DEEPEST = 32  # halvings between two windows; a step of an hour is a microsecond by then


class Window(NamedTuple):
    """A part of a video and what the network says of it."""

    start_seconds: float
    end_seconds: float
    probabilities: Probabilities  # (K,)

    @property
    def centre_seconds(self) -> float:
        """The time that the window speaks for."""
        return (self.start_seconds + self.end_seconds) / 2


class Segment(NamedTuple):
    """A stretch of time in which a class is present, and its mean probability over that time."""

    start_seconds: float
    end_seconds: float
    label: int
    score: float


def present(probabilities: Probabilities, *, threshold: float | None, multi_label: bool) -> Present:
    """The classes that a window shows.

    Args:
        probabilities: (K,) of each class.
        threshold: least probability; None is none for single labels and ``LEAST_OF_SEVERAL`` for several.
        multi_label: every class by itself, or the likeliest alone.
    """
    if multi_label:
        least = LEAST_OF_SEVERAL if threshold is None else threshold
        return frozenset(np.flatnonzero(probabilities >= least).tolist())
    best = int(probabilities.argmax())
    return frozenset((best,)) if threshold is None or probabilities[best] >= threshold else frozenset()


def refined(
    windows: Iterable[Window],
    look: Callable[[float], Window],
    shown: Callable[[Probabilities], Present],
    *,
    precision_seconds: float,
) -> Iterator[Window]:
    """The windows in order of time, with further ones between two that show different classes.

    Args:
        windows: in order of time.
        look: the window around a time, seconds.
        shown: the classes of a window.
        precision_seconds: how near each other two windows are between which nothing more is looked for.
    """

    def between(first: Window, last: Window, depth: int) -> Iterator[Window]:
        near = last.centre_seconds - first.centre_seconds <= precision_seconds
        if near or depth == 0 or shown(first.probabilities) == shown(last.probabilities):
            return
        middle = look((first.centre_seconds + last.centre_seconds) / 2)
        yield from between(first, middle, depth - 1)
        yield middle
        yield from between(middle, last, depth - 1)

    before: Window | None = None
    for window in windows:
        if before is not None:
            yield from between(before, window, DEEPEST)
        yield window
        before = window


def segments(
    windows: Iterable[Window], shown: Callable[[Probabilities], Present], *, duration_seconds: float
) -> Iterator[Segment]:
    """The stretches of each class, in the order in which they end.

    A window stands for the time from halfway to the one before to halfway to the one after, the first and the last for
    all that is before and after them.
    """
    open_ones: dict[int, _Open] = {}
    for start, end, window in _spans(windows, duration_seconds):
        classes = shown(window.probabilities)
        for label in sorted(open_ones.keys() - classes):
            yield open_ones.pop(label).closed(label, start)
        for label in sorted(classes):
            one = open_ones.setdefault(label, _Open(start))
            one.add(float(window.probabilities[label]), end - start)
    for label in sorted(open_ones):
        yield open_ones[label].closed(label, duration_seconds)


def _spans(windows: Iterable[Window], duration: float) -> Iterator[tuple[float, float, Window]]:
    """(start, end, window): the time that each window stands for, seconds."""
    before: Window | None = None
    start = 0.0
    for window in windows:
        if before is not None:
            end = (before.centre_seconds + window.centre_seconds) / 2
            yield start, end, before
            start = end
        before = window
    if before is not None:
        yield start, duration, before


class _Open:
    """A stretch that has not ended yet."""

    def __init__(self, start: float) -> None:
        self._start = start
        self._seconds = self._weighted = 0.0

    def add(self, probability: float, seconds: float) -> None:
        self._seconds += seconds
        self._weighted += probability * seconds

    def closed(self, label: int, end: float) -> Segment:
        return Segment(self._start, end, label, self._weighted / max(self._seconds, 1e-9))


def dump_segments(
    found: Sequence[tuple[str, Sequence[Segment]]], classes: Sequence[str], *, suffix: str
) -> str:
    """The segments of videos as the text of a file.

    Args:
        found: each video's name and segments.
        classes: names of the labels.
        suffix: ``.csv`` (a line a segment), ``.json`` (an object a video) or ``.vtt`` (WebVTT, of one video).
    """
    return {".csv": _csv, ".json": _json, ".vtt": _webvtt}[suffix](found, classes)


def _csv(found: Sequence[tuple[str, Sequence[Segment]]], classes: Sequence[str]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("video", "start_seconds", "end_seconds", "class", "score"))
    for video, parts in found:
        for one in parts:
            row = _record(one, classes)
            lines.writerow((video, row["start_seconds"], row["end_seconds"], row["class"], row["score"]))
    return text.getvalue()


def _json(found: Sequence[tuple[str, Sequence[Segment]]], classes: Sequence[str]) -> str:
    videos = [
        {"video": video, "segments": [_record(one, classes) for one in parts]} for video, parts in found
    ]
    return json.dumps(videos, ensure_ascii=False, indent=1) + "\n"


def _record(one: Segment, classes: Sequence[str]) -> dict[str, object]:
    return {
        "start_seconds": round(one.start_seconds, 3),
        "end_seconds": round(one.end_seconds, 3),
        "class": classes[one.label],
        "score": round(one.score, 4),
    }


def _webvtt(found: Sequence[tuple[str, Sequence[Segment]]], classes: Sequence[str]) -> str:
    """WebVTT (W3C, 2019): players show the class as a subtitle while it lasts."""
    cues = ["WEBVTT\n"]
    for one in sorted((one for _, parts in found for one in parts), key=lambda one: one.start_seconds):
        # A cue's text may hold neither markup nor an arrow, and no empty line.
        name = " ".join(classes[one.label].split())
        name = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        cues.append(f"{_clock(one.start_seconds)} --> {_clock(one.end_seconds)}\n{name} {one.score:.2f}\n")
    return "\n".join(cues)


def _clock(seconds: float) -> str:
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}.{rest % 1000:03d}"
