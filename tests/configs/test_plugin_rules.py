"""The rules of plug-ins that need no installed package: what is accepted, what is named, what is recorded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar, get_args

import pytest

from cliplift.configs import sources
from cliplift.configs.discovery import VARIABLE, PluginError, plugin_versions
from cliplift.configs.plugins import SOURCE_KINDS, _check_augmentation
from cliplift.configs.sections import Section


class Brightened(Section):
    num_draws: ClassVar[int] = 1

    def __call__(self, clips: object, draws: object) -> object:
        return clips


class MoreBrightened(Brightened):
    strength: float = 0.5


class NotCallable(Section):
    num_draws: ClassVar[int] = 1


def test_an_augmentation_may_inherit_its_call() -> None:
    _check_augmentation("brightened", Brightened)
    _check_augmentation("more", MoreBrightened)
    with pytest.raises(PluginError, match="no method __call__"):
        _check_augmentation("not", NotCallable)


def test_the_kinds_of_sources_are_those_of_the_schema() -> None:
    union, *_ = get_args(sources.Source)
    kinds = [get_args(source.model_fields["kind"].annotation)[0] for source in get_args(union)]
    assert sorted(kinds) == sorted(SOURCE_KINDS)


def test_versions_of_plugins_are_known_without_importing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_package-1.2.dist-info").mkdir()
    (tmp_path / "a_package-1.2.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: a-package\nVersion: 1.2\n"
    )
    (tmp_path / "a_package-1.2.dist-info/entry_points.txt").write_text("[cliplift.models]\nm = nowhere:M\n")
    text = b"raise SystemExit('imported')\n"
    (tmp_path / "in_development.py").write_bytes(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(VARIABLE, "in_development,nowhere_to_be_found")
    found = plugin_versions()
    assert found["a-package"] == "1.2"
    assert (
        found["in_development (--plugin)"] == hashlib.sha256(b"in_development.py\0" + text).hexdigest()[:12]
    )
    assert found["nowhere_to_be_found (--plugin)"] == "not found"
    (tmp_path / "in_development.py").write_bytes(text + b"\n")
    assert plugin_versions()["in_development (--plugin)"] != found["in_development (--plugin)"]
