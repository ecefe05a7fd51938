"""Plug-ins of another package: installed, listed, validated, trained; a broken one stops nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
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
    """A folder with the example package, installed by pip from a copy, so that nothing is left in the checkout."""
    copy, target = tmp_path_factory.mktemp("copy") / "package", tmp_path_factory.mktemp("target")
    shutil.copytree(repository / "tests" / "plugin_package", copy)
    words = [
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(target),
        str(copy),
    ]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def cliplift(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Cliplift:
    """Runs the command line with the package installed, in a folder of its own."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "broken_plugins.py").write_text(BROKEN)
    (folder / "crashing.py").write_text("1 / 0\n")

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


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    for part in parts:
        assert part in line


def test_models_lists_the_plugin(cliplift: Cliplift) -> None:
    done = cliplift("models", "colour*")
    assert done.returncode == 0, done.stderr
    # 3 channels x 8 bins x 400 classes + 400 + 8 centres
    assert "10,008" in done.stdout
    assert "plug-in colour_histogram: cliplift-example 0.1" in done.stdout


def test_broken_ones_are_named_and_do_not_stop_the_others(cliplift: Cliplift) -> None:
    words = ("doctor", "--plugin", "broken_plugins", "--plugin", "crashing")
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
    for fault in ("it is not a Section", "it is not callable as (run, *, classes, topology)"):
        assert fault in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_are_one_sentence(cliplift: Cliplift) -> None:
    shard = ("shard", "shard/demo_actions", "output=out", "--dry-run")
    refused(cliplift(*shard, "source={kind: text, flie: x}"), "source.flie", "unknown key", "'file'")
    refused(cliplift(*shard, "source={kind: txet, file: x}"), "source.kind", "did you mean 'text'?")
    train = ("pretrain", "pretrain/demo", "--dry-run")
    refused(cliplift(*train, "objective=focla"), "objective", "did you mean 'focal'?")
    refused(
        cliplift(*train, "objective=focal", "objective_options.gamma=-1"), "objective_options.gamma", "-1"
    )
    refused(cliplift(*train, "objective_options.gamma=1"), "objective_options.gamma", "takes no options")
    refused(
        cliplift(*train, "data.augment.plugins={gamma: {strength: x}}"), "data.augment.plugins.gamma.strength"
    )
    refused(
        cliplift(*train, "data.augment.plugins={gama: {}}"),
        "data.augment.plugins.gama",
        "did you mean 'gamma'?",
    )
    refused(cliplift(*train, "model={name: colour_histogram, options: {bin: 3}}"), "model.options.bin")
    refused(cliplift(*train, "--plugin", "nowhere"), "--plugin", "nowhere")
    refused(cliplift("--plugin", "not a module", *train), "--plugin", "not a module")


def test_each_kind_is_used_for_a_step(cliplift: Cliplift, tmp_path: Path) -> None:
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
    built = cliplift("shard", "shard/demo_actions", source, splits, f"output={tmp_path / 's'}", "workers=1")
    assert built.returncode == 0, built.stdout + built.stderr
    assert f"{len(videos)} clips" in built.stdout

    words = [
        f"data.shards={tmp_path / 's'}", f"output={tmp_path / 'run'}", "model={name: colour_histogram}",
        "label_smoothing=0", "objective=focal", "objective_options.gamma=1.5", "engine.global_batch=4",
        "data.augment.plugins={gamma: {strength: 0.3}}", "schedule.steps=1", "track.wandb=disabled",
        "evaluation.batch=8", "data.sampling.frames=4", "data.workers=1",
    ]  # fmt: skip
    done = cliplift("pretrain", "pretrain/demo", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "result.json").is_file()
    predicted = cliplift("predict", str(tmp_path / "run"), str(videos[0]))
    assert predicted.returncode == 0, predicted.stderr
