"""What a checkpoint costs each rank: memory, bytes, time; beside a design that gathers the whole on every rank.

    python -m torch.distributed.run --standalone --nproc-per-node 4 benchmarks/checkpoint.py --width 384 --depth 12

A video ViT with AdamW under ZeRO 1, 2 and 3 over gloo on this machine. Of each stage, two ways in processes of the same
kind, one after the other: ours (``pipelines/checkpoints``), and ``gathering``, in which every rank assembles all fp32
weights and optimizer state and rank 0 writes them (what formats 1 and 2 did, kept here as the yardstick). Reported of
the rank with most:

* ``share``: bytes of state the rank keeps (masters and moments), and ``whole``: of all ranks
* ``peak``: anonymous memory (``RssAnon``) above that before the save, read every millisecond by a thread
* ``written``: bytes of files, ``stall``: seconds in ``save`` while the training waits, beside a bare ``copy``
  of what is saved; of both the median of three, and of the ranks the largest
* ``read``: bytes of values read to continue, from the reader's own count

Memory that maps files is not counted: the kernel takes it back at need. Times are of this machine's disk and cores.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cliplift.configs.training import EngineConfig
from cliplift.models import create_model
from cliplift.pipelines.checkpoints.folder import checkpoint_path
from cliplift.pipelines.checkpoints.saved import open_checkpoint
from cliplift.pipelines.checkpoints.saver import Saver, Snapshot
from cliplift.pipelines.distributed.collectives import Topology, gather_objects, leave, start
from cliplift.pipelines.engine.partitioned_build import built_in_parts, hand_over
from cliplift.pipelines.engine.zero_state import (
    fragments,
    load_parameters,
    local_masters,
    optimizer_slices,
    parameter_slices,
    restore_optimizer,
)

WAYS = ("gathering", "slices", "asynchronous")
REPEATS = 3  # saves of which the median stall is told
M_MMAP_THRESHOLD = -3  # of mallopt
BUCKET = 10_000_000  # elements that DeepSpeed reduces or gathers at once


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class PeakMemory:
    """The most anonymous memory above that at the start, sampled every millisecond while the block runs."""

    def __enter__(self) -> PeakMemory:
        self.above, self._over = 0, threading.Event()
        self._before = anonymous_bytes()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self.above = max(self.above, anonymous_bytes() - self._before)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def build(stage: int, options: argparse.Namespace, topology: Topology) -> Any:
    """A DeepSpeed engine after one step, so that there is optimizer state."""
    torch.manual_seed(0)
    sizes = {
        "width": options.width,
        "hidden": 4 * options.width,
        "depth": options.depth,
        "heads": options.width // 64,
    }

    def network() -> nn.Module:
        return create_model("video_vit_small_16", num_classes=10, in_frames=4, crop=32, **sizes)

    module = built_in_parts(network, EngineConfig(device="cpu", zero_stage=stage), topology)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)  # without tensors between
    config = {
        "train_batch_size": dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 1,
        # Buckets as large as their defaults would be most of the memory here, and so would the parameters that stage 3
        # keeps whole between their uses.
        "zero_optimization": {"stage": stage, "overlap_comm": False, "reduce_bucket_size": BUCKET,
                              "allgather_bucket_size": BUCKET, "stage3_max_live_parameters": BUCKET,
                              "stage3_max_reuse_distance": BUCKET, "stage3_prefetch_bucket_size": BUCKET,
                              "sub_group_size": 2 * BUCKET},
        "steps_per_print": 10**9,
    }  # fmt: skip
    hand_over(module, config, dtype=None)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    step(engine)
    return engine


def step(engine: Any) -> None:
    clips = torch.randn(1, 3, 4, 32, 32)
    engine.backward(engine(clips).square().mean())
    engine.step()


def gathered(engine: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All fp32 weights and optimizer state, whole, on every rank: one collective a tensor."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    parameters, optimizer = {}, {}
    for name, parameter in engine.module.named_parameters():
        parameters[name] = safe_get_full_fp32_param(parameter).detach().cpu().clone()
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer[f"{name}|{key}"] = safe_get_full_optimizer_state(parameter, key).detach().cpu().clone()
    return parameters, optimizer


def save_gathered(engine: Any, folder: Path) -> None:
    parameters, optimizer = gathered(engine)
    if dist.get_rank() == 0:
        save_file(parameters, folder / "parameters.safetensors")
        save_file(optimizer, folder / "optimizer.safetensors")
    dist.barrier()


def load_gathered(engine: Any, folder: Path) -> int:
    """Every rank reads everything and keeps its part; returns the bytes read."""
    parameters, optimizer = (
        load_file(folder / f"{kind}.safetensors") for kind in ("parameters", "optimizer")
    )
    masters = local_masters(engine)
    torch_optimizer = engine.optimizer.optimizer
    with torch.no_grad():
        for part in fragments(engine):
            cut = slice(part.start, part.start + part.length)
            part.of(masters).copy_(parameters[part.name].flatten()[cut])
            for key in ("exp_avg", "exp_avg_sq"):
                state = torch_optimizer.state[masters[part.flat]][key].view(-1)
                state.narrow(0, part.offset, part.length).copy_(
                    optimizer[f"{part.name}|{key}"].flatten()[cut]
                )
    return sum(t.numel() * t.element_size() for t in (*parameters.values(), *optimizer.values()))


def snapshot(engine: Any) -> Snapshot:
    return Snapshot(
        parameters=parameter_slices(engine), optimizer=optimizer_slices(engine), buffers={}, random_state={},
        state={"step": 1},
    )  # fmt: skip


def load_slices(engine: Any, path: Path, topology: Topology) -> int:
    saved = open_checkpoint(path, topology=topology)
    load_parameters(engine, saved.parameters)
    restore_optimizer(engine, saved.optimizer)
    return saved.bytes_read


class Measured(NamedTuple):
    """Of one act: the memory above that before it, seconds of wall clock and of this thread's processor time."""

    peak: int
    seconds: float
    processor_seconds: float
    found: Any


