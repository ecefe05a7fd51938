"""Several experiments of one report beside each other: where each got its weights and data, what in their configs
differs, and whether one is better than another on the same clips.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from markupsafe import Markup

from cliplift.pipelines.evaluation.metrics import bootstrap_interval
from cliplift.pipelines.report.charts import COLOURS
from cliplift.pipelines.runs.records import OWN_OF_A_RUN, RunGroup
from cliplift.pipelines.runs.results import metric_name, percent

HEADLINES = ("accuracy", "mean_average_precision", "matching_accuracy", "probe_knn_accuracy")
SOURCES = ("initialise_from", "run", "model.pretrained")  # keys of a config that name another run, or weights
BOX_WIDTH, BOX_HEIGHT, LANE_HEIGHT, GAP_X, GAP_Y = 204, 48, 2, 44, 14
MOST_LETTERS = 30
MOST_PAIRS = 12
Stop = str | tuple[str, str, int]  # a box, or the lane of (start, end) in a column


@dataclass(frozen=True)
class Node:
    """A box of the graph: a dataset, weights from elsewhere, or an experiment."""

    name: str
    detail: str
    colour: int | None = None


@dataclass(frozen=True)
class Difference:
    """How much more often one experiment is right than another on the same clips."""

    better: RunGroup
    other: RunGroup
    clips: int
    points: float  # share of clips, 0.031 is 3.1 points
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0


@dataclass(frozen=True)
class ConfigTable:
    """Keys of which experiments of one stage have different values."""

    stage: str
    groups: tuple[RunGroup, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Campaign:
    """What a page says of several experiments together; nothing of one alone."""

    graph: Markup
    leads: list[Difference]
    configs: list[ConfigTable]


def campaign_of(groups: Sequence[RunGroup]) -> Campaign:
    """The experiments of a report beside each other."""
    return Campaign(lineage_graph(groups), paired_differences(groups), config_differences(groups))


def lineage_graph(groups: Sequence[RunGroup]) -> Markup:
    """From shards and weights to experiments with their numbers, as SVG; empty where no experiment needs another."""
    nodes: dict[str, Node] = {}
    edges: list[tuple[str, str]] = []
    by_folder = {run.folder.resolve(): group for group in groups for run in group.runs}
    follows = False
    for group in groups:
        key = f"group {group.label}"
        nodes[key] = Node(group.label, headline(group) or group.stage, group.colour)
        for url in _shards(group):
            nodes.setdefault(f"shards {url}", Node(Path(url).name or url, "shards"))
            edges.append((f"shards {url}", key))
        for source in _sources(group):
            parent = by_folder.get(Path(source).resolve())
            if parent is not None and parent is not group:
                edges.append((f"group {parent.label}", key))
                follows = True
            elif parent is None:
                nodes.setdefault(f"weights {source}", Node(Path(source).name or source, "weights"))
                edges.append((f"weights {source}", key))
    return _drawn(nodes, list(dict.fromkeys(edges))) if follows else Markup("")


def headline(group: RunGroup) -> str:
    """The number that counts of an experiment: ``accuracy 57.1 % ± 2.0``; empty where it has none yet."""
    metric = next((name for name in HEADLINES if group.values(name)), None)
    if metric is None:
        return ""
    values = group.values(metric)
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    runs = f", {len(group.runs)} runs" if len(group.runs) > 1 else ""
    return f"{metric_name(metric)} {percent(statistics.fmean(values))}{spread}{runs}"


def _shards(group: RunGroup) -> list[str]:
    shards = group.runs[0].setting("data.shards")
    entries = shards if isinstance(shards, list) else []
    return [
        str(entry["url"] if isinstance(entry, Mapping) and "url" in entry else entry) for entry in entries
    ]


def _sources(group: RunGroup) -> list[str]:
    """Folders or weights that the runs of a group started from; each seed may have its own."""
    named = [run.setting(key) for run in group.runs for key in SOURCES]
    evaluated = [(run.result or {}).get("evaluated") for run in group.runs]
    return list(dict.fromkeys(str(source) for source in (*named, *evaluated) if source))


def _drawn(nodes: Mapping[str, Node], edges: Sequence[tuple[str, str]]) -> Markup:
    """Boxes in columns, each right of all that it needs, and curves between them.

    A curve that passes a column has a lane of its own there, between the boxes (Sugiyama's layers).
    """
    column = _columns(list(nodes), edges)
    ways = [_way(start, end, column) for start, end in edges]
    place = _places(list(nodes), ways, column)
    width = max(place[key][0] for key in nodes) + BOX_WIDTH
    height = max(y + (BOX_HEIGHT if key in nodes else LANE_HEIGHT) for key, (_, y) in place.items())
    parts = [_curve([place[stop] for stop in way]) for way in ways]
    parts += [_box(nodes[key], *place[key]) for key in nodes]
    said = "; ".join(f"{nodes[start].name} to {nodes[end].name}" for start, end in edges)
    return Markup(
        '<svg class="graph" viewBox="-1 -1 {} {}" width="{}" role="img" aria-label="Lineage: {}">{}</svg>'
    ).format(width + 2, height + 2, width + 2, said, Markup("").join(parts))


def _columns(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[Stop, int]:
    column: dict[Stop, int] = dict.fromkeys(nodes, 0)
    for _ in nodes:  # as often as the longest way can be; a circle of damaged configs ends too
        for start, end in edges:
            column[end] = max(column[end], min(column[start] + 1, len(nodes)))
    # A source stands just left of what needs it first.
    for key in nodes:
        after = [column[end] for start, end in edges if start == key]
        if after and not any(end == key for _, end in edges):
            column[key] = max(0, min(after) - 1)
    return column


def _way(start: str, end: str, column: dict[Stop, int]) -> list[Stop]:
    """From box to box, with a lane in each column between them, which gets its column here."""
    lanes: list[Stop] = [(start, end, at) for at in range(column[start] + 1, column[end])]
    column.update((lane, lane[2]) for lane in lanes if isinstance(lane, tuple))
    return [start, *lanes, end]


def _places(
    nodes: Sequence[str], ways: Sequence[Sequence[Stop]], column: Mapping[Stop, int]
) -> dict[Stop, tuple[int, int]]:
    """Left upper corners. Within a column in the order of what stands before, so that few curves cross."""
    place: dict[Stop, tuple[int, int]] = {}
    before: dict[Stop, list[Stop]] = {}
    for way in ways:
        for left, right in pairwise(way):
            before.setdefault(right, []).append(left)
    for at in sorted(set(column.values())):
        stops = [stop for stop in column if column[stop] == at]
        heights = {stop: [place[left][1] for left in before.get(stop, ()) if left in place] for stop in stops}
        stops.sort(key=lambda stop: statistics.fmean(heights[stop]) if heights[stop] else 0.0)
        y = 0
        for stop in stops:
            place[stop] = (at * (BOX_WIDTH + GAP_X), y)
            y += GAP_Y + (BOX_HEIGHT if stop in nodes else LANE_HEIGHT)
    return place


def _box(node: Node, x: int, y: int) -> Markup:
    kind = "" if node.colour is None else f"c{node.colour % COLOURS}"
    return Markup(
        '<g class="{}"><title>{}: {}</title><rect class="box" x="{}" y="{}" width="{}" height="{}" rx="4"/>'
        '<text class="name" x="{}" y="{}">{}</text><text x="{}" y="{}">{}</text></g>'
    ).format(
        kind, node.name, node.detail, x, y, BOX_WIDTH, BOX_HEIGHT,
        x + 10, y + 20, shortened(node.name), x + 10, y + 36, shortened(node.detail, most=MOST_LETTERS + 4),
    )  # fmt: skip


def _curve(stops: Sequence[tuple[int, int]]) -> Markup:
    """From the right side of the first box to the left side of the last, straight along the lanes between them."""
    x, y = stops[0][0] + BOX_WIDTH, stops[0][1] + BOX_HEIGHT / 2
    path = f"M{x} {y:.1f}"
    for to_x, top in stops[1:]:
        is_last = (to_x, top) == stops[-1]
        to_y = top + (BOX_HEIGHT if is_last else LANE_HEIGHT) / 2
        bend = max(GAP_X, to_x - x) / 2
        path += f"C{x + bend:.1f} {y:.1f} {to_x - bend:.1f} {to_y:.1f} {to_x} {to_y:.1f}"
        x, y = to_x + BOX_WIDTH, to_y
        if not is_last:
            path += f"H{x}"
    return Markup('<path class="edge" d="{}"/>').format(path)


def shortened(text: str, *, most: int = MOST_LETTERS) -> str:
    """The text, or its beginning and end with an ellipsis where it is too long for a box."""
    return text if len(text) <= most else f"{text[: most - 9]}…{text[-8:]}"


def config_differences(groups: Sequence[RunGroup]) -> list[ConfigTable]:
    """Of each stage with several experiments: the keys in which their configs differ, and the values."""
    known = {str(run.folder.resolve()): group.label for group in groups for run in group.runs}
    tables = []
    for stage in dict.fromkeys(group.stage for group in groups):
        members = tuple(group for group in groups if group.stage == stage)
        flat = [_flat(group, known) for group in members]
        keys = list(dict.fromkeys(key for each in flat for key in each))
        rows = [(key, tuple(each.get(key, "") for each in flat)) for key in keys]
        rows = [(key, values) for key, values in rows if len(set(values)) > 1]
        if len(members) > 1 and rows:
            tables.append(ConfigTable(stage, members, tuple(rows)))
    return tables


def _flat(group: RunGroup, known: Mapping[str, str]) -> dict[str, str]:
    """Dotted key -> value as text, of the first run, without what tells seeds and folds of one config apart."""
    found: dict[str, str] = {}

    def walk(tree: object, key: str) -> None:
        if isinstance(tree, Mapping) and tree:
            for name, value in tree.items():
                if key or name not in OWN_OF_A_RUN:
                    walk(value, f"{key}.{name}" if key else str(name))
        elif key != "data.fold":
            text = tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, default=str)
            if key in SOURCES and isinstance(tree, str):
                text = known.get(str(Path(tree).resolve()), text)
            found[key] = text

    walk(group.runs[0].config, "")
    return found


def paired_differences(groups: Sequence[RunGroup]) -> list[Difference]:
    """Of every two experiments that were tested on the same clips, the better one's lead; the largest leads first.

    Right answers of an experiment's runs are averaged for each clip. The interval is a bootstrap over whole videos of
    the difference itself, so what is easy or hard for both does not widen it. It says nothing of other seeds.
    """
    right = {group.label: _right(group) for group in groups}
    found = []
    for at, first in enumerate(groups):
        for second in groups[at + 1 :]:
            a, b = right[first.label], right[second.label]
            if a and a.keys() == b.keys():
                found.append(_difference(first, second, a, b))
    return sorted(found, key=lambda each: -each.points)[:MOST_PAIRS]


Clip = tuple[str, str]  # video and key


def _right(group: RunGroup) -> dict[Clip, float]:
    """Share of the runs of a group that are right about a clip."""
    answers: dict[Clip, list[bool]] = {}
    for run in group.runs:
        table = run.predictions
        if table is None:
            continue
        right = (table.predicted == table.labels).tolist()
        for video, key, is_right, labelled in zip(
            table.video_ids, table.keys, right, table.labelled.tolist(), strict=True
        ):
            if labelled:
                answers.setdefault((video, key), []).append(is_right)
    return {clip: statistics.fmean(given) for clip, given in answers.items()}


def _difference(
    first: RunGroup, second: RunGroup, a: Mapping[Clip, float], b: Mapping[Clip, float]
) -> Difference:
    clips = list(a)
    lead = np.array([a[clip] - b[clip] for clip in clips])
    better, other = (first, second) if lead.mean() >= 0 else (second, first)
    lead = lead if better is first else -lead
    low, high = bootstrap_interval(lead, seed=0, groups=np.array([video for video, _ in clips]))
    return Difference(better, other, len(clips), float(lead.mean()), low, high)
