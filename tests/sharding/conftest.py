"""Small videos and a small dataset, made once and shared by the sharding tests."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos
from cliplift.sharding.manifest import FLOW_COLUMNS, arrow_type
from cliplift.sharding.storage import LocalStore


@pytest.fixture(scope="session")
def demo_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of two training clips, one validation and one test clip each, and four longer unlabelled videos."""
    folder = tmp_path_factory.mktemp("videos")
    write_demo_videos(
        folder,
        seed=5,
        train_per_class=2,
        val_per_class=1,
        test_per_class=1,
        unlabelled=4,
        size_pixels=48,
        workers=2,
    )
    return folder


@pytest.fixture(scope="session")
def make_run(demo_videos: Path) -> Callable[..., ShardRun]:
    """A run over the labelled demo videos; keywords replace or add sections."""

    def make(output: Path | str, **changes: Any) -> ShardRun:
        tree: dict[str, Any] = {
            "name": "tiny",
            "output": str(output),
            "source": {"kind": "folder", "root": str(demo_videos / "labelled"), "layout": "split/class"},
            "shards": {"videos_per_shard": 5},
            "workers": 2,
        }
        return ShardRun.model_validate(tree | changes)

    return make


@pytest.fixture(scope="session")
def built(make_run: Callable[..., ShardRun], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset; read it, never change it."""
    folder = tmp_path_factory.mktemp("built") / "tiny"
    run_shard(make_run(folder))
    return folder


@pytest.fixture
def dataset(built: Path, tmp_path: Path) -> Path:
    """A copy of the finished dataset, to damage."""
    return Path(shutil.copytree(built, tmp_path / "tiny"))


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """Within ``stop_after(n)`` a local store takes n files, and the process is interrupted at the next."""

    @contextmanager
    def within(files: int) -> Iterator[None]:
        left = files

        def counted(done: Callable[..., None]) -> Callable[..., None]:
            def call(*arguments: Any) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                done(*arguments)

            return call

        with monkeypatch.context() as patch:
            for verb in ("write", "publish"):
                patch.setattr(LocalStore, verb, counted(getattr(LocalStore, verb)))
            yield

    return within


@pytest.fixture(scope="session")
def rows_to_parquet() -> Callable[..., bytes]:
    """Writes rows of a dataclass as one Parquet file at once: what a table that is made in parts must be."""

    def write(
        rows: Sequence[object], row_type: Any, *, extra: Mapping[str, Sequence[int]] | None = None
    ) -> bytes:
        columns: dict[str, pa.Array] = {}
        for field in dataclasses.fields(row_type):
            values = [getattr(row, field.name) for row in rows]
            if field.name in FLOW_COLUMNS and not any(values):
                continue  # a table without flow is the table it was before there was any
            columns[field.name] = pa.array(values, type=arrow_type(str(field.type)))
        for name, numbers in (extra or {}).items():
            columns[name] = pa.array(numbers, type=pa.int64())
        out = io.BytesIO()
        pq.write_table(pa.table(columns), out, compression="zstd", store_schema=False)
        return out.getvalue()

    return write
