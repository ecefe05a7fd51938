"""Configs: YAML as users expect it, inheritance, overrides, and one-sentence errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cliplift.configs.load import dump_run, load_run
from cliplift.configs.runs import RUNS, FinetuneRun, TransferRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.yaml_text import RunLoader

TRANSFER = """
stage: transfer
name: t
output: out
data:
  shards: shards/a
model: {name: t3d_tiny}
schedule: {steps: 10}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TRANSFER)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(path, RUNS, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_minimal_file_loads_with_defaults(config: Path) -> None:
    run = load_run(config, RUNS).run
    assert isinstance(run, TransferRun)
    assert run.data.shards == ("shards/a",)
    assert run.engine.global_batch == 32


def test_the_resolved_config_loads_to_an_equal_run(config: Path, tmp_path: Path) -> None:
    run = load_run(config, RUNS, ["optim.lr=3e-4", "data.augment.flip_label_pairs=[[left, right]]"]).run
    again = tmp_path / "again.yaml"
    again.write_text(dump_run(run))
    assert load_run(again, RUNS).run == run


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", ".3e-3", "0.0003", "3E-4"])
def test_scientific_notation_is_a_float(config: Path, text: str) -> None:
    assert load_run(config, RUNS, [f"optim.lr={text}"]).run.optim.lr == pytest.approx(3e-4)
    config.write_text(TRANSFER + f"optim: {{lr: {text}}}\n")
    assert load_run(config, RUNS).run.optim.lr == pytest.approx(3e-4)


@pytest.mark.parametrize("word", ["no", "off", "on", "yes", "12:30", "0o7", "1e"])
def test_words_that_yaml_1_1_reads_as_something_else_stay_strings(config: Path, word: str) -> None:
    assert load_run(config, RUNS, [f"name={word}"]).run.name == word


def test_the_error_names_file_key_value_and_nearest_key(config: Path) -> None:
    config.write_text(
        TRANSFER.replace("schedule:", "optim: {learning_rat: 0.1, wieght_decay: 0.2}\nschedule:")
    )
    text = error_of(config)
    assert str(config) in text
    assert "optim.learning_rat" in text or "optim.wieght_decay" in text
    config.write_text(TRANSFER.replace("schedule:", "optim: {wieght_decay: 0.2}\nschedule:"))
    text = error_of(config)
    assert "optim.wieght_decay" in text
    assert "0.2" in text
    assert "did you mean 'optim.weight_decay'?" in text


def test_a_key_in_the_wrong_section_is_found(config: Path) -> None:
    assert "did you mean 'data.crop_pixels'?" in error_of(config, "crop_pixels=64")
    assert "did you mean 'engine.global_batch'?" in error_of(config, "optim.global_batch=64")


def test_a_typo_explains_the_missing_key(config: Path) -> None:
    config.write_text(TRANSFER.replace("model:", "modell:"))
    assert "did you mean 'model'?" in error_of(config)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("engine.global_batch=many", "engine.global_batch"),
        ("optim.lr=-1", "optim.lr"),
        ("optim.lr=.nan", "optim.lr"),
        ("engine.precision=fp64", "engine.precision"),
        ("data.shards=[]", "data.shards"),
        ("schedule.epochs=3", "schedule.steps"),
        ("engine.micro_batch=5", "engine.micro_batch"),
        ("correspondence.negatives_per_clip=32", "correspondence.negatives_per_clip"),
        ("teacher.frames=99", "teacher.frames"),
        ("data.resize_short_side_pixels=100", "data.resize_short_side_pixels"),
        ("engine.deepspeed={optimizer: {type: Adam}}", "engine.deepspeed.optimizer"),
        ("data.augment.scale=[1.0, 0.5]", "data.augment.scale"),
    ],
)
def test_wrong_types_and_impossible_combinations(config: Path, override: str, key: str) -> None:
    text = error_of(config, override)
    assert key in text, text
    assert str(config) in text or "command line" in text


def test_bf16_without_partitioned_optimizer_is_refused_with_the_way_out(config: Path) -> None:
    text = error_of(config, "engine.precision=bf16", "engine.zero_stage=0")
    assert "engine.zero_stage" in text
    assert "zero_stage: 1" in text


