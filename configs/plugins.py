"""Names the schema takes that are not fixed when it is written: the rows of this package, then those of plug-ins.

``cliplift.launch.plugins`` adds a row for each plug-in before a config is read. Nothing in a config, a shard or a
checkpoint can add one.
"""

from __future__ import annotations

import difflib
from typing import Annotated

from pydantic import AfterValidator

from cliplift.configs.sections import ConfigError

# Objectives of `cliplift pretrain`; `pipelines/stages/run.py` holds the stage of each.
OBJECTIVES: set[str] = {"classification", "forecast"}


def _known_objective(name: str) -> str:
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1)
        names = ", ".join(sorted(OBJECTIVES))
        raise ConfigError(
            f"{name!r} is not an objective",
            value=name,
            hint=f"did you mean {near[0]!r}?" if near else f"it must be one of {names}",
        )
    return name


ObjectiveName = Annotated[str, AfterValidator(_known_objective)]
