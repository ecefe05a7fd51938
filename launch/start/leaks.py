"""What would spoil a number or a build, and what to do about it: rows as those of `cliplift check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from cliplift.launch.check.findings import Finding
from cliplift.launch.start.groups import GroupRule, sizes
from cliplift.launch.start.looks import Looks, told
from cliplift.launch.start.splits import SPLITS, Division
from cliplift.launch.start.videos import FoundVideos

NAMED = 3  # examples of a row
FEW_TESTED = 5  # clips of a class below which a test says little of it
IMBALANCE = 3.0
LEAK = "LEAK: "


def describe(found: FoundVideos, looks: Looks) -> Iterator[Finding]:
    """The videos: classes, sizes, lengths, what cannot be used."""
    yield Finding("ok", "videos", f"{len(found.videos)}, {found.said}")
    if found.unlisted:
        remedy = "add rows for them, or leave them out"
        yield Finding("note", "not in the list", f"{found.unlisted} videos lie there", remedy)
    if found.missing:
        yield Finding("note", "missing", _some(found.missing), "the list names them; they are not there")
    if found.left_out:
        yield Finding("ok", "other files", f"{found.left_out} are no videos by their endings, or hidden")
    yield from _classes(found)
    done = len(looks.seen) + len(looks.unreadable)
    how = " (the time was up: --seconds)" if looks.stopped else ""
    more = "" if done == len(found.videos) else f", of all classes alike{how}; --look 0 looks at all"
    yield Finding("ok", "looked at", f"{done} of {len(found.videos)}{more}")
    if looks.seen:
        yield from _pictures(looks)
    if looks.unreadable:
        named = [f"{found.videos[n].source} ({reason})" for n, reason in looks.unreadable]
        yield Finding(
            "note", "cannot be read", _some(named), "`cliplift shard` refuses them; remove or repair them"
        )


def _classes(found: FoundVideos) -> Iterator[Finding]:
    if not found.labelled:
        remedy = "for a classifier put them in one folder a class, or write a list with path and label"
        yield Finding("note", "classes", "the videos have no labels", remedy)
        return
    counts = Counter(video.label for video in found.videos)
    said = ", ".join(f"{name} {counts[label]}" for label, name in enumerate(found.classes[:20]))
    said += f" and {len(found.classes) - 20} more" if len(found.classes) > 20 else ""
    few = [name for label, name in enumerate(found.classes) if counts[label] < len(SPLITS)]
    if len(found.classes) < 2:
        yield Finding("fail", "classes", said, "one class cannot be told from anything: add a second folder")
    elif few:
        remedy = f"{few[0]} has too few for training, validation and test: add videos, or leave the class out"
        yield Finding("fail", "classes", said, remedy)
    elif max(counts.values()) >= IMBALANCE * min(counts.values()):
        yield Finding(
            "note", "classes", said, "unequal: training draws them equally often (data.class_balanced)"
        )
    else:
        yield Finding("ok", "classes", said)


def _pictures(looks: Looks) -> Iterator[Finding]:
    glances = [g for _, g in looks.seen]
    yield Finding("ok", "pixels", told([f"{g['width']}x{g['height']}" for g in glances]))
    rates = told([f"{g['fps']:.4g}" if g["fps"] else "not stated" for g in glances])
    yield Finding("ok", "frames a second", rates)
    seconds = sorted(g["seconds"] for g in glances if g["seconds"])
    if seconds:
        middle = seconds[len(seconds) // 2]
        yield Finding("ok", "seconds", f"{seconds[0]:.1f} to {seconds[-1]:.1f}, half above {middle:.1f}")
    yield Finding("ok", "codecs", told([f"{g['codec']} in {g['container'].split(',')[0]}" for g in glances]))


def describe_groups(
    found: FoundVideos, rule: GroupRule | None, *, given: bool, used: bool
) -> Iterator[Finding]:
    """What belongs together, and whether that is known.

    Args:
        found: the videos.
        rule: of names, or None.
        given: whether the user or the list named the groups.
        used: whether they are kept whole.
    """
    if rule is None:
        if not found.has_splits:
            cure = (
                "if clips share a camera, person or recording, say so: --group-pattern 'REGEX' whose first parentheses "
                "match the group in the path, or a column group in a list"
            )
            words = f"{LEAK}groups are unknown, so clips of one recording may be trained on and tested on"
            yield Finding("note", "groups", words, cure)
        return
    said = f"{rule.count} by {rule.said}: {sizes(rule.groups)}"
    if not used:
        cure = "three are needed for training, validation and test: record more, and read the test with care"
        yield Finding("note", "groups", f"{LEAK}{said}; clips of one group are in several splits", cure)
    elif given:
        yield Finding("ok", "groups", said)
    else:
        remedy = "look whether that is so; else --group-pattern 'REGEX', or '' where each video stands alone"
        yield Finding("note", "groups", said, remedy)


def describe_splits(found: FoundVideos, division: Division) -> Iterator[Finding]:
    """How many clips of which class each split has; what it lacks."""
    for split in sorted(division.counts, key=lambda s: SPLITS.index(s) if s in SPLITS else len(SPLITS)):
        counts = division.counts[split]
        clips = division.clips(split)
        if not found.labelled:
            yield Finding("ok", split, f"{clips} videos")
            continue
        said = f"{clips} videos, {min(counts)} to {max(counts)} a class"
        empty = [found.classes[label] for label, count in enumerate(counts) if not count]
        if empty:
            yield Finding("note", split, f"{said}; none of {_some(empty)}", _cure_of_lack(split))
        elif split == "test" and min(counts) < FEW_TESTED:
            yield Finding(
                "note", split, said, f"a clip is up to {100 / min(counts):.0f} % of a class's accuracy"
            )
        else:
            yield Finding("ok", split, said)
    for split in division.lacking:
        if split not in division.counts:
            yield Finding("fail", split, "has no videos", _cure_of_lack(split))


def _cure_of_lack(split: str) -> str:
    if split == "val":
        return "these classes have too few groups; the best step is chosen without them, so trust the last one more"
    return f"these classes have too few groups: add recordings, or say in `splits.groups` which go to {split}"


def describe_copies(found: FoundVideos, looks: Looks, splits: Sequence[str]) -> Iterator[Finding]:
    """The same file twice, and videos that look alike: within a split, across splits, under two labels."""
    if not looks.all_hashed:
        yield Finding(
            "note", "copies", "not all files of one size were compared", "`cliplift shard` compares all"
        )
    rows = (
        ("copies", looks.same, "the same file", "`duplicates: remove_exact` in the shards keeps one, not in training"),
        ("near-duplicates", looks.alike, "look alike", "look at them; `duplicates: remove` in the shards keeps one"),
    )  # fmt: skip
    for subject, pairs, words, cure in rows:
        across = [pair for pair in pairs if splits[pair[0]] != splits[pair[1]]]
        labels = [pair for pair in pairs if found.videos[pair[0]].label != found.videos[pair[1]].label]
        if across:
            named = [_pair(found, pair, splits) for pair in across]
            said = f"{LEAK}{len(across)} pairs {words} and are in different splits: {_some(named)}"
            yield Finding("note", subject, said, f"{cure}, or put both in one group")
        elif pairs:
            yield Finding(
                "note",
                subject,
                f"{len(pairs)} pairs {words}: {_some([_pair(found, p) for p in pairs])}",
                cure,
            )
        if labels:
            named = [_pair(found, pair) for pair in labels]
            yield Finding("note", "labels", f"{len(labels)} pairs {words} and have different labels: {_some(named)}",
                          "look whether one is labelled wrongly; clips of a fixed camera are alike too")  # fmt: skip
    if not looks.same and not looks.alike:
        yield Finding("ok", "copies", "none found among those looked at")


def _pair(found: FoundVideos, pair: tuple[int, int], splits: Sequence[str] | None = None) -> str:
    a, b = (found.videos[number].source for number in pair)
    return f"{a} = {b}" if splits is None else f"{a} ({splits[pair[0]]}) = {b} ({splits[pair[1]]})"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"
