"""A page to look at a shard dataset: statistics, and frames of clips drawn from every split."""

from __future__ import annotations

import base64
import html
import random
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from cliplift.sharding.manifest import Dataset, SplitFacts
from cliplift.sharding.read.generations import open_dataset
from cliplift.sharding.read.reader import ShardDataset, ShardReadError
from cliplift.sharding.storage import whole_file
from cliplift.sharding.video.decode import Frames, VideoDecodeError, decode_frames

STYLE = (
    "body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222}h1,h2{font-weight:600}"
    "table{border-collapse:collapse;margin:0 0 1.5em}"
    "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}figure{display:inline-block;margin:0 1em 1em 0}"
    "figcaption{max-width:40em;color:#555;overflow-wrap:anywhere}img{height:96px;margin-right:2px}"
    ".bar{display:inline-block;height:.7em;background:#4a78b0}"
)


def write_contact_sheet(
    url: str, output: str | Path, *, clips_per_split: int = 24, frames_per_clip: int = 4, seed: int = 0
) -> Path:
    """Write one self-contained HTML page about a dataset.

    Args:
        url: folder or URL of a finalized dataset.
        output: HTML file to write.
        clips_per_split: clips shown of each split, drawn by the seed.
        frames_per_clip: frames shown of each clip, evenly spaced.
        seed: seed of the draw.

    Raises:
        ConfigError: there is no dataset at ``url``.
    """
    dataset = open_dataset(url)[1]
    target = Path(output)
    with whole_file(
        target
    ) as temporary:  # before the work: a place that cannot be written is refused at once
        page = _page(url, dataset, clips_per_split, frames_per_clip, seed)
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return target


def _page(url: str, dataset: Dataset, clips: int, frames: int, seed: int) -> str:
    samples = ShardDataset(url)
    parts = [f"<h1>{html.escape(dataset.name)}</h1><p>{html.escape(url)}</p>", _overview(dataset.splits)]
    numbers = {
        name: np.asarray(samples.column(name), dtype=float)
        for name in ("num_frames", "fps", "width", "height")
    }
    parts.append(_quantiles("Length, seconds", numbers["num_frames"] / numbers["fps"]))
    parts.append(_quantiles("Short side, pixels", np.minimum(numbers["width"], numbers["height"])))
    parts.append(_counts("Refused clips, by stage", Counter(dict(dataset.refused))))
    for split in dataset.splits:
        part = ShardDataset(url, split=split if not dataset.folds else None)
        parts.append(_split(part, split, clips, frames, random.Random(seed)))
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(dataset.name)}</title><style>{STYLE}</style>"
    )
    return page + "\n".join(parts)


def _split(part: ShardDataset, split: str, clips: int, frames: int, draw: random.Random) -> str:
    labels = [part.classes[n] for n in part.labels.tolist() if n >= 0]
    shown = sorted(draw.sample(range(len(part)), min(clips, len(part))))
    figures = "".join(figure(part, i, frames) for i in shown)
    return f"<h2>{html.escape(split)}</h2>{_counts('Clips by class', Counter(labels))}{figures}"


def figure(part: ShardDataset, i: int, count: int, *, note: str = "") -> str:
    """A clip on a page.

    Args:
        part: whose clip it is.
        i: its number.
        count: frames shown of it, evenly spaced.
        note: stands before its name.
    """
    facts = part.facts(i)
    name = (
        part.classes[facts.label]
        if facts.label is not None
        else ", ".join(part.classes[n] for n in facts.labels)
    )
    try:
        numbers = [round(k * (facts.num_frames - 1) / max(1, count - 1)) for k in range(count)]
        images = "".join(image(frame) for frame in decode_frames(part.read(i), numbers, decoder="pyav"))
    except (ShardReadError, VideoDecodeError) as error:
        images = f"<p>{html.escape(str(error))}</p>"
    caption = f"{note} · " if note else ""
    caption += f"{name} · {facts.source} · {facts.num_frames} frames at {facts.fps:g}/s, {facts.width}×{facts.height}"
    return f"<figure>{images}<figcaption>{html.escape(caption)}</figcaption></figure>"


def image(frame: Frames) -> str:
    """An RGB frame (H, W, 3) as an element of a page."""
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg(frame)).decode()}">'


def jpeg(frame: Frames) -> bytes:
    """One RGB frame (H, W, 3) as a JPEG file."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width = frame.shape[:2]
    codec.pix_fmt, codec.time_base = "yuvj420p", Fraction(1)
    codec.options = {"q": "4"}
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
        format="yuvj420p"
    )
    packets = [*codec.encode(picture), *codec.encode(None)]
    return b"".join(bytes(packet) for packet in packets)


def _overview(splits: Mapping[str, SplitFacts]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{s['samples']}<td>{s.get('shards', 0)}<td>{s['seconds'] / 3600:.3f}</tr>"
        for name, s in splits.items()
    )
    return f"<table><tr><th>split<th>clips<th>shards<th>hours</tr>{rows}</table>"


def _quantiles(title: str, values: npt.NDArray[np.float64 | np.int64]) -> str:
    points = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    cells = "".join(f"<td>{p:.4g}" for p in points)
    return (
        f"<table><tr><th>{title}<th>least<th>5 %<th>median<th>95 %<th>most</tr><tr><td>{cells}</tr></table>"
    )


def _counts(title: str, counts: Counter[str]) -> str:
    if not counts:
        return ""
    most = max(counts.values())
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{count}<td style='text-align:left'>"
        f"<span class=bar style='width:{12 * count / most:.2f}em'></span></tr>"
        for name, count in sorted(counts.items())
    )
    return f"<table><tr><th>{title}<th>clips<th></tr>{rows}</table>"
