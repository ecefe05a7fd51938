"""What a machine has, and that nothing secret of it is shown."""

from __future__ import annotations

import sys

import pytest

from cliplift.launch.check import doctor
from cliplift.launch.check.doctor import examine
from cliplift.launch.check.findings import Finding, exit_code, table


def test_this_machine_is_healthy_and_no_key_is_shown() -> None:
    key = "0123456789abcdef0123456789abcdef01234567"
    findings = examine({"WANDB_API_KEY": key, "PATH": ""})
    found = {f.subject: f for f in findings}
    assert exit_code(findings) == 0, table(findings)
    assert found["wandb mode"].found == "online by track.wandb=auto; an API key is set"
    assert key not in table(findings)
    assert found["decoder pyav"].status == "ok"
    assert "h264" in found["source codecs"].found
    for name in ("torch", "deepspeed", "gloo", "encoder", "/dev/shm", "open files", "g++"):
        assert name in found


def test_wandb_mode_of_the_environment_is_named() -> None:
    found = {f.subject: f for f in examine({"WANDB_MODE": "disabled"})}
    assert found["wandb mode"].found.startswith("disabled by WANDB_MODE")


def test_what_is_broken_is_a_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that does not load is what a doctor is called for."""
    monkeypatch.setitem(sys.modules, "av", None)  # the import fails
    findings = examine({})
    codecs = next(f for f in findings if f.subject == "codecs")
    assert codecs.status == "fail"
    assert exit_code(findings) == 1
    assert any(f.subject == "launchers" for f in findings), "the other looks go on"


def test_small_limits_are_noted_with_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (256, 256))
    found = {f.subject: f for f in examine({})}
    assert found["open files"].status == "note"
    assert found["open files"].remedy == "ulimit -n 4096"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: (64 * 2**20, 0, 64 * 2**20))
    found = {f.subject: f for f in examine({})}
    assert "--shm-size=1g" in found["/dev/shm"].remedy


def test_the_table_and_the_exit_code() -> None:
    rows = [Finding("ok", "a", "1"), Finding("note", "longer", "2"), Finding("fail", "b", "3", "use 4")]
    text = table(rows)
    assert text.splitlines()[2] == "fail  b       3: use 4"
    assert text.splitlines()[-1] == "3 looked at, 1 failed, 1 to note"
    assert (exit_code(rows), exit_code(rows[:2])) == (1, 0)
