"""``cliplift doctor --compile``: one graph is said to be one, and a break is named with its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.launch.check.findings import table
from cliplift.launch.check.graph_breaks import find_graph_breaks
from cliplift.launch.cli import main
from cliplift.pipelines.stages.classification import Classifier

WORDS = [
    "model.name=convlstm",
    "data.sampling.frames=3",
    "data.crop_pixels=32",
    "data.resize_short_side_pixels=32",
]


@pytest.mark.slow
def test_one_graph(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--compile", "pretrain/demo", *WORDS]) == 0
    assert "convlstm with its loss is one graph" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_break_is_named_with_its_place(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Classifier.forward

    def broken(self: Classifier, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = whole(self, inputs)
        torch._dynamo.graph_break()
        return {**outputs, "loss": outputs["loss"] * 2}

    monkeypatch.setattr(Classifier, "forward", broken)
    run = load_run(repository / "configs/pretrain/demo.yaml", RUNS, WORDS).run
    first, second = find_graph_breaks(run)
    assert "is 2 graphs" in first.found, table([first, second])
    assert f"{Path(__file__).name}:" in second.found
    assert "in broken" in second.found
