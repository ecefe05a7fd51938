"""The documentation stays true: commands parse, recipes and pages it names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cliplift.configs.load import packaged_recipe
from cliplift.launch.cli import build_parser
from cliplift.launch.commands.command import all_commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPE = re.compile(r"(?<![\w/.])((?:shard|transfer|pretrain|finetune|evaluate)/[a-z0-9_]+)(?![\w/.*{])")


def commands(page: Path) -> list[list[str]]:
    """Words of every ``cliplift`` command in the page's shell blocks, launchers taken off."""
    found = []
    text = page.read_text()
    for block in re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(
                re.sub(r"\[(--\S+)( \S+)?\]", "", line).strip().removeprefix("$ "), comments=True
            )
            if "cliplift.launch.cli" in words:
                words = ["cliplift", *words[words.index("cliplift.launch.cli") + 1 :]]
            if words[:1] == ["cliplift"] and len(words) > 1:
                found.append(words[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse(page: Path) -> None:
    parser = build_parser()
    for words in commands(page):
        if words[0].startswith("-") or "--help" in words:
            continue
        assert words[0] in all_commands(), f"{page.name}: {' '.join(words)}"
        _, unknown = parser.parse_known_args(words)
        assert not [u for u in unknown if u.startswith("-")], f"{page.name}: {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_recipes_and_pages_exist(page: Path) -> None:
    text = page.read_text()
    for name in set(RECIPE.findall(text)):
        assert packaged_recipe(name) is not None, f"{page.name} names {name}"
    for name in set(re.findall(r"docs/(\w+\.md)", text)):
        assert (ROOT / "docs" / name).is_file(), f"{page.name} names docs/{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_exist(page: Path) -> None:
    """But for the files that the changes worked out in docs/architecture.md add."""
    text = page.read_text()
    added = set(re.findall(r"^\+\+\+ b/(\S+)", text, flags=re.MULTILINE))
    folders = "benchmarks|configs|launch|models|pipelines|sharding|tests"
    named = set(re.findall(rf"(?<![\w/.-])((?:{folders})/[\w/]+\.(?:py|toml|yaml|csv))\b", text))
    assert not [name for name in named - added if not (ROOT / name).is_file()]
