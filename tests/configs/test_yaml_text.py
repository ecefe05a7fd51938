"""YAML that is mistaken or hostile: one sentence each, and at once; what is right is read as a person means it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.configs.yaml_text import YamlTextError, read_word, read_yaml

HEAD = "stage: shard\nname: t\noutput: shards\nsource: {kind: folder, root: videos}\n"


def bomb(levels: int, kind: str) -> str:
    def filled(inside: str) -> str:
        if kind == "list":
            return f"[{', '.join([inside] * 9)}]"
        return "{" + ", ".join(f"k{i}: {inside}" for i in range(9)) + "}"

    lines = [f"x0: &x0 {filled('1')}"]
    lines += [f"x{i}: &x{i} {filled(f'*x{i - 1}')}" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param("workers: " + "9" * 5000, "line 1, column 10: a number of 5000 digits", id="huge integer"),
        pytest.param("a: 1\n[a, b]: 3", "line 2, column 1: a list or a mapping where a key", id="list as key"),
        pytest.param("? {a: 1}\n: c", "a list or a mapping where a key", id="mapping as key"),
        pytest.param("root: {{ root }}/videos", "is a template's {{ mark }} left", id="template"),
        pytest.param("name: " + "[" * 3000 + "]" * 3000, "nested more than 40 levels", id="deep lists"),
        pytest.param("{a: " * 3000 + "1" + "}" * 3000, "nested more than 40 levels", id="deep mappings"),
        pytest.param(bomb(9, "mapping"), "its anchors unfold to more than 50000 values", id="bomb of mappings"),
        pytest.param(bomb(9, "list"), "its anchors unfold to more than 50000 values", id="bomb of lists"),
        pytest.param("a: &a [*a]", "line 1: an anchor holds itself", id="circle"),
        pytest.param("a: &a {<<: *a}", "line 1: an anchor holds itself", id="circle of merge keys"),
        pytest.param("a: !!python/object/apply:os.system [ls]", "could not determine a constructor", id="tag"),
        pytest.param("a: !!timestamp 2020-99-99", "line 1, column 4: '2020-99-99' is not a valid timestamp", id="date"),
        pytest.param("a: !!int x", "line 1, column 4: 'x' is not a valid int", id="forced integer"),
        pytest.param("a: b\0c", "special characters are not allowed", id="control character"),
        pytest.param("a: " + "x" * (1 << 20), "characters, more than 1048576", id="too long"),
        pytest.param("- \n" * 50_001, "more than 50000 values", id="too many"),
    ],
)  # fmt: skip
def test_a_faulty_text_is_one_sentence(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(YamlTextError):
        read_yaml(text)
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run(path, RUNS)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: is not valid YAML")
    assert told in sentence
    assert "\n" not in sentence


def test_merge_keys_are_read_as_the_reference_reads_them() -> None:
    text = (
        "common: &common {crf: 20, gop_frames: 8}\nfirst: &first {crf: 30}\n"
        "one: {<<: *common, crf: 25}\ntwo: {<<: [*first, *common]}\nthree: {<<: {a: 1}, b: 2}\n"
    )
    assert read_yaml(text) == yaml.safe_load(text)


def test_yaml_1_2_scalars() -> None:
    text = "a: 2020-01-01\nb: 1:30\nc: no\nd: 3e-4\ne: 010\nf: 2020-99-99\ng: 1_000\n"
    assert read_yaml(text) == {
        "a": "2020-01-01", "b": "1:30", "c": "no", "d": 3e-4, "e": "010", "f": "2020-99-99", "g": 1000,
    }  # fmt: skip


def test_base_files_that_name_each_other_twice_are_refused(tmp_path: Path) -> None:
    """Thirty levels of two would be read a billion times."""
    (tmp_path / "b0.yaml").write_text(HEAD)
    for level in range(1, 30):
        (tmp_path / f"b{level}.yaml").write_text(f"base: [b{level - 1}.yaml, b{level - 1}.yaml]\n")
    with pytest.raises(ConfigError, match="more than 100 base files"):
        load_run(tmp_path / "b29.yaml", RUNS)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("videos/set #2", "videos/set #2"),
        ("videos/set#2", "videos/set#2"),
        ("12 # clips", "12 # clips"),
        ("a: b", "a: b"),
        ("- a", "- a"),
        ("*.mp4", "*.mp4"),
        ("&anchor x", "&anchor x"),
        ("@home", "@home"),
        ("%d.mp4", "%d.mp4"),
        ("!tag x", "!tag x"),
        ("`x`", "`x`"),
        ("#1", "#1"),
        ("3e-4", 3e-4),
        ("null", None),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("{a: 1}", {"a": 1}),
        ("'a # b'", "a # b"),
        ('"[x"', "[x"),
        ("  7", 7),
    ],
)
def test_a_word_of_the_command_line_is_what_was_typed(word: str, value: object) -> None:
    assert read_word(word) == value


@pytest.mark.parametrize("word", ["[a", "[a] b", "{a: 1", "'a", '"a" b', "[a] # b"])
def test_a_word_that_opens_and_does_not_end_is_told_to_be_quoted(word: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(HEAD)
    with pytest.raises(ConfigError, match="quote it if it is meant as text") as caught:
        load_run(path, RUNS, [f"source.root={word}"])
    assert str(caught.value).startswith("command line: source.root: ")


@pytest.mark.parametrize("output", ["", "   ", "$CLIPLIFT_NOT_SET", "${CLIPLIFT_NOT_SET}/x", "a\0b"])
def test_an_output_that_no_folder_can_be_is_refused(output: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(HEAD)
    with pytest.raises(ConfigError, match="output"):
        load_run(path, RUNS, [f"output={output}"])


def test_home_and_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SCRATCH", "/scratch/x")
    path = tmp_path / "c.yaml"
    path.write_text(HEAD)
    run = load_run(path, RUNS, ["output=$SCRATCH/shards", "source.root=~/videos"]).run
    assert (run.output, run.source.root) == ("/scratch/x/shards", "/home/someone/videos")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no device files")
def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_run(Path("/dev/zero"), RUNS)


def test_a_base_file_with_a_nul_in_its_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text('base: "a\\0b.yaml"\n')
    with pytest.raises(ConfigError, match="base"):
        load_run(tmp_path / "a.yaml", RUNS)
