"""Every command of the README runs as written, in order, in an empty directory with a folder of videos."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cliplift.sharding.demo.synthetic import write_demo_videos

RUN_HERE = ("cliplift", "torchrun", "deepspeed")


def blocks(repository: Path, language: str) -> Iterator[str]:
    text = (repository / "README.md").read_text()
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        yield match[1]


def commands(repository: Path) -> list[str]:
    return [line for block in blocks(repository, "bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def workplace(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory holding the README's YAML files and a small ``my_videos``, one folder a class."""
    place = tmp_path_factory.mktemp("readme")
    made = place / "made"
    write_demo_videos(
        made,
        seed=5,
        train_per_class=6,
        val_per_class=1,
        test_per_class=1,
        unlabelled=1,
        size_pixels=64,
        workers=2,
    )
    (made / "labelled" / "train").rename(place / "my_videos")
    for block in blocks(repository, "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block)
        assert name, f"a YAML block must begin with its file name:\n{block}"
        (place / name[1]).write_text(block)
    return place


def test_make_and_pip_commands_exist(repository: Path) -> None:
    """What is not run here: ``make`` targets exist (CI runs them), extras are declared."""
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), flags=re.MULTILINE))
    extras = set(
        tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )
    for command in commands(repository):
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[0] not in RUN_HERE:
            assert words[0] == "python3" or words[0].endswith(".venv/bin/pip"), (
                f"unknown kind of command: {command}"
            )
            for named in re.findall(r"\.\[(.*?)\]", command):
                assert set(named.split(",")) <= extras, command


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_command_runs_as_written(repository: Path, workplace: Path) -> None:
    to_run = [command for command in commands(repository) if shlex.split(command)[0] in RUN_HERE]
    assert len(to_run) >= 10
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    for command in to_run:
        done = subprocess.run(
            command,
            shell=True,
            cwd=workplace,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    for left in ("runs/my-finetune/report.html", "my-model/model.safetensors", "runs/two-ranks/result.json"):
        assert (workplace / left).is_file(), left


@pytest.mark.slow
def test_python_snippets_run(repository: Path, workplace: Path) -> None:
    if not (workplace / "my-model").is_dir():
        pytest.skip("the commands before the snippet did not finish")
    for block in blocks(repository, "python"):
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=workplace,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr


def test_the_guided_tour_names_real_files(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    named = re.findall(r"`((?:configs|models|sharding|pipelines|launch)/[\w/]+\.py)`", text)
    assert len(named) >= 10
    for name in named:
        assert (repository / name).is_file(), name