def measured(act: Callable[[], Any]) -> Measured:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before is taken again and not seen
    dist.barrier()
    with PeakMemory() as peak:
        began, processor = time.monotonic(), time.thread_time()
        found = act()
        # Before the thread that samples is waited for.
        seconds, processor = time.monotonic() - began, time.thread_time() - processor
    return Measured(peak.above, seconds, processor, found)


def share_bytes(engine: Any) -> int:
    """fp32 masters and both moments of this rank's elements."""
    return 3 * 4 * sum(part.length for part in fragments(engine))


def save(engine: Any, folder: Path, saver: Saver) -> dict[str, Any]:
    """One save, and a bare copy of what it saves."""
    copy = measured(lambda: snapshot(engine).copied())._replace(found=None)
    stall = measured(lambda: saver.save(folder, snapshot(engine), keep_last=1))
    finish = measured(saver.wait)
    held = share_bytes(engine) if saver.asynchronous else 0
    return {
        "copy": copy.seconds, "copy_processor": copy.processor_seconds,
        "stall": stall.seconds, "stall_processor": stall.processor_seconds,
        "finish": finish.seconds, "peak": max(stall.peak, finish.peak + held),
    }  # fmt: skip


def measure(
    stage: int, way: str, options: argparse.Namespace, topology: Topology, place: Path
) -> dict[str, Any]:
    """One row: of each number, the largest over the ranks; of the bytes written, every rank's."""
    engine = build(stage, options, topology)
    folder = place / f"{way}{stage}"
    folder.mkdir(parents=True, exist_ok=True)
    if way == "gathering":
        gathering = measured(lambda: save_gathered(engine, folder))
        saved = {"copy": 0.0, "copy_processor": 0.0, "stall": gathering.seconds,
                 "stall_processor": gathering.processor_seconds, "finish": 0.0, "peak": gathering.peak}  # fmt: skip
        written = sum(f.stat().st_size for f in folder.iterdir()) if topology.is_main else 0
        load = measured(lambda: load_gathered(engine, folder))
    else:
        saver = Saver(topology, asynchronous=way == "asynchronous")
        saves = [save(engine, folder, saver) for _ in range(REPEATS)]
        saved = {key: statistics.median(each[key] for each in saves) for key in saves[0]}
        saved["peak"] = max(each["peak"] for each in saves)
        path = checkpoint_path(folder, 1)
        written = sum(f.stat().st_size for f in path.glob(f"*-rank{topology.rank}.safetensors"))
        load = measured(lambda: load_slices(engine, path, topology))
    row = {
        "share": share_bytes(engine), "written": written, **saved,
        "read": load.found, "load_peak": load.peak, "load_seconds": load.seconds,
    }  # fmt: skip
    ranks = gather_objects([row], topology)
    step(engine)
    engine.destroy()
    return {"stage": stage, "way": way, "whole": sum(r["share"] for r in ranks),
            "written_by_rank": [r["written"] for r in ranks],
            **{key: max(r[key] for r in ranks) for key in row}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=384, help="of the video ViT, a multiple of 64")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the video ViT")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--folder", default=None, help="where checkpoints are written; default: temporary")
    parser.add_argument("--json", default=None, help="file for the rows")
    options = parser.parse_args()
    # Large tensors are mapped each for itself and given back when freed, so that what is measured is what is held.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    topology = start(EngineConfig(device="cpu"))
    place = [tempfile.mkdtemp(dir=options.folder)]
    dist.broadcast_object_list(place, src=0)
    rows = []
    for stage in options.stages:
        for way in options.ways:
            row = measure(stage, way, options, topology, Path(place[0]))
            rows.append(row)
            if topology.is_main:
                print(said(row), flush=True)
    dist.barrier()
    if topology.is_main:
        shutil.rmtree(place[0])
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")
    leave(0)


def said(row: dict[str, Any]) -> str:
    mb = {key: row[key] / 1e6 for key in ("share", "whole", "peak", "read", "load_peak")}
    written = "+".join(f"{n / 1e6:.0f}" for n in row["written_by_rank"])
    return (
        f"ZeRO-{row['stage']} {row['way']:12s} whole {mb['whole']:.0f} MB, share {mb['share']:.0f}; "
        f"save: peak +{mb['peak']:.0f} MB ({row['peak'] / row['share']:.2f} of the share), written {written} MB, "
        f"stall {row['stall']:.2f} s, {row['stall_processor']:.2f} s of processor (a copy of the share "
        f"{row['copy']:.2f} s, {row['copy_processor']:.2f}), then {row['finish']:.2f} s; "
        f"load: {mb['read']:.0f} MB read ({row['read'] / row['share']:.2f}), peak +{mb['load_peak']:.0f} MB, "
        f"{row['load_seconds']:.2f} s"
    )


if __name__ == "__main__":
    main()
