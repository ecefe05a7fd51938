"""Shard datasets with and without weights, as a user writes them and gets them wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cliplift.configs.data import WeightedShards
from cliplift.configs.load import dump_run, load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError


def load(repository: Path, *words: str):  # type: ignore[no-untyped-def]
    return load_run(repository / "configs" / "pretrain" / "demo.yaml", RUNS, words).run


def test_urls_and_weights(repository: Path, tmp_path: Path) -> None:
    plain = load(repository, "data.shards=[a, s3://b/c]").data
    assert (plain.urls, plain.weights) == (("a", "s3://b/c"), None)
    run = load(repository, "data.shards=[{url: a, weight: 3}, {url: b, weight: 1}]")
    assert (run.data.urls, run.data.weights) == (("a", "b"), (3.0, 1.0))
    assert run.data.shards[0] == WeightedShards(url="a", weight=3.0)
    changed = load(
        repository, "data.shards=[{url: a, weight: 3}, {url: b, weight: 1}]", "data.shards.1.weight=9"
    )
    assert changed.data.weights == (3.0, 9.0)
    file = tmp_path / "again.yaml"
    file.write_text(dump_run(run))
    assert load_run(file, RUNS).run == run, "what a run folder records can be loaded again"


@pytest.mark.parametrize(
    ("entries", "key", "message"),
    [
        ("[{url: a, wieght: 2}]", "data.shards.0.wieght", "unknown key"),
        ("[{url: a}]", "data.shards.0.weight", "is missing"),
        ("[{weight: 1}]", "data.shards.0.url", "is missing"),
        ("[{url: a, weight: 1}, {url: b, weight: 0}]", "data.shards.1.weight", "greater than 0"),
        ("[{url: a, weight: heavy}]", "data.shards.0.weight", "valid number"),
        ("[a, {url: b, weight: 1}]", "data.shards", "a has no weight, others have one"),
        ("[{url: a, weight: 1}, {url: b, weight: 5000}]", "data.shards", "less than 0.1%"),
        ("[7]", "data.shards.0", "7 is not a URL"),
    ],
)
def test_mistakes_name_the_entry_and_say_what_to_write(
    repository: Path, entries: str, key: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(repository, f"data.shards={entries}")
    assert error.value.key == key
    assert message in str(error.value)
    assert error.value.hint
