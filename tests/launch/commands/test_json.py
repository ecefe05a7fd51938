"""``--json``: one object on standard output and nothing else, the rest on standard error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from cliplift.launch.check.findings import Finding
from cliplift.launch.cli import main
from cliplift.pipelines.runs.folder import write_json
from cliplift.sharding.build.verify import Problem, VerifyReport


def test_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()

    def evaluated(run: object, *, command: object) -> None:
        print("net: finished")
        (tmp_path / "run" / "evaluate").mkdir()
        write_json(tmp_path / "run" / "evaluate" / "result.json", {"metrics": {"accuracy": 0.5}})

    monkeypatch.setattr("cliplift.pipelines.evaluation.evaluate.run_evaluate", evaluated)
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {
        "output": str(tmp_path / "run" / "evaluate"),
        "metrics": {"accuracy": 0.5},
    }
    assert "net: finished" in said.err


def test_a_report(
    tmp_path: Path, load_module: Callable[[Path], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    pages = load_module(Path(__file__).parents[2] / "pipelines" / "report" / "test_report.py")
    run = pages.write_run(tmp_path / "run")
    assert main(["report", str(run), "max_clips=0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(run / "report.html")}


def test_a_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("ok", "python", "3.12"), Finding("fail", "decoder", "none", "install av")]
    monkeypatch.setattr("cliplift.launch.check.doctor.examine", lambda _: findings)
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "ok": False,
        "findings": [
            {"status": "ok", "subject": "python", "found": "3.12", "remedy": ""},
            {"status": "fail", "subject": "decoder", "found": "none", "remedy": "install av"},
        ],
    }
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("2 looked at, 1 failed, 0 to note\n")


def test_a_verification(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = VerifyReport(
        "shards/x", (Problem("checksum", "a.tar", "differs"),), shards=1, samples=2, decoded=0
    )
    monkeypatch.setattr("cliplift.sharding.build.verify.verify", lambda url, decode: found)
    assert main(["verify", "shards/x", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["samples"], said["problems"][0]["file"]) == (False, 2, "a.tar")
