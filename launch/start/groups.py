"""What belongs together by the names of the files: one camera, person or recording must not be in two splits.

A rule is proposed only if it reads a group from every name and finds more than one group and fewer than files. Rules
are tried from the most telling to the vaguest, and the first that holds is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WORDS = "cam|camera|person|subject|subj|actor|user|participant|patient|scene|room|site|session|recording"
END = r"\.[^./]+$"
MOST_NAMED_CLASSES = 50  # written out in a pattern


@dataclass(frozen=True)
class GroupRule:
    """A ``group_pattern``, what it was recognised as, and the group of every video."""

    pattern: str
    said: str
    groups: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many groups there are."""
        return len(set(self.groups))


def propose_groups(paths: Sequence[str], labels: Sequence[str | None]) -> GroupRule | None:
    """The most telling rule that fits all names.

    Args:
        paths: of the videos, below the root of their source.
        labels: class name of each, None without one.
    """
    for pattern, said in _rules(paths, labels):
        rule = read_groups(paths, pattern, said)
        if rule is not None and not _is_the_class(rule.groups, labels):
            return rule
    return None


def read_groups(paths: Sequence[str], pattern: str, said: str) -> GroupRule | None:
    """The groups that a pattern reads; None unless it fits all names, with several groups and not one a file."""
    expression = re.compile(pattern)
    groups = []
    for path in paths:
        match = expression.search(path)
        if match is None or not match.group(1):
            return None
        groups.append(match.group(1))
    if not 1 < len(set(groups)) < len(groups):
        return None
    return GroupRule(pattern, said, tuple(groups))


def _is_the_class(groups: Sequence[str], labels: Sequence[str | None]) -> bool:
    """Whether the groups say no more than the class: one for each."""
    pairs = set(zip(groups, labels, strict=True))
    return len(set(labels)) > 1 and len(pairs) == len(set(groups)) == len(set(labels))


def _rules(paths: Sequence[str], labels: Sequence[str | None]) -> Iterator[tuple[str, str]]:
    prefix, named = _class_prefix(paths, labels)
    if all(path.count("/") > 1 for path in paths):
        yield r"^[^/]+/([^/]+)/", "the folder below the class folder"
    yield rf"_(g\d+)_c\d+{END}", "gNN_cNN, as in UCF101: the NN after g"
    yield rf"(?:^|/)([\w-]{{11}})_\d{{6}}_\d{{6}}{END}", "ID_SSSSSS_EEEEEE, as in Kinetics: the id"
    yield (
        rf"(?:^|/){prefix}((?:[^/]*?[_-])?(?i:{WORDS})[_-]?\d+)(?=[_.-])[^/]*$",
        "a camera, person, scene or session with a number, and what stands before it",
    )
    if named and not prefix:
        yield rf"(?:^|/)([^/]+?)[_-](?:{named})[_-][^/]*$", "what stands before the name of the class"
    yield rf"(?:^|/)[^/]*[_-](\d+)[_-]\d+{END}", "the last but one number of the name, as in CLASS_GROUP_TAKE"
    yield rf"(?:^|/){prefix}([^/]+)[_-][^/_-]+{END}", "the name up to its last _ or -"


def _class_prefix(paths: Sequence[str], labels: Sequence[str | None]) -> tuple[str, str]:
    """A pattern of the class that begins every name, if one does; and the classes as alternatives, if they are few.

    Without the prefix a camera that saw two classes would be two groups.
    """
    names = sorted({label for label in labels if label}, key=lambda name: (-len(name), name))
    if not names or len(names) > MOST_NAMED_CLASSES or None in labels:
        return "", ""
    named = "|".join(map(re.escape, names))
    begins = re.compile(rf"(?:{named})[_-]")
    whole = all(begins.match(path.rpartition("/")[2]) for path in paths)
    return (rf"(?:{named})[_-]" if whole else ""), named


def sizes(groups: Sequence[str]) -> str:
    """The largest groups in words."""
    most = Counter(groups).most_common(4)
    shown = ", ".join(f"{group} {count}" for group, count in most)
    return shown if len(set(groups)) <= len(most) else f"{shown}, ..."
