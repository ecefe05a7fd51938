"""Speed of the clip loader: against a bare decode loop, against other ways to read, and over encodings.

    python benchmarks/loading.py [VIDEOS ...] [--processes 1] [--rounds 3] [--folder FOLDER]

VIDEOS are folders of videos; without any, ``../shared/data`` beside the repository, else the demo's own clips. They
are packed with the default settings, then every contender is run in turn for a fixed number of clips, the order
reversed every other round, so that a busy moment of the machine hits all of them:

* ``bare BACKEND``: a plain loop over the library: the frames that the loader decodes, from bytes already in memory.
* ``decode BACKEND``: the same frames by cliplift's decoding function, and nothing else.
* ``loader BACKEND``: cliplift's loader: read, check, decode, cut, resize, collate, send.
* ``webdataset``: stock ``webdataset`` + decord on the same shards.
* ``webdataset_originals``: the same on tars of the original files.
* ``files_originals``: a plain torch ``Dataset`` that opens the original files with decord.

All but the first two cut a random box and resize it with the same code. Prints one JSON object. Encodings and
backends are compared by ``benchmarks/encodings.py``.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from queue import Queue
from typing import NamedTuple

import av
import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset, default_collate

from cliplift.configs.data import DataConfig
from cliplift.configs.sharding import ShardRun
from cliplift.configs.sources import VIDEO_SUFFIXES
from cliplift.pipelines.cost.loading_speed import descendants_cpu_seconds
from cliplift.pipelines.data.clip_plan import cut, training_box
from cliplift.pipelines.data.loader import ClipLoader
from cliplift.sharding.build.pool import ENVIRONMENT
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames

BATCH = 8
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


class Speed(NamedTuple):
    clips_per_second: float
    cpu_ms_per_clip: float


def shards_of(videos: Sequence[Path], folder: Path, transcode: Mapping[str, object]) -> str:
    """A dataset of the videos in windows of ten seconds, built unless it is there."""
    listing = folder / "videos.csv"
    listing.write_text("path\n" + "".join(f"{path.resolve()}\n" for path in videos))
    name = "-".join(str(value) for value in transcode.values()) or "default"
    run = ShardRun.model_validate(
        {
            "name": name,
            "output": str(folder / name),
            "source": {"kind": "csv", "file": str(listing), "label_column": None},
            "cut": {"kind": "windows", "length_seconds": 10.0},
            "transcode": transcode,
            "shards": {"videos_per_shard": 32},
            "limits": {"max_refused_share": 0.5},
        }
    )
    run_shard(run)
    return run.output


def data_config(shards: str, *, decoder: str, processes: int, crop_pixels: int) -> DataConfig:
    tree = {"shards": shards, "decoder": decoder, "workers": processes, "crop_pixels": crop_pixels}
    return DataConfig.model_validate(tree | {"prefetch_batches": 2})


def loader_of(data: DataConfig) -> ClipLoader:
    return ClipLoader(data, seed=0, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1)


def ours(data: DataConfig) -> Iterator[int]:
    """Clips in each batch of the loader, without end."""
    with closing(loader_of(data)) as loader:
        for batch in loader.micro_batches(start_step=0, stop_step=1_000_000):
            yield len(batch.labels)


def decoding_alone(data: DataConfig, decode: Callable[[bytes, list[int]], object]) -> Iterator[int]:
    """Decode the loader's frames in as many processes; eight clips are reported at a time, as a batch would be."""
    loader = loader_of(data)
    work: list[tuple[bytes, list[int]]] = []
    for request in itertools.islice(loader.requests(start_step=0, stop_step=1000), 64):
        for index in (loader.order.draw(request.epoch, at).sample for at in request.positions):
            frames = loader.dataset.plan(index, request.epoch).frames[0]
            work.append((loader.dataset.read(index), frames.tolist()))
    context = multiprocessing.get_context("forkserver")
    done = context.Queue()
    processes = [
        context.Process(target=_decode_for_ever, args=(work[n :: data.workers], decode, done), daemon=True)
        for n in range(data.workers)
    ]
    for process in processes:
        process.start()
    try:
        while True:
            yield done.get(timeout=60)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _decode_for_ever(
    work: list[tuple[bytes, list[int]]], decode: Callable[[bytes, list[int]], object], done: Queue[int]
) -> None:
    for number, (data, frames) in enumerate(itertools.cycle(work), start=1):
        decode(data, frames)
        if number % BATCH == 0:
            done.put(BATCH)


