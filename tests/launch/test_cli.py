"""The command line as a user meets it: exit codes and one-sentence errors, of real processes or, where a command
imports torch, of ``main`` in this one."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cliplift.launch.cli import main
from cliplift.launch.commands.command import all_commands

CLIPLIFT = [sys.executable, "-m", "cliplift.launch.cli"]


def cliplift(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLIPLIFT, *words], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )


def in_this_process(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same command without another import of torch, which takes seconds."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            status = main(words)
        except SystemExit as left:
            status = int(left.code or 0)
    return subprocess.CompletedProcess(words, status, said.getvalue(), errors.getvalue())


def failed(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def test_help_of_everything_from_another_directory(tmp_path: Path) -> None:
    overview = cliplift("--help", cwd=tmp_path)
    assert overview.returncode == 0
    for name, command in all_commands().items():
        assert re.search(rf"\n    {name}\s", overview.stdout), name
        stage = in_this_process(name, "--help", cwd=tmp_path)
        assert stage.returncode == 0, stage.stderr
        if command.schema:
            assert "config fields" in stage.stdout


def test_stage_help_shows_units_and_defaults(tmp_path: Path) -> None:
    text = cliplift("finetune", "--help", cwd=tmp_path).stdout
    assert "optim.lr  (float, default 0.001)" in text
    assert "data.crop_pixels  (int, default 112)" in text
    assert "pixels" in text
    assert "schedule.steps" in text


def test_help_imports_neither_torch_nor_pydantic(tmp_path: Path) -> None:
    code = (
        "import sys; from cliplift.launch.cli import build_parser; build_parser().format_help();"
        "assert not {'torch', 'deepspeed', 'pydantic', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    failed(cliplift("transfer", "missing.yaml", cwd=tmp_path), "missing.yaml", "no such config file")
    failed(cliplift("tranfer", "x.yaml", cwd=tmp_path), "tranfer")
    failed(
        cliplift("transfer", "transfer/demo", "optim.lrr=1", cwd=tmp_path),
        "optim.lrr",
        "did you mean 'optim.lr'?",
    )
    failed(cliplift("transfer", "transfer/demo", "--fast", cwd=tmp_path), "--fast")
    failed(cliplift("finetune", "transfer/demo", cwd=tmp_path), "cliplift transfer transfer/demo")
    failed(cliplift("transfer", "transfer/demo", "stray", cwd=tmp_path), "stray", "key.path=value")
    failed(in_this_process("predict", "nowhere", "video.mp4", cwd=tmp_path), "nowhere")
    failed(cliplift("shard", "shard/demo_actions", "--part", "4/4", cwd=tmp_path), "4/4")


def test_an_unknown_command_names_the_nearest(tmp_path: Path) -> None:
    failed(
        in_this_process("tranfer", "x.yaml", cwd=tmp_path), "no command 'tranfer': did you mean 'transfer'?"
    )
    failed(in_this_process("zzz", cwd=tmp_path), "no command 'zzz'; see `cliplift --help`")


def test_help_of_a_section_is_of_that_section_alone(tmp_path: Path) -> None:
    text = in_this_process("finetune", "--help", "optim", cwd=tmp_path).stdout
    keys = re.findall(r"^  (\S+)  \(", text, flags=re.MULTILINE)
    assert "optim.lr" in keys
    assert all(key.startswith("optim.") for key in keys)
    one = in_this_process("finetune", "--help", "optim.lr", cwd=tmp_path).stdout
    assert re.findall(r"^  (\S+)  \(", one, flags=re.MULTILINE) == ["optim.lr"]
    kinds = in_this_process("shard", "--help", "source.root", cwd=tmp_path).stdout
    assert "source[folder].root" in kinds
    failed(in_this_process("finetune", "--help", "optm", cwd=tmp_path), "did you mean 'optim'?")
    failed(in_this_process("finetune", "--help", "x.yaml", cwd=tmp_path), "the sections are optim, schedule")


def test_help_speaks_yaml(tmp_path: Path) -> None:
    for stage in ("shard", "pretrain", "finetune", "predict"):
        text = in_this_process(stage, "--help", cwd=tmp_path).stdout
        assert not re.findall(r".*\b(?:None|True|False)\b.*", text)
        for default in re.findall(r", default (\[.*\]|true|false|null)\)$", text, flags=re.MULTILINE):
            yaml.safe_load(default)
    assert "default null)" in text


def test_a_shell_completes_commands_options_and_keys(tmp_path: Path) -> None:
    """Asked of bash itself."""
    (tmp_path / "script").write_text(in_this_process("--completion", "bash", cwd=tmp_path).stdout)
    ask = (
        "source ./script; compopt() { :; }\n"
        'ask() { COMP_WORDS=(cliplift "$@"); COMP_CWORD=$#; _cliplift; echo ${COMPREPLY[@]}; }\n'
        "ask fine; ask finetune optim.lr; ask finetune --dr; ask verify --fu; ask nothing x"
    )
    done = subprocess.run(
        ["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.splitlines()[:3] == ["finetune", "optim.lr= optim.lr_reference_batch=", "--dry-run"]
    assert done.stderr == ""
    for shell in ("zsh", "fish"):
        text = in_this_process("--completion", shell, cwd=tmp_path).stdout
        assert all(name in text for name in all_commands())
    failed(in_this_process("--completion", "cmd", cwd=tmp_path), "cmd")


def test_an_unknown_model_names_the_nearest(tmp_path: Path) -> None:
    done = in_this_process("transfer", "transfer/demo", "model.name=t3d_tinny", "--dry-run", cwd=tmp_path)
    failed(done, "model.name", "t3d_tiny", "command line")


def test_dry_run_prints_the_resolved_config_and_the_deepspeed_section(tmp_path: Path) -> None:
    done = in_this_process(
        "transfer", "configs/transfer/demo.yaml", "optim.lr=3e-4", "--dry-run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "lr: 0.0003" in done.stdout
    assert '"gradient_clipping"' in done.stdout
    assert not list(tmp_path.iterdir())


def test_options_may_stand_between_overrides(tmp_path: Path) -> None:
    done = in_this_process(
        "shard", "shard/demo_actions", "workers=1", "--dry-run", "name=other", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "name: other" in done.stdout
    assert "workers: 1" in done.stdout


@pytest.mark.parametrize("flag", ["--local_rank=0", "--local-rank=0"])
def test_the_deepspeed_launchers_flag_is_accepted(tmp_path: Path, flag: str) -> None:
    done = cliplift(flag, "transfer", "transfer/demo", "--dry-run", cwd=tmp_path)
    first = in_this_process("transfer", flag, "transfer/demo", "--dry-run", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert done.returncode == 0, done.stderr


def test_models_lists_measured_numbers(tmp_path: Path) -> None:
    done = in_this_process("models", "t3d_121", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "29,876,880" in done.stdout
    table = in_this_process("models", "t3d_121", "--markdown", cwd=tmp_path).stdout
    assert table.startswith("| model |")
    failed(in_this_process("models", "nothing*", cwd=tmp_path), "nothing*")
