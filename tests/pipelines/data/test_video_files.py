"""The videos that ``predict`` finds in a folder are those that a shard build takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.pipelines.data.video_files import video_names
from cliplift.sharding.sources.read import read_source


def test_a_folder_holds_the_videos_that_a_build_takes(tmp_path: Path) -> None:
    for name in ("x.mp4", "y.gif", "z.3gp", "c.M2TS", "sub/o.ogv", "._x.mp4", ".cache/t.mp4", "notes.txt"):
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "v" / name).touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/l.mp4").touch()
    (tmp_path / "v/linked").symlink_to(tmp_path / "other")
    found = [str(Path(name).relative_to(tmp_path / "v")) for name in video_names((str(tmp_path / "v"),))]
    assert found == ["c.M2TS", "linked/l.mp4", "sub/o.ogv", "x.mp4", "y.gif", "z.3gp"]
    source = {"kind": "folder", "root": str(tmp_path / "v"), "layout": "flat"}
    run = ShardRun.model_validate({"name": "s", "output": "unused", "source": source})
    assert sorted(v.source for v in read_source(run).videos) == found


def test_a_folder_of_hidden_files_holds_no_video(tmp_path: Path) -> None:
    (tmp_path / "._x.mp4").touch()
    with pytest.raises(ConfigError, match="holds no video file"):
        list(video_names((str(tmp_path),)))
