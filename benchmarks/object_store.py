"""What the latency of an object store costs the loader, with and without reading ahead.

    python benchmarks/object_store.py [VIDEOS ...] [--latency-ms 50] [--processes 1] [--rounds 3]

Packs the videos, uploads the shards to an S3 API on loopback (``moto``, a development dependency) in a process of its
own, and runs the loader over them in turns, the order reversed every other round: from the local folder; from S3
without latency; from S3 with every request delayed; and the last without reading ahead. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import torch

from cliplift.configs.data import DataConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
from loading import Speed, data_config, loader_of, shards_of, speed, videos_of

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

BUCKET = "s3://shards"


def serve(port: int, latency: Synchronized[float]) -> None:
    """An S3 API whose every answer waits for ``latency`` seconds."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    application = DomainDispatcherApplication(create_backend_app)

    def delayed(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        time.sleep(latency.value)
        answer: Iterable[bytes] = application(environ, start)
        return answer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for every request
    run_simple("127.0.0.1", port, delayed, threaded=True)


def started(latency: Synchronized[float]) -> SpawnProcess:
    """The serving process, once it answers; credentials and address go to the environment of the readers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(port, latency), daemon=True)
    process.start()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test",
                   "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.1)
    sys.exit("the S3 API did not start")


def clips_of(data: DataConfig, waited: list[float]) -> Iterator[int]:
    """Clips in each batch of the loader, without end; ``waited`` takes the seconds a clip's bytes were waited for."""
    with closing(loader_of(data)) as loader:
        for batch in loader.micro_batches(start_step=0, stop_step=1_000_000):
            waited.append(batch.costs.read_seconds / len(batch.labels))
            yield len(batch.labels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, nargs="*", help="folders of videos")
    parser.add_argument("--latency-ms", type=float, default=50.0, help="delay of every request")
    parser.add_argument("--processes", type=int, default=1, help="decoding processes")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds")
    parser.add_argument("--clips", type=int, default=300, help="clips timed in each turn")
    parser.add_argument("--crop-pixels", type=int, default=224, help="side of the clips")
    parser.add_argument("--read-ahead", type=int, default=None, help="samples; default: the config's")
    parser.add_argument("--folder", type=Path, help="keep shards here; a second run reuses them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    latency = multiprocessing.get_context("spawn").Value("d", 0.0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        local = shards_of(videos_of(options.videos, folder), folder, {})
        server = started(latency)
        store = fsspec.filesystem("s3")
        store.mkdir("shards")
        store.put(local, BUCKET, recursive=True)
        print(json.dumps(_compare(local, f"{BUCKET}/{Path(local).name}", latency, options), indent=1))
        server.terminate()


def _compare(
    local: str, remote: str, latency: Synchronized[float], options: argparse.Namespace
) -> dict[str, object]:
    def loader(shards: str, **changes: int) -> DataConfig:
        data = data_config(
            shards, decoder="pyav", processes=options.processes, crop_pixels=options.crop_pixels
        )
        if options.read_ahead is not None:
            data = data.model_copy(update={"read_ahead": options.read_ahead})
        return data.model_copy(update=changes)

    slow = options.latency_ms / 1000
    contenders = {
        "local folder": (0.0, loader(local)),
        "s3": (0.0, loader(remote)),
        "s3 with latency": (slow, loader(remote)),
        "s3 with latency, no reading ahead": (slow, loader(remote, read_ahead=0)),
    }
    found: dict[str, list[Speed]] = {name: [] for name in contenders}
    waited: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds):
        for name in sorted(contenders, reverse=bool(number % 2)):
            latency.value, data = contenders[name]
            start = partial(clips_of, data, waited[name])
            found[name].append(speed(start, warm_clips=64, clips=options.clips))
            print(f"round {number + 1}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    rates = {name: statistics.median(one.clips_per_second for one in rows) for name, rows in found.items()}
    pairs = zip(found["s3 with latency"], found["s3"], strict=True)
    kept = statistics.median(a.clips_per_second / b.clips_per_second for a, b in pairs)
    return {
        "latency_ms": options.latency_ms,
        "processes": options.processes,
        "read_ahead": contenders["s3"][1].read_ahead,
        "clips_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ms_waited_for_a_clips_bytes": {
            name: round(1000 * statistics.mean(seconds[8:]), 2) for name, seconds in waited.items()
        },
        "throughput_lost_to_latency": round(1 - kept, 3),
    }


if __name__ == "__main__":
    main()
