"""Plug-ins of another package: installed, listed, validated, trained; a broken one stops nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cliplift.sharding.demo.synthetic import write_demo_videos

BROKEN = """
from cliplift.models.registry import ModelEntry

def build(*, num_classes):
    raise NotImplementedError

PLUGINS = {
    "models": {
        "t3d_tiny": ModelEntry(name="t3d_tiny", build=build),
        "no_frames": ModelEntry(name="no_frames", build=build),
        "no_entry": build,
    },
    "sources": {"nothing": dict},
    "augmentations": {"nothing": 3},
    "stages": {"nothing": lambda run: None},
}
"""

Cliplift = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A folder with the example package as an installer leaves it: its modules, metadata and entry points."""
    package, target = repository / "tests" / "plugin_package", tmp_path_factory.mktemp("target")
    project = tomllib.loads((package / "pyproject.toml").read_text())
    name, version = project["project"]["name"], project["project"]["version"]
    for module in project["tool"]["setuptools"]["packages"]:
        shutil.copytree(package / module, target / module)
    facts = target / f"{name.replace('-', '_')}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in project["project"]["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (facts / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return target


@pytest.fixture(scope="module")
def cliplift(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Cliplift:
    """Runs the command line with the package installed, in a folder of its own."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "broken_plugins.py").write_text(BROKEN)
    (folder / "crashing.py").write_text("1 / 0\n")
    (folder / "leaving.py").write_text("import sys\nsys.exit(3)\n")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(installed))))
        return subprocess.run(
            [sys.executable, "-m", "cliplift.launch.cli", *words],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return run


@pytest.mark.slow
def test_models_lists_the_plugin(cliplift: Cliplift) -> None:
    done = cliplift("models", "colour*")
    assert done.returncode == 0, done.stderr
    # 3 channels x 8 bins x 400 classes + 400 + 8 centres
    assert "10,008" in done.stdout
    assert "plug-in colour_histogram: cliplift-example 0.1" in done.stdout


@pytest.mark.slow
def test_broken_ones_are_named_and_do_not_stop_the_others(cliplift: Cliplift) -> None:
    words = ("doctor", "--plugin", "broken_plugins", "--plugin", "crashing", "--plugin", "leaving")
    done = cliplift(*words)
    rows = {
        line.split("plug-in ")[1].split()[0]: line for line in done.stdout.splitlines() if "plug-in" in line
    }
    for name, group in (("colour_histogram", "models"), ("focal", "stages"), ("text", "sources")):
        assert rows[name].startswith("ok"), rows
        assert f"{group} of cliplift-example 0.1" in rows[name]
    assert rows["gamma"].startswith("ok")
    assert "its name is taken" in rows["t3d_tiny"]
    assert "its builder takes no 'in_frames'" in rows["no_frames"]
    assert "it is not a ModelEntry" in rows["no_entry"]
    assert "note" in rows["nothing"]
    assert "--plugin crashing is left out: ZeroDivisionError" in done.stderr
    assert "--plugin leaving is left out: SystemExit" in done.stderr
    for fault in ("it is not a Section", "it is not callable as (run, *, classes, topology)"):
        assert fault in done.stderr
    assert "Traceback" not in done.stderr


SHARD = ("shard", "shard/demo_actions", "output=out", "--dry-run")
TRAIN = ("pretrain", "pretrain/demo", "--dry-run")
MISTAKES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((*SHARD, "source={kind: text, flie: x}"), ("source.flie: unknown key", "did you mean 'file'?")),
    ((*SHARD, "source={kind: txet, file: x}"), ("source.kind", "did you mean 'text'?")),
    ((*TRAIN, "objective=focla"), ("objective", "did you mean 'focal'?")),
    ((*TRAIN, "objective=focal", "objective_options.gamma=-1"), ("objective_options.gamma: -1 should be",)),
    ((*TRAIN, "objective_options.gamma=1"), ("objective_options.gamma", "takes no options")),
    ((*TRAIN, "data.augment.plugins={gamma: {strength: x}}"), ("data.augment.plugins.gamma.strength: 'x'",)),
    ((*TRAIN, "data.augment.plugins={gama: {}}"), ("data.augment.plugins.gama", "did you mean 'gamma'?")),
    ((*TRAIN, "model={name: colour_histogramm}"), ("model.name", "did you mean 'colour_histogram'")),
    ((*TRAIN, "--plugin", "nowhere"), ("--plugin", "nowhere")),
    ((*TRAIN, "--plugin", "cliplift_example.nowhere"), ("--plugin", "no module 'cliplift_example.nowhere'")),
    (
        (*TRAIN, "--plugin", "mine.py"),
        ("--plugin", "no module 'mine.py'", "from this folder or an installed package: mine"),
    ),
    (("--plugin", "not a module", *TRAIN), ("--plugin", "not a module")),
]
MANY = """
import contextlib, io, json, sys
from cliplift.launch.cli import main

outcomes = []
for words in json.load(sys.stdin):
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(said):
        code = main(words)
    outcomes.append((code, said.getvalue(), errors.getvalue()))
print("outcomes", json.dumps(outcomes))
"""


def run_many(
    commands: Sequence[Sequence[str]], *, installed: Path, folder: Path
) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each command, all in one process: what is slow is the import of torch."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(installed))))
    done = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps(commands),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    found: list[tuple[int, str, str]] = json.loads(done.stdout.rpartition("outcomes ")[2])
    return found


@pytest.mark.slow
def test_mistakes_are_one_sentence(installed: Path, tmp_path: Path) -> None:
    outcomes = run_many([words for words, _ in MISTAKES], installed=installed, folder=tmp_path)
    for (words, parts), (code, _, said) in zip(MISTAKES, outcomes, strict=True):
        assert code == 2, (words, said)
        (line,) = said.strip().splitlines()
        for part in parts:
            assert part in line, words


@pytest.mark.slow
def test_each_kind_is_used_for_a_step(installed: Path, tmp_path: Path) -> None:
    """Shards from the source, then a step of the model with the objective and the augmentation."""
    write_demo_videos(
        tmp_path / "v", seed=1, train_per_class=2, val_per_class=1, test_per_class=1, unlabelled=1,
        size_pixels=64, workers=1,
    )  # fmt: skip
    videos = sorted((tmp_path / "v" / "labelled").rglob("*.mp4"))
    listed = [f"{video.parent.name} {video.relative_to(tmp_path)}" for video in videos]
    (tmp_path / "list.txt").write_text("\n".join(listed))
    source = f"source={{kind: text, file: {tmp_path / 'list.txt'}}}"
    splits = "splits={shares: {train: 0.6, val: 0.4}}"
    build = ["shard", "shard/demo_actions", source, splits, f"output={tmp_path / 's'}", "workers=1"]
    train = [
        "pretrain", "pretrain/demo",
        f"data.shards={tmp_path / 's'}", f"output={tmp_path / 'run'}", "model={name: colour_histogram}",
        "label_smoothing=0", "objective=focal", "objective_options.gamma=1.5", "engine.global_batch=4",
        "data.augment.plugins={gamma: {strength: 0.3}}", "schedule.steps=1", "track.wandb=disabled",
        "evaluation.batch=8", "data.sampling.frames=4", "data.workers=1",
    ]  # fmt: skip
    predict = ["predict", str(tmp_path / "run"), str(videos[0])]
    built, trained, predicted = run_many([build, train, predict], installed=installed, folder=tmp_path)
    assert built[0] == 0, built
    assert f"{len(videos)} clips" in built[1]
    assert trained[0] == 0, trained
    assert (tmp_path / "run" / "result.json").is_file()
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert recorded["plugins"] == {"cliplift-example": "0.1"}
    assert predicted[0] == 0, predicted


def test_the_page_shows_what_the_package_does(repository: Path) -> None:
    page = (repository / "docs" / "plugins.md").read_text()
    package = repository / "tests" / "plugin_package"
    project = (package / "pyproject.toml").read_text()
    code = "\n".join(path.read_text() for path in (package / "cliplift_example").glob("*.py"))
    (points,) = re.findall(r"^```toml\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert points in project
    shown = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in shown for line in block.splitlines() if line.strip()]
    assert len(lines) > 6
    for line in lines:
        assert line.startswith("PLUGINS = ") or line in code, line
