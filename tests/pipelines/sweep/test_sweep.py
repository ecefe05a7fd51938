"""A sweep from start to end with runs that take no time: what is run, kept, left to other parts, and chosen."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml

from cliplift.configs.load import load_run
from cliplift.configs.runs import TRAINING
from cliplift.configs.sections import ConfigError
from cliplift.configs.sweeps import SweepRun
from cliplift.configs.training import TrainingRun
from cliplift.launch.cli import main
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.engine.faults import DivergedError
from cliplift.pipelines.runs.folder import write_json
from cliplift.pipelines.runs.sweeps import read_sweep
from cliplift.pipelines.runs.tracking import start_wandb
from cliplift.pipelines.stages.run import StageResult
from cliplift.pipelines.sweep import run as sweeping
from cliplift.pipelines.sweep.run import Sweep, plan_sweep, run_sweep
from cliplift.pipelines.sweep.wandb_file import wandb_sweep

LRS = [0.1, 0.001, 0.01, 1.0]  # the nearer to 0.01, the better; 1.0 diverges


class Trainer:
    """In place of training: a run's validation accuracy follows from its learning rate and its steps."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.stop_at: str | None = None
        self.root = Path()

    def __call__(self, run: TrainingRun, *, command: Sequence[str]) -> StageResult:
        folder = Path(run.output)
        self.started.append(folder.relative_to(self.root).as_posix())
        if self.started[-1] == self.stop_at:
            self.stop_at = None
            return StageResult(folder, finished=False, requeue=True)
        lr = run.optim.lr
        if lr == 1.0:
            raise DivergedError("10 bad steps in a row")
        score = 0.5 - abs(lr - 0.01) + (run.schedule.steps or 0) / 1e5
        metrics = {"val_accuracy": score, "val_loss": 1 - score, "accuracy": 1 - score}
        folder.mkdir(parents=True)
        write_json(folder / "result.json", {"metrics": metrics})
        return StageResult(folder, metrics)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trainer:
    found = Trainer()
    found.root = tmp_path / "sweep"
    alone = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    monkeypatch.setattr(sweeping, "run_all", found)
    monkeypatch.setattr(sweeping, "start", lambda _: alone)
    return found


@pytest.fixture
def load(repository: Path) -> Callable[[Sequence[str]], TrainingRun]:
    recipe = repository / "configs" / "finetune" / "demo_scratch.yaml"
    more = ["data.shards=anywhere", "schedule.steps=90"]
    return lambda words: load_run(recipe, TRAINING, [*more, *words]).run


@pytest.fixture
def plan(tmp_path: Path, load: Callable[[Sequence[str]], TrainingRun]) -> Callable[..., Sweep]:
    def made(**changes: object) -> Sweep:
        tree = {"name": "s", "output": str(tmp_path / "sweep"), "run": "finetune/demo_scratch"}
        tree |= {"parameters": {"optim.lr": LRS}}  # type: ignore[dict-item]
        return plan_sweep(SweepRun.model_validate(tree | changes), load)

    return made


def test_a_grid_runs_everything_and_the_test_split_is_never_seen(
    plan: Callable[..., Sweep], trainer: Trainer
) -> None:
    sweep = plan()
    said: list[str] = []
    result = run_sweep(sweep, command=["cliplift"], say=said.append)
    assert result.finished
    assert trainer.started == [f"trial{k:03d}" for k in range(4)]
    best = result.record.best_first()
    assert [run.values["optim.lr"] for run in best] == [
        0.01,
        0.001,
        0.1,
    ]  # by validation; accuracy says the contrary
    assert [run.failed for run in result.record.runs] == ["", "", "", "10 bad steps in a row"]
    assert read_sweep(trainer.root) == result.record
    assert "s: trial 2 of 4: optim.lr=0.01" in said
    assert "s-trial002: validation accuracy 50.1 %" in said
    for run in sweep.runs.values():
        assert run.test_split == run.data.val_split != "test"  # type: ignore[attr-defined]
        assert run.track.group == "s"


