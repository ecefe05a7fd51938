"""Forks groups of ranks that share every clip: networks alone, or whole runs; rank 0 writes what they found.

Not a test itself; test_sequence_parallel.py compares it with one process. Importing takes a rank of an ordinary launch
several seconds of processor time, and a fork has it all; the ranks are processes of their own that meet by gloo.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.training import EngineConfig
from cliplift.models import create_model
from cliplift.models.video_vit.decoder import MaskedAutoencoder
from cliplift.models.video_vit.masks import MaskDraws, random_mask, token_numbers
from cliplift.pipelines.compute.recompute import recompute_blocks
from cliplift.pipelines.distributed.collectives import all_reduce_max, all_reduce_mean, leave, start
from cliplift.pipelines.distributed.sequence import sequence_group, share_clips
from cliplift.pipelines.stages.run import run_stage

CLASSES, CLIPS, FRAMES, SIDE = 5, 4, 6, 24
TINY = {"patch": 8, "width": 48, "depth": 2, "heads": 4, "hidden": 96, "crop": SIDE}
# 27 tokens, 9 for each of 3 places in time: neither 2 nor 4 ranks have whole frames, or equally many tokens.
CASES: dict[str, dict[str, Any]] = {
    "recomputed": {"name": "video_vit_tiny_8", "drop_path": 0.5},
    "trilinear": {"name": "video_vit_tiny_8", "position_resize": "trilinear", "in_frames": 8},
    "attentive": {"name": "vjepa2_large_16", "head": "attentive", "probe_heads": 4},
    "levels": {"name": "vjepa21_base_16", "depth": 12, "width": 24, "hidden": 24, "head": "linear"},
    "masked": {"name": "video_vit_tiny_8", "final_norm": "tokens"},
    "masked twice": {"name": "vjepa2_large_16", "head": "linear"},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def network_of(case: str, dtype: torch.dtype) -> nn.Module:
    options = {"in_frames": FRAMES} | TINY | CASES[case]
    torch.manual_seed(0)
    masked = case.startswith("masked")
    network: nn.Module = create_model(options.pop("name"), num_classes=0 if masked else CLASSES, **options)
    if case == "recomputed":
        recompute_blocks(network, 0.5)
    if masked:
        network = MaskedAutoencoder(network, width=24, depth=1, heads=4)  # type: ignore[arg-type]
    return network.to(dtype).train()


def loss_of(network: nn.Module, clips: Tensor, numbers: Tensor) -> Tensor:
    """Of clips (B, C, T, H, W), of which ``numbers`` (B,) give labels and masks."""
    if not isinstance(network, MaskedAutoencoder):
        return F.cross_entropy(network(clips), numbers, label_smoothing=0.1)
    draws = MaskDraws(0, torch.zeros_like(numbers), numbers)
    grid = network.encoder.grid(FRAMES, SIDE)
    visible, hidden = token_numbers(random_mask(grid, draws, ratio=0.6))
    # Rotary positions in the encoder and none in the decoder; of what it decodes, some is visible and does not count.
    decoded = (
        torch.cat([visible[:, 3:6], hidden[:, ::2]], dim=1) if network.encoder.positions == "rope" else None
    )
    found: Tensor = network(clips, visible, decoded).loss
    return found


class SavedBytes:
    """Bytes of the distinct storages that autograd keeps for the backward pass, parameters and clips left out."""

    def __init__(self, known: list[Tensor]) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.kept: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self.known:
            self.kept[place] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())


def computed(network: nn.Module, *, data_rank: int, data_ranks: int) -> dict[str, Tensor]:
    """Loss and gradients of one data rank's clips, and the bytes kept between forward and backward."""
    made = torch.Generator().manual_seed(1)
    pixels = torch.randn(CLIPS, 3, FRAMES, SIDE, SIDE, generator=made, dtype=torch.float64)
    own = slice(data_rank * CLIPS // data_ranks, (data_rank + 1) * CLIPS // data_ranks)
    clips = pixels[own].to(next(network.parameters()).dtype)
    saved = SavedBytes([*network.parameters(), clips])
    torch.manual_seed(2)  # of drop path
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        loss = loss_of(network, clips, torch.arange(CLIPS)[own])
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return gradients | {"loss": loss.detach(), "bytes": torch.tensor(float(saved.bytes))}


def compute_cases(folder: Path, compared: list[tuple[str, int, str]]) -> None:
    """The mean over the ranks, as DeepSpeed makes it, and the most bytes that one of them keeps."""
    found: dict[str, Tensor] = {}
    for dtype, size, case in compared:
        topology = start(EngineConfig(device="cpu", sequence_parallel=size))
        network = network_of(case, DTYPES[dtype])
        share_clips(network, sequence_group(topology, timeout_seconds=60))
        mine = computed(network, data_rank=topology.data_rank, data_ranks=topology.data_ranks)
        kept = torch.tensor(all_reduce_max(float(mine["bytes"]), topology))
        means = {name: all_reduce_mean(value, topology) for name, value in mine.items()}
        found |= {f"{dtype} {size} {case}: {n}": value for n, value in (means | {"bytes": kept}).items()}
    if topology.is_main:
        save_file(found, folder / "found.safetensors")


def train(recipe: str, words: list[str]) -> None:
    run = load_run(Path(recipe), RUNS, words).run
    assert run_stage(run, command=["cliplift"]).finished


def fork_rank(rank: int, ranks: int, port: int, job: dict[str, Any]) -> int:
    process = os.fork()
    if process:
        return process
    try:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in places.items()}
        if "cases" in job:
            compute_cases(Path(job["cases"]), job["compared"])
        else:
            train(job["recipe"], job["words"])
        leave(0)
        os._exit(0)  # a rank alone
    except BaseException:  # the process ends here, whatever it was
        traceback.print_exc()
    os._exit(1)


def main(jobs: list[dict[str, Any]]) -> None:
    """One job after the other, each on ranks of its own; ``copy`` is copied to the second place before."""
    import deepspeed  # noqa: F401 (what takes long)

    for job in jobs:
        if "copy" in job:
            shutil.copytree(*job["copy"])
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = int(found.getsockname()[1])
        ranks = [fork_rank(rank, job["ranks"], port, job) for rank in range(job["ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        assert not any(codes), (job, codes)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
