"""Which part of a build a process does, and what a person is told."""

from __future__ import annotations

from collections import Counter

import pytest

from cliplift.configs.sections import ConfigError
from cliplift.launch.commands.shard import progress_line, which_part
from cliplift.sharding.build.run import Progress


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        (None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}, None),
        ("2/4", {}, (2, 4)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}, (3, 8)),
        (
            "auto",
            {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"},
            (2, 8),
        ),
        ("auto", {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "5"}, (0, 5)),
        ("auto", {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        # An array of single-task jobs: the array index is meant, not the task's rank inside its job.
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
            },
            (1, 2),
        ),
    ],
)
def test_which_part(text: str | None, environment: dict[str, str], expected: tuple[int, int] | None) -> None:
    assert which_part(text, environment) == expected


@pytest.mark.parametrize(
    ("index", "count"), [("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), ("RANK", "WORLD_SIZE")]
)
@pytest.mark.parametrize("values", [("7", "4"), ("-1", "4"), ("", "4"), ("x", "4"), ("0", "0")])
def test_stale_variables_are_named(index: str, count: str, values: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"unset {index} {count}"):
        which_part("auto", dict(zip((index, count), values, strict=True)))


@pytest.mark.parametrize("text", ["4/4", "1", "-1/3", "a/b", "1/0", "auto", "²/4"])
def test_impossible_parts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--part"):
        which_part(text, {})


def test_the_progress_line_says_what_was_refused_and_how_long_it_takes() -> None:
    progress = Progress(
        videos_done=5, videos_total=20, shards_done=1, shards_total=4, clips=10, bytes=2**20, seconds=5.0
    )
    progress.refused = Counter({"decode": 2})
    line = progress_line(progress)
    assert "videos 5/20" in line
    assert "2.0 clips/s" in line
    assert "refused: decode 2" in line
    assert "left: 15 s" in line
    assert "left: ?" in progress_line(Progress())
