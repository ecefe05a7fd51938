"""One row of ``cliplift check`` and ``cliplift doctor``, and the table they print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    ``note`` is for what works but should be known; ``fail`` for what cannot work, and then ``remedy`` says what to
    change, with the number.
    """

    status: Status
    subject: str
    found: str
    remedy: str = ""


def table(findings: Sequence[Finding]) -> str:
    """The findings as one table, in order; a remedy stands behind what was found."""
    width = max(len(f.subject) for f in findings)
    lines = []
    for finding in findings:
        text = f"{finding.found}: {finding.remedy}" if finding.remedy else finding.found
        lines.append(f"{finding.status:4}  {finding.subject.ljust(width)}  {text}")
    failed = sum(f.status == "fail" for f in findings)
    notes = sum(f.status == "note" for f in findings)
    lines.append(f"{len(findings)} looked at, {failed} failed, {notes} to note")
    return "\n".join(lines)


def exit_code(findings: Sequence[Finding]) -> int:
    """0 when nothing failed, else 1."""
    return int(any(f.status == "fail" for f in findings))