def test_a_stopped_sweep_goes_on_with_the_run_it_stopped_in(
    plan: Callable[..., Sweep], trainer: Trainer
) -> None:
    trainer.stop_at = "trial001"
    first = run_sweep(plan(), command=[], say=lambda _: None)
    assert (first.finished, first.requeue, len(first.record.runs)) == (False, True, 0 + 1)
    assert run_sweep(plan(), command=[], say=lambda _: None).finished
    assert trainer.started == ["trial000", "trial001", "trial001", "trial002", "trial003"]
    assert run_sweep(plan(), command=[], say=lambda _: None).finished
    assert len(trainer.started) == 5  # nothing is run twice, not even what diverged


def test_halving_gives_more_steps_to_the_better_ones(plan: Callable[..., Sweep], trainer: Trainer) -> None:
    sweep = plan(
        method="halving", trials=9, least_steps=10, parameters={"optim.lr": {"low": 0.001, "high": 0.5}}
    )
    result = run_sweep(sweep, command=[], say=lambda _: None)
    lrs = [values["optim.lr"] for values in sweep.trials]
    nearest = sorted(range(9), key=lambda k: abs(lrs[k] - 0.01))  # type: ignore[operator]
    by_rung = {
        steps: sorted(int(name[5:8]) for name in trainer.started if name.endswith(f"steps{steps}"))
        for steps in (10, 30, 90)
    }
    assert by_rung == {10: list(range(9)), 30: sorted(nearest[:3]), 90: nearest[:1]}
    assert result.finished
    ranked = result.record.best_first()
    assert [run.trial for run in ranked[:3]] == nearest[:3]  # more steps first, then the metric
    assert [run.steps for run in ranked] == [90, 30, 30, *[10] * 6]


def test_parts_together_are_the_whole(plan: Callable[..., Sweep], trainer: Trainer) -> None:
    sweep = plan(
        method="halving", trials=9, least_steps=10, parameters={"optim.lr": {"low": 0.001, "high": 0.5}}
    )
    assert sweep.rungs == 3
    for rung in range(3):
        results = [run_sweep(sweep, command=[], part=(i, 4), say=lambda _: None) for i in range(4)]
        assert results[-1].finished == (rung == 2)
        assert not results[0].finished or rung == 2
    assert len(trainer.started) == len(set(trainer.started)) == 9 + 3 + 1
    alone = read_sweep(trainer.root)
    assert alone is not None
    assert run_sweep(sweep, command=[], say=lambda _: None).record == alone
    assert len(trainer.started) == 13


def test_another_metric_and_its_goal(plan: Callable[..., Sweep], trainer: Trainer) -> None:
    assert not plan(metric="loss").maximise
    assert plan(metric="loss", goal="maximise").maximise
    best = run_sweep(plan(metric="loss"), command=[], say=lambda _: None).record.best_first()
    assert best[0].values["optim.lr"] == 0.01
    with pytest.raises(ConfigError, match="has no 'f1'; it has accuracy, loss") as error:
        run_sweep(plan(metric="f1"), command=[], say=lambda _: None)
    assert error.value.key == "metric"