def bare_decord(data: bytes, frames: list[int]) -> object:
    import decord

    return decord.VideoReader(io.BytesIO(data), num_threads=1).get_batch(frames).asnumpy()


def bare_pyav(data: bytes, frames: list[int]) -> object:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        step = 1 / (stream.average_rate * stream.time_base)
        wanted, found = set(frames), {}
        container.seek(int(min(frames) * step), stream=stream)
        for frame in container.decode(stream):
            number = round(frame.pts / step)
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
                if len(found) == len(wanted):
                    break
        return np.stack([found[number] for number in frames])


def bare_torchcodec(data: bytes, frames: list[int]) -> object:
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

    return VideoDecoder(data, num_ffmpeg_threads=1, dimension_order="NHWC").get_frames_at(indices=frames).data


BARE = {"decord": bare_decord, "pyav": bare_pyav, "torchcodec": bare_torchcodec}


class CommonRecipe:
    """What most training code does with a video: decord, 16 frames at stride 2 from a random start, a random box."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data

    def __call__(self, video: bytes | str) -> torch.Tensor:
        import decord

        reader = decord.VideoReader(io.BytesIO(video) if isinstance(video, bytes) else video, num_threads=1)
        rng = np.random.default_rng()
        start = int(rng.integers(max(1, len(reader) - 30)))
        frames = reader.get_batch([(start + 2 * k) % len(reader) for k in range(16)]).asnumpy()
        box = training_box(
            self.data.augment, self.data, height=frames.shape[1], width=frames.shape[2], rng=rng
        )
        return cut(frames, box, pixels=self.data.crop_pixels)


class OriginalFiles(Dataset[torch.Tensor]):
    """The plain map-style dataset over files."""

    def __init__(self, files: Sequence[Path], data: DataConfig) -> None:
        self.files, self.recipe = files, CommonRecipe(data)

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.recipe(str(self.files[index % len(self.files)]))


def from_files(files: Sequence[Path], data: DataConfig) -> Iterator[int]:
    batches = DataLoader(OriginalFiles(files, data), batch_size=BATCH, shuffle=False, num_workers=data.workers,
                         multiprocessing_context="forkserver")  # fmt: skip
    return (len(clips) for clips in batches)


def from_webdataset(tars: Sequence[str], data: DataConfig) -> Iterator[int]:
    dataset = (
        webdataset.WebDataset(list(tars), resampled=True)
        .shuffle(64)
        .to_tuple("mp4")
        .map_tuple(CommonRecipe(data))
        .batched(BATCH, collation_fn=default_collate)
    )
    batches = DataLoader(dataset, batch_size=None, num_workers=data.workers,
                         multiprocessing_context="forkserver")  # fmt: skip
    return (len(clips) for (clips,) in batches)


def pack_originals(files: Sequence[Path], folder: Path) -> list[str]:
    """The files as they are, in tars of 32."""
    folder.mkdir(exist_ok=True)
    tars = []
    for start in range(0, len(files), 32):
        tars.append(str(folder / f"originals-{start:06d}.tar"))
        with webdataset.TarWriter(tars[-1]) as writer:
            for number, file in enumerate(files[start : start + 32]):
                writer.write({"__key__": f"{start + number:06d}", "mp4": file.read_bytes()})
    return tars


def speed(start: Callable[[], Iterator[int]], *, warm_clips: int, clips: int) -> Speed:
    """Throughput after a warm-up. There is more to do than is timed, so that the queues stay as full as they were."""
    batches = start()
    try:
        seen = 0
        while seen < warm_clips:
            seen += next(batches)
        cpu, began, seen = descendants_cpu_seconds(), time.perf_counter(), 0
        while seen < clips:
            seen += next(batches)
        wall = time.perf_counter() - began
        return Speed(seen / wall, 1000 * (descendants_cpu_seconds() - cpu) / seen)
    finally:
        if hasattr(batches, "close"):
            batches.close()


def compare(videos: Sequence[Path], folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Every contender in turn, rounds alternating."""
    shards = shards_of(videos, folder, {})
    originals = pack_originals(videos, folder / "originals")
    tars = sorted(str(path) for path in Path(shards).rglob("*.tar"))
    contenders: dict[str, Callable[[], Iterator[int]]] = {}
    for decoder in usable_decoders(shards):
        data = data_config(
            shards, decoder=decoder, processes=options.processes, crop_pixels=options.crop_pixels
        )
        contenders[f"bare {decoder}"] = lambda data=data: decoding_alone(data, BARE[data.decoder])
        function = partial(decode_frames, decoder=decoder)  # type: ignore[arg-type]
        contenders[f"decode {decoder}"] = lambda data=data, function=function: decoding_alone(data, function)
        contenders[f"loader {decoder}"] = lambda data=data: ours(data)
    contenders["webdataset"] = lambda: from_webdataset(tars, data)
    contenders["webdataset_originals"] = lambda: from_webdataset(originals, data)
    contenders["files_originals"] = lambda: from_files(videos, data)
    found: dict[str, list[Speed]] = {name: [] for name in contenders}
    for number in range(options.rounds):
        for name in sorted(contenders, reverse=bool(number % 2)):
            found[name].append(speed(contenders[name], warm_clips=options.clips // 4, clips=options.clips))
            print(f"round {number + 1}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    median = {name: Speed(*map(statistics.median, zip(*rows, strict=True))) for name, rows in found.items()}
    return {
        "clips_per_second": {name: round(one.clips_per_second, 1) for name, one in median.items()},
        "cpu_ms_per_clip": {name: round(one.cpu_ms_per_clip, 2) for name, one in median.items()},
        "ratios": _ratios(found, usable_decoders(shards)),
    }


def _ratios(found: dict[str, list[Speed]], decoders: Sequence[str]) -> dict[str, dict[str, float]]:
    """The loader over each rival: the median of the rounds' ratios, by wall clock and by CPU time."""

    def over(a: str, b: str) -> dict[str, float]:
        pairs = list(zip(found[a], found[b], strict=True))
        return {
            "wall": round(statistics.median(x.clips_per_second / y.clips_per_second for x, y in pairs), 3),
            "cpu": round(statistics.median(y.cpu_ms_per_clip / x.cpu_ms_per_clip for x, y in pairs), 3),
        }

    rivals = ("webdataset", "webdataset_originals", "files_originals")
    return {
        f"loader {d} / {rival}": over(f"loader {d}", rival)
        for d in decoders
        for rival in (f"bare {d}", f"decode {d}", *rivals)
    }


def usable_decoders(shards: str) -> list[str]:
    """The backends that are installed and work here."""
    data = data_config(shards, decoder="pyav", processes=0, crop_pixels=112)
    clip = loader_of(data).dataset.read(0)
    usable = []
    for decoder in ("decord", "pyav", "torchcodec"):
        try:
            decode_frames(clip, [0], decoder=decoder)  # type: ignore[arg-type]
            usable.append(decoder)
        except VideoDecodeError as error:
            if "install" not in str(error) and "usable" not in str(error):
                raise
    return usable


def videos_of(folders: Sequence[Path], scratch: Path) -> list[Path]:
    if not folders and not SHARED.is_dir():
        write_demo_videos(scratch / "demo", seed=0, train_per_class=10, val_per_class=1, test_per_class=1,
                          unlabelled=20, size_pixels=128)  # fmt: skip
    roots = folders or [SHARED if SHARED.is_dir() else scratch / "demo"]
    return sorted(p for root in roots for p in root.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, nargs="*", help="folders of videos")
    parser.add_argument("--processes", type=int, default=1, help="decoding processes of every contender")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds")
    parser.add_argument("--clips", type=int, default=400, help="clips timed in each turn")
    parser.add_argument("--crop-pixels", type=int, default=112, help="side of the clips")
    parser.add_argument("--folder", type=Path, help="keep shards here; a second run reuses them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        videos = videos_of(options.videos, folder)
        if not videos:
            sys.exit(f"{options.videos} hold no video")
        results: dict[str, object] = {"videos": len(videos), "processes": options.processes,
                                      "crop_pixels": options.crop_pixels}  # fmt: skip
        results |= compare(videos, folder, options)
    print(json.dumps(results | {"environment": ENVIRONMENT}, indent=1))


if __name__ == "__main__":
    main()
