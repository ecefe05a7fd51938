"""The table of a mutation run, and its survivors with their diffs."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Tested(Protocol):
    """What the report reads of a result."""

    @property
    def module(self) -> str: ...
    @property
    def mutant(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def line(self) -> int: ...
    @property
    def outcome(self) -> str: ...
    @property
    def diff(self) -> str: ...


@dataclass(frozen=True)
class Equivalent:
    """A change that leaves every result as it was, so that no test can notice it."""

    before: str
    after: str
    reason: str


def equivalents(folder: Path) -> dict[str, list[Equivalent]]:
    """Module name -> its known equivalent mutants, from equivalent.toml."""
    path = folder / "equivalent.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {
        name: [Equivalent(row["before"].strip(), row["after"].strip(), row["reason"]) for row in rows]
        for name, rows in table.items()
    }


def changed_lines(diff: str) -> tuple[str, str]:
    """The line taken out and the line put in by a diff without context."""
    lines = diff.splitlines()[3:]
    gone = " ".join(line[1:].strip() for line in lines if line.startswith("-"))
    come = " ".join(line[1:].strip() for line in lines if line.startswith("+"))
    return gone, come


def summary(results: Mapping[str, Mapping[str, Tested]], folder: Path, here: Path) -> str:
    """Markdown: one row a module, then what survived. Equivalent mutants are left out of the share."""
    known = equivalents(here)
    rows = [
        "| module | mutants | tested | killed | timeout | equivalent | survived | killed, % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    survivors: list[str] = []
    total: Counter[str] = Counter()
    for name, found in results.items():
        listing = folder / f"{name}.sample.json"
        if not listing.exists():
            continue
        drawn = json.loads(listing.read_text(encoding="utf-8"))
        tested = [found[mutant] for mutant in drawn["sample"] if mutant in found]
        pairs = {(e.before, e.after) for e in known.get(name, ())}
        counts: Counter[str] = Counter({"all": drawn["all"], "tested": len(tested)})
        for result in tested:
            alike = result.outcome == "survived" and changed_lines(result.diff) in pairs
            counts["equivalent" if alike else result.outcome] += 1
            if result.outcome == "survived" and not alike:
                survivors.append(f"{result.file}:{result.line} ({result.mutant})\n{_indented(result.diff)}")
        total.update(counts)
        rows.append(_row(name, counts))
    rows.append(_row("all", total))
    return "\n".join(rows) + "\n\n" + ("\n\n".join(survivors) or "No survivors.") + "\n"


def _row(name: str, counts: Counter[str]) -> str:
    judged = counts["tested"] - counts["equivalent"]
    share = f"{100 * (counts['killed'] + counts['timeout']) / judged:.0f}" if judged else "-"
    columns = ("all", "tested", "killed", "timeout", "equivalent", "survived")
    return f"| {name} | {' | '.join(str(counts[c]) for c in columns)} | {share} |"


def _indented(diff: str) -> str:
    return "\n".join("    " + line for line in diff.splitlines()[3:])
