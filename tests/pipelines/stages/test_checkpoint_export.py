"""A checkpoint as an export folder, and weights in several files, read by everything that reads weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cliplift.configs.runs import ExportRun
from cliplift.configs.sections import ConfigError
from cliplift.launch.cli import main
from cliplift.models import from_pretrained, save_pretrained
from cliplift.models.factory import read_config
from cliplift.models.weight_files import INDEX, weight_files
from cliplift.pipelines.evaluation.evaluate import load_finished
from cliplift.pipelines.evaluation.export import run_export
from cliplift.pipelines.stages import checkpoint_export
from cliplift.pipelines.stages.checkpoint_export import export_checkpoint, is_checkpoint
from cliplift.pipelines.stages.starting_weights import initialise_from


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("run", ["finetuned", "transferred"])
def test_the_checkpoint_of_the_result_gives_the_result(
    run: str, finetuned: Path, transferred: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the data, since the run's record has the classes, and through the command line."""
    folder = {"finetuned": finetuned, "transferred": transferred}[run]
    monkeypatch.setattr(checkpoint_export, "read_classes", None)
    best = [*folder.glob("checkpoints/best/step_*")] or sorted(folder.glob("checkpoints/step_*"))
    assert is_checkpoint(best[-1])
    assert main(["export", str(best[-1]), str(tmp_path / "out")]) == 0
    assert same(
        load_file(tmp_path / "out/model.safetensors"), load_file(folder / "weights/model.safetensors")
    )
    config, expected = read_config(tmp_path / "out"), read_config(folder / "weights")
    assert config["extra"].pop("step") == int(best[-1].name[5:])
    assert config == expected
    assert (tmp_path / "out/README.md").is_file()
    assert (tmp_path / "out/run.yaml").read_text() == (folder / "config.yaml").read_text()


def test_the_classes_come_from_the_data_where_the_record_lacks_them(finetuned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (last,) = sorted(finetuned.glob("checkpoints/step_*"))[-1:]
    shutil.copytree(last, run / "checkpoints" / last.name)
    shutil.copyfile(finetuned / "config.yaml", run / "config.yaml")
    export = export_checkpoint(
        ExportRun(run=str(run / "checkpoints" / last.name), output=str(tmp_path / "out"))
    )
    assert read_config(export)["extra"]["classes"] == read_config(finetuned / "weights")["extra"]["classes"]
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no config\.yaml above") as caught:
        export_checkpoint(ExportRun(run=str(run / "checkpoints" / last.name), output=str(tmp_path / "o")))
    assert caught.value.key == "run"


def test_a_damaged_checkpoint_is_not_exported(finetuned: Path, tmp_path: Path) -> None:
    (last,) = sorted(finetuned.glob("checkpoints/step_*"))[-1:]
    path = shutil.copytree(last, tmp_path / last.name)
    file = path / "parameters-rank0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"parameters-rank0\.safetensors differs from what was written"):
        export_checkpoint(ExportRun(run=str(path), output=str(tmp_path / "o")))
    assert not (tmp_path / "o").exists()


def test_weights_in_several_files_are_read_as_one(finetuned: Path, tmp_path: Path) -> None:
    """By export, evaluate, predict (both ``load_finished``) and ``initialise_from``."""
    network = from_pretrained(finetuned / "weights")
    config = read_config(finetuned / "weights")
    run = tmp_path / "run"
    shutil.copytree(finetuned, run, ignore=shutil.ignore_patterns("weights", "wandb", "checkpoints"))
    save_pretrained(network, run / "weights", name=config["name"], options=config["options"],
                    extra=config["extra"], max_file_bytes=200_000)  # fmt: skip
    assert len(weight_files(run / "weights")) > 2
    state = network.state_dict()
    export = run_export(ExportRun(run=str(run), output=str(tmp_path / "export")))
    assert (export / INDEX).is_file()
    for folder in (run, export):
        assert same(load_finished(str(folder))[0].state_dict(), state)
        fresh = from_pretrained(finetuned / "weights", num_classes=2)
        for parameter in fresh.parameters():
            torch.nn.init.zeros_(parameter)
        initialise_from(fresh, str(folder))
        body = {n: v for n, v in fresh.state_dict().items() if not n.startswith("classifier.")}
        assert same(body, {n: v for n, v in state.items() if not n.startswith("classifier.")})


@pytest.mark.slow
def test_an_average_is_exported_where_there_is_one(load: Callable[..., Any], tmp_path: Path) -> None:
    from cliplift.pipelines.stages.run import run_stage

    run = load("pretrain/demo", "averaged", "schedule.steps=3", "evaluation.every_steps=null",
               "optim.average_decay=0.9", "engine.zero_stage=3", "checkpoint.keep_best=false")  # fmt: skip
    folder = run_stage(run, command=[]).folder
    checkpoint = folder / "checkpoints/step_00000003"
    export = export_checkpoint(ExportRun(run=str(checkpoint), output=str(tmp_path / "out")))
    weights = load_file(export / "model.safetensors")
    assert same(weights, load_file(folder / "weights/model.safetensors"))
    plain = load_file(checkpoint / "parameters-rank0.safetensors")
    assert any(not torch.equal(plain[f"network.{n}"], v.flatten()) for n, v in weights.items() if "conv" in n)
    assert json.loads((folder / "run.json").read_text())["classes"] == read_config(export)["extra"]["classes"]
