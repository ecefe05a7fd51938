"""The table of ``cliplift models``: everything in it is measured when it is printed."""

from __future__ import annotations

from cliplift.configs.sections import ConfigError
from cliplift.models import list_models
from cliplift.models.measure import measure_model
from cliplift.models.registry import model_entry

HEADER = ("model", "dims", "classes", "parameters", "input", "GMACs", "features", "paper")


def zoo_table(pattern: str, *, markdown: bool) -> str:
    """One row a model that matches the pattern. Raises ConfigError when none does."""
    names = list_models(pattern)
    if not names:
        raise ConfigError(
            f"no model matches {pattern!r}", file="command line", hint="`cliplift models` lists all of them"
        )
    rows = [HEADER, *(_row(name) for name in names)]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + " --- |" * len(HEADER), *lines[1:]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(name: str) -> tuple[str, ...]:
    entry = model_entry(name)
    facts = measure_model(name)
    return (
        name,
        entry.dims,
        str(entry.default_classes),
        f"{facts.parameters:,}",
        "x".join(map(str, facts.input_shape)),
        f"{facts.gmacs:.2f}",
        str(facts.feature_dim),
        entry.paper,
    )
