"""``cliplift doctor --compile CONFIG``: where torch.compile would leave the graph of a run's module. Reads no data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cliplift.configs.training import TrainingRun
from cliplift.launch.check.findings import Finding
from cliplift.pipelines.engine.task import as_trained
from cliplift.pipelines.stages.run import check_model, stage_of

CLASSES = 10  # of a network that predicts classes: their number breaks no graph
CLIPS = 2


def find_graph_breaks(run: TrainingRun) -> Iterator[Finding]:
    """The graphs of the run's module with its loss, and every place where one ends before its end.

    The module is traced on the meta device: nothing is allocated, no data are read, and no backend compiles.

    Raises:
        ConfigError, ModelError: the run cannot work as configured.
    """
    check_model(run)
    stage = stage_of(run, classes=[str(label) for label in range(CLASSES)])
    with torch.device("meta"):
        built = stage.build_module(weights=False)
        module = as_trained(built, run)
        inputs: dict[str, Tensor] = stage.example_inputs(built, micro_batch=CLIPS, world_size=1)
    torch._dynamo.reset()
    found = torch._dynamo.explain(module)(inputs)
    torch._dynamo.reset()
    name = run.model.name
    if not found.graph_break_count:
        yield Finding("ok", "compile", f"{name} with its loss is one graph; engine.compile: model or blocks")
        return
    yield Finding("note", "compile", f"{name} with its loss is {found.graph_count} graphs")
    for number, reason in enumerate(found.break_reasons, start=1):
        last = reason.user_stack[-1] if reason.user_stack else None
        place = f"{Path(last.filename).name}:{last.lineno}, in {last.name}" if last else "unknown place"
        text = str(reason.reason).strip().splitlines()[0][:160]
        yield Finding("note", f"graph break {number}", f"{place}: {text}", "")