def test_base_files_merge_and_the_error_names_the_file_at_fault(tmp_path: Path, config: Path) -> None:
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "child.yaml"
    child.write_text("base: ../run.yaml\noptim: {lr: 0.5}\ndata: {crop_pixels: 64}\n")
    run = load_run(child, RUNS).run
    assert (run.optim.lr, run.data.crop_pixels, run.data.shards) == (0.5, 64, ("shards/a",))
    config.write_text(TRANSFER + "optim: {lr: fast}\n")
    child.write_text("base: ../run.yaml\n")
    assert "run.yaml: optim.lr" in error_of(child)


def test_a_packaged_recipe_can_be_a_base(tmp_path: Path) -> None:
    child = tmp_path / "mine.yaml"
    child.write_text("base: transfer/demo\nname: mine\n")
    run = load_run(child, RUNS).run
    assert (run.name, run.model.name) == ("mine", "t3d_tiny")
    child.write_text("base: transfer/dema\n")
    assert "no such config file" in error_of(child)


def test_a_list_of_bases_and_a_circle(tmp_path: Path, config: Path) -> None:
    (tmp_path / "more.yaml").write_text("seed: 7\n")
    child = tmp_path / "child.yaml"
    child.write_text("base: [run.yaml, more.yaml]\nname: c\n")
    assert load_run(child, RUNS).run.seed == 7
    (tmp_path / "more.yaml").write_text("base: child.yaml\n")
    assert "circle" in error_of(child)


def test_another_kind_replaces_the_section_below(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(
        "stage: shard\nname: s\noutput: o\nsource: {kind: folder, root: r, layout: flat}\n"
    )
    child = tmp_path / "child.yaml"
    child.write_text("base: below.yaml\nsource: {kind: csv, file: list.csv}\n")
    assert load_run(child, RUNS).run.source.file == "list.csv"


def test_unions_are_reported_by_the_key_as_written(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("stage: shard\nname: s\noutput: o\nsource: {kind: folder, rot: videos}\n")
    text = error_of(path)
    assert "source.rot" in text
    assert "did you mean 'source.root'?" in text
    path.write_text("stage: shard\nname: s\noutput: o\nsource: {kind: foldr, root: videos}\n")
    assert "source" in error_of(path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1,\n", "not valid YAML"),
        ("- 1\n", "must hold keys and values"),
        ("stage: transfer\nstage: transfer\n", "written twice"),
        ("name: x\n", "stage"),
        ("stage: tranfer\n", "did you mean 'transfer'?"),
        ("stage: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert part in error_of(path)


def test_a_missing_file_names_its_neighbour(tmp_path: Path, config: Path) -> None:
    assert "did you mean" in error_of(tmp_path / "rum.yaml")


@pytest.mark.parametrize("word", ["optim.lr", "=3", "data.shards.5=x", "name.first=x"])
def test_bad_overrides(config: Path, word: str) -> None:
    assert "command line" in error_of(config, word)


def test_overrides_reach_into_lists(config: Path) -> None:
    config.write_text(TRANSFER.replace("shards: shards/a", "shards: [a, b]"))
    assert load_run(config, RUNS, ["data.shards.1=c"]).run.data.shards == ("a", "c")


@given(st.floats(min_value=1e-12, max_value=1e12, allow_nan=False))
def test_every_float_survives_the_round_trip(value: float) -> None:
    run = FinetuneRun.model_validate(
        {
            "name": "n",
            "output": "o",
            "data": {"shards": "s"},
            "model": {"name": "m"},
            "schedule": {"steps": 1},
            "optim": {"lr": value},
        }
    )
    assert yaml.load(dump_run(run), Loader=RunLoader)["optim"]["lr"] == value


def test_runs_are_frozen(config: Path) -> None:
    run = load_run(config, RUNS).run
    with pytest.raises(Exception, match="frozen"):
        run.seed = 3


def test_every_packaged_recipe_is_valid(repository: Path) -> None:
    recipes = sorted((repository / "configs").glob("*/*.yaml"))
    assert recipes
    for recipe in recipes:
        run = load_run(recipe, RUNS).run
        assert recipe.parent.name == run.stage
