"""The pairs of a check side by side, as one self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cliplift.sharding.leaks.check import Leak, LeakReport, Place
from cliplift.sharding.read.contact_sheet import STYLE, image
from cliplift.sharding.storage import whole_file
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames

SHOWN_MOMENTS = 4
MOST_PAIRS = 200  # the listing has all
KINDS = {
    "content": "cut from the same file at the same time",
    "pictures": "the same pictures, and the same changes in them",
    "still": "equal pictures in which nothing moves",
    "embedding": "alike by embedding and by sketch, perhaps mirrored, cropped or at another speed",
}


def write_leak_page(
    reports: Sequence[LeakReport], url: str, output: str | Path, *, most: int = MOST_PAIRS
) -> Path:
    """Write the page of one or several checks of a dataset.

    Args:
        reports: what the checks found.
        url: of the dataset that was searched.
        output: HTML file to write.
        most: pairs that are shown of each check.
    """
    target = Path(output)
    parts = ["<!doctype html><meta charset=utf-8><title>Leaks</title>"]
    parts.append(f"<style>{STYLE}.pair{{display:block;margin:0 0 1.5em}}.pair img{{height:84px}}</style>")
    parts.append(f"<h1>Leaks</h1><p>{html.escape(url)}</p>")
    with whole_file(target) as temporary:
        parts += [_check(report, most) for report in reports]
        temporary.write_text("\n".join(parts), encoding="utf-8", errors="backslashreplace")
    return target


def _check(report: LeakReport, most: int) -> str:
    check = report.check
    splits = ", ".join(check.splits) + (f", official split {check.fold}" if check.fold else "")
    said = (
        f"{len(report.leaks)} of {check.clips} clips, of {len({leak.clip.sample.video_id for leak in report.leaks})}"
        f" videos, show what one of {check.against_clips} clips of {check.against} ({splits}) shows."
    )
    rest = f"<p>The first {most} are shown.</p>" if len(report.leaks) > most else ""
    pairs = "".join(_pair(leak, check.against) for leak in report.leaks[:most])
    return f"<h2>{html.escape(check.against)}</h2><p>{html.escape(said)}</p>{rest}{pairs}"


def _pair(leak: Leak, against: str) -> str:
    compared = leak.comparison
    numbers = "" if compared is None else (
        f" · residual {compared.residual:.1f} levels, correlation {compared.correlation:.2f}"
    )  # fmt: skip
    alike = "" if leak.likeness is None else f" · likeness {leak.likeness:.2f}"
    length = f" · {leak.shared_seconds:.1f} s" if leak.shared_seconds else ""
    caption = f"{KINDS[leak.kind]}{length}{numbers}{alike}"
    frames = (None, None) if compared is None else (compared.frames, compared.other_frames)
    sides = _side(leak.clip, leak.begins_seconds, frames[0], "") + _side(
        leak.of, leak.of_begins_seconds, frames[1], f"{against}: "
    )
    return f"<figure class=pair>{sides}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _side(place: Place, begins: float, frames: Sequence[int] | None, whose: str) -> str:
    one = place.sample
    numbers = sorted(set(frames or range(one.num_frames)))
    kept = [
        numbers[k] for k in np.unique(np.linspace(0, len(numbers) - 1, SHOWN_MOMENTS).round().astype(int))
    ]
    try:
        images = "".join(image(frame) for frame in decode_frames(place.read(), kept, decoder="pyav"))
    except VideoDecodeError as error:
        images = f"<p>{html.escape(str(error))}</p>"
    text = f"{whose}{one.source} · {one.key} · from {begins:.2f} s · {one.width}×{one.height}"
    return f"<div>{images}<br>{html.escape(text)}</div>"
