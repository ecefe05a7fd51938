"""Files that hang, crash or bloat a worker, and names that no tool expects: each costs its own video alone."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.plan import make_plan
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.manifest import REFUSED_FILE
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.scratch import scratch_folder


def write_film(path: Path) -> Path:
    """Half a second in which a bright bar moves over grey."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(12):
            picture = np.full((64, 96, 3), 90, np.uint8)
            picture[:, 4 * number : 4 * number + 8] = 235
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def test_hostile_names(tmp_path: Path, make_run: Callable[..., ShardRun]) -> None:
    film = write_film(tmp_path / "film.mp4").read_bytes()
    folder = tmp_path / "videos" / 'a class, with "quotes"'
    folder.mkdir(parents=True)
    names = [
        "..mp4.mp4",
        "-rf.mp4",
        "new\nline.mp4",
        " space .mp4",
        "v1.2_x.mp4",
        "日本語.mp4",
        "a'b\\c.mp4",
        "%s{}.MP4",
        "http:x.mp4",
    ]
    for name in names:
        (folder / name).write_bytes(film)
    run = make_run(tmp_path / "out", source={"kind": "folder", "root": str(tmp_path / "videos")})
    run_shard(run)
    dataset = ShardDataset(run.output)
    assert sorted(Path(dataset.facts(i).source).name for i in range(len(dataset))) == sorted(
        n for n in names if not n.startswith(".")
    )
    for i in range(len(dataset)):
        assert dataset.facts(i).key.replace("-", "").isdigit()
        assert dataset.read_json(i)["source"] == dataset.facts(i).source


def _csv_run(
    make_run: Callable[..., ShardRun], tmp_path: Path, files: list[Path], **changes: Any
) -> ShardRun:
    rows = "".join(f"{path}\n" for path in files)
    (tmp_path / "list.csv").write_text(f"path\n{rows}")
    source = {"kind": "csv", "file": str(tmp_path / "list.csv"), "label_column": None}
    return make_run(tmp_path / "out", source=source, limits={"max_refused_share": 0.9} | changes)


def test_a_video_that_hangs_costs_itself_alone(tmp_path: Path, make_run: Callable[..., ShardRun]) -> None:
    """A pipe that nobody writes to blocks its reader for ever, as some decoders do."""
    films = [write_film(tmp_path / f"{n}.mp4") for n in range(5)]
    stuck = write_film(tmp_path / "stuck.mp4")
    run = _csv_run(make_run, tmp_path, [*films, stuck], clip_timeout_seconds=1.0, attempts=1)
    # The time-out of a new worker includes a minute for loading; let the workers meet a film first.
    run = run.model_copy(update={"workers": 1, "shards": run.shards.model_copy(update={"seed": _late(run)})})
    _plan_and_make_a_pipe(run, stuck)
    report = run_shard(run)
    assert report.refused == {"timeout": 1}
    assert report.clips_written == 5


def _plan_and_make_a_pipe(run: ShardRun, path: Path) -> None:
    """Plan a build of films, one of which is a pipe afterwards: a plan has regular files alone."""
    run_shard(run, phases=("plan",))
    path.unlink()
    os.mkfifo(path)


def _late(run: ShardRun) -> int:
    """A dealing seed that puts the stuck pipe behind at least one film."""
    for seed in range(100):
        changed = run.model_copy(update={"shards": run.shards.model_copy(update={"seed": seed})})
        with scratch_folder() as folder:
            videos = make_plan(changed, folder).videos
            if next(i for i, v in enumerate(videos) if "stuck" in v.source) > 0:
                return seed
    raise AssertionError("no seed found")


def test_a_worker_that_dies_costs_its_video_alone(tmp_path: Path, make_run: Callable[..., ShardRun]) -> None:
    films = [write_film(tmp_path / f"{n}.mp4") for n in range(5)]
    pipe = write_film(tmp_path / "stuck.mp4")
    run = _csv_run(make_run, tmp_path, [*films, pipe], attempts=2)
    _plan_and_make_a_pipe(run, pipe)

    def shoot() -> None:  # what a segmentation fault looks like from outside
        for _ in range(2):
            with pipe.open("wb"):  # returns when a worker reads
                pid = _reader_of(pipe)
                os.kill(pid, signal.SIGSEGV)
                while Path(f"/proc/{pid}").exists():
                    time.sleep(0.01)

    thread = threading.Thread(target=shoot, daemon=True)
    thread.start()
    report = run_shard(run)
    assert report.refused == {"crash": 1}
    assert report.clips_written == 5
    entry = json.loads((tmp_path / "out" / REFUSED_FILE).read_text())
    assert "SIGSEGV" in entry["reason"]


def _reader_of(pipe: Path) -> int:
    """The worker process of this test that has the pipe open."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    while True:
        for pid in children.read_text().split():
            try:
                if any(os.readlink(link) == str(pipe) for link in Path(f"/proc/{pid}/fd").iterdir()):  # noqa: PTH115
                    return int(pid)
            except OSError:  # a file was closed, or a process ended, while we looked
                continue


def test_a_video_that_eats_memory_is_refused(tmp_path: Path, make_run: Callable[..., ShardRun]) -> None:
    films = [write_film(tmp_path / f"{n}.mp4") for n in range(3)]
    huge = tmp_path / "huge.avi"
    with av.open(str(huge), "w") as out:
        stream = out.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 8000, 8000, "yuvj420p"  # 96 MB a decoded frame
        frame = av.VideoFrame(8000, 8000, "yuvj420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        packets = stream.encode(frame)
        for number in range(10):
            for packet in packets:
                packet.pts = packet.dts = number
                out.mux(packet)
    report = run_shard(_csv_run(make_run, tmp_path, [*films, huge], memory_mib=300))
    assert report.clips_written == 3
    assert sum(report.refused.values()) == 1
