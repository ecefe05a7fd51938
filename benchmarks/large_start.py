"""What building a network under ZeRO-3 takes of a rank's memory: in parts, or whole and then cut.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/large_start.py --model video_vit_giant_14

Reported of the rank with most: its part of the parameters, resident memory before (Python, torch and DeepSpeed), and
the peak of resident memory (``VmHWM``, which the kernel keeps) until the parameters are DeepSpeed's. No optimizer yet.
``--whole`` builds the network whole on every rank and has DeepSpeed cut it, as was done before.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from deepspeed import zero
from torch import nn

from cliplift.configs.training import EngineConfig
from cliplift.models import create_model
from cliplift.pipelines.distributed.collectives import Topology, gather_objects, leave, start
from cliplift.pipelines.engine.partitioned_build import built_in_parts, hand_over, move_to


def status_bytes(key: str) -> int:
    """A line of /proc/self/status: ``VmRSS`` now, ``VmHWM`` the most so far."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def measure(options: argparse.Namespace, topology: Topology) -> dict[str, float]:
    """Build once, and say what it took of this rank."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return create_model(options.model, num_classes=options.classes)

    config = {"train_batch_size": topology.world_size, "zero_optimization": {"stage": 3}}
    before, began = status_bytes("VmRSS"), time.monotonic()
    if options.whole:
        module = build()
        zero.Init(module=module, config_dict_or_path=config)
    else:
        module = built_in_parts(build, EngineConfig(device="cpu", zero_stage=3), topology)
        hand_over(move_to(module, topology.device), config, dtype=None)
    seconds = time.monotonic() - began
    parts = [parameter.ds_tensor for parameter in module.parameters()]
    return {
        "parameters": sum(parameter.ds_numel for parameter in module.parameters()),
        "part_bytes": sum(part.numel() * part.element_size() for part in parts),
        "before_bytes": before,
        "peak_bytes": status_bytes("VmHWM"),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="video_vit_giant_14", help="a name from `cliplift models`")
    parser.add_argument("--classes", type=int, default=400)
    parser.add_argument("--whole", action="store_true", help="build whole, then cut: the yardstick")
    parser.add_argument("--json", default=None, help="file for the numbers")
    options = parser.parse_args()
    topology = start(EngineConfig(device="cpu"))
    rows = gather_objects([measure(options, topology)], topology)
    row = {key: max(rank[key] for rank in rows) for key in rows[0]}
    limit = 1.3 * row["part_bytes"] + 1e9
    if topology.is_main:
        gb = {key: value / 1e9 for key, value in row.items()}
        print(
            f"{options.model}, {row['parameters'] / 1e6:.0f} M parameters, {topology.world_size} ranks, "
            f"{'whole, then cut' if options.whole else 'in parts'}: part {gb['part_bytes']:.2f} GB, before "
            f"{gb['before_bytes']:.2f} GB, peak {gb['peak_bytes']:.2f} GB (1.3 parts + 1 GB: {limit / 1e9:.2f}), "
            f"{row['seconds']:.0f} s"
        )
        if options.json:
            Path(options.json).write_text(json.dumps(row, indent=2) + "\n")
    leave(0)


if __name__ == "__main__":
    main()