def test_halving_needs_steps_to_divide(plan: Callable[..., Sweep]) -> None:
    halving = {"method": "halving", "trials": 4, "least_steps": 10}
    with pytest.raises(ConfigError, match="says epochs") as error:
        plan(**halving, overrides=["schedule.steps=null", "schedule.epochs=2"])
    assert error.value.key == "method"
    with pytest.raises(ConfigError, match="above the 90 steps"):
        plan(**halving | {"least_steps": 91})


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("optim.lrr", [0.1], "optim.lrr: unknown key (value 0.1); did you mean 'optim.lr'?"),
        ("optim.lr", [0.1, "fast"], "optim.lr: 'fast'"),
        ("optim.weight_decay", [-1], "optim.weight_decay: -1"),
    ],
)
def test_a_parameter_that_is_none_is_named_before_anything_starts(
    tmp_path: Path, key: str, values: list[object], said: str
) -> None:
    file = tmp_path / "sweep.yaml"
    tree = {"stage": "sweep", "name": "s", "output": str(tmp_path / "out"), "run": "finetune/demo_scratch"}
    file.write_text(yaml.safe_dump(tree | {"parameters": {key: values}}))
    errors = io.StringIO()
    with redirect_stderr(errors):
        assert main(["sweep", str(file)]) == 2
    (line,) = errors.getvalue().splitlines()
    assert line.startswith(f"cliplift: {file}: {said}")
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(tmp_path: Path, trainer: Trainer) -> None:
    base = {"base": "finetune/demo_scratch", "data": {"shards": "anywhere"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(base))
    file = tmp_path / "sweep.yaml"
    tree = {"stage": "sweep", "name": "s", "output": str(trainer.root), "run": "mine.yaml"}
    file.write_text(yaml.safe_dump(tree | {"parameters": {"optim.lr": LRS[:3]}}))
    said = io.StringIO()
    with redirect_stdout(said):
        assert main(["sweep", str(file), "--dry-run"]) == 0
    assert "# trial 2: optim.lr=0.01" in said.getvalue()
    assert trainer.started == []
    said = io.StringIO()
    with redirect_stdout(said):
        assert main(["sweep", str(file), "--json"]) == 0
    found = json.loads(said.getvalue())
    assert found["finished"] is True
    assert [row["trial"] for row in found["runs"]] == [0, 1, 2]
    said = io.StringIO()
    with redirect_stdout(said):
        assert main(["sweep", str(file), "--part", "0/2"]) == 0
    assert f"best, on validation data: {trainer.root}/trial002" in said.getvalue()
    assert len(trainer.started) == 3


def test_the_file_for_wandb_runs_what_an_agent_makes_of_it(
    plan: Callable[..., Sweep], load: Callable[[Sequence[str]], TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words are put together by W&B's own code, as its agent does."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    parameters = {
        "optim.lr": {"low": 1e-4, "high": 0.1, "scale": "log"},
        "data.augment.flip": [True, False],
        "model.pretrained": [None],
        "engine.global_batch": {"low": 8, "high": 16, "whole": True},
    }
    sweep = plan(method="random", trials=7, parameters=parameters)
    tree = yaml.safe_load(wandb_sweep(sweep, load([]), config_file="finetune/demo_scratch"))
    assert (tree["method"], tree["run_cap"]) == ("random", 7)
    assert tree["metric"] == {"name": "eval/accuracy", "goal": "maximize"}
    assert tree["parameters"]["optim.lr"] == {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1}
    assert tree["parameters"]["engine.global_batch"] == {"distribution": "int_uniform", "min": 8, "max": 16}
    chosen = {
        "optim.lr": 0.003,
        "data.augment.flip": False,
        "model.pretrained": "null",
        "engine.global_batch": 12,
    }
    assert chosen["model.pretrained"] in tree["parameters"]["model.pretrained"]["values"]
    args = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    command = utils.create_sweep_command(list(tree["command"]))
    words = [
        word
        for part in command
        for word in (args["args_no_hyphens"] if part == "${args_no_hyphens}" else [part])
    ]
    assert words[:4] == ["${env}", "cliplift", "finetune", "finetune/demo_scratch"]
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    run = load(words[4:])
    assert (run.optim.lr, run.data.augment.flip, run.model.pretrained) == (0.003, False, None)
    assert run.engine.global_batch == 12
    assert run.output.endswith("sweep/abc123")
    assert run.test_split == run.data.val_split  # type: ignore[attr-defined]
    hyperband = plan(method="hyperband", least_steps=10, parameters={"optim.lr": parameters["optim.lr"]})
    tree = yaml.safe_load(wandb_sweep(hyperband, load(["evaluation.every_steps=5"]), config_file="x"))
    assert tree["early_terminate"] == {"type": "hyperband", "min_iter": 2, "eta": 3}


def test_a_run_of_an_agent_is_the_one_that_wandb_chose(
    load: Callable[[Sequence[str]], TrainingRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    asked: dict[str, object] = {}

    class Started:
        def define_metric(self, *_: object, **__: object) -> None: ...

    monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or Started())
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    run = load(["track.wandb=offline"])
    start_wandb(run, stage="finetune", folder=tmp_path)
    assert asked["id"] != "abc123"  # a variable left behind is no sweep
    (tmp_path / "wandb.json").unlink()
    monkeypatch.setenv("WANDB_SWEEP_ID", "team/project/sweep")
    start_wandb(run, stage="finetune", folder=tmp_path)
    assert (asked["id"], asked["name"]) == ("abc123", None)
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] == "abc123"
