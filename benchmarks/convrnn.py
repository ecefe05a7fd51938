"""ConvLSTM against the design most public ones share: ``python benchmarks/convrnn.py --help``.

That design (popularised by ndrplz/ConvLSTM_pytorch) concatenates input and state at every step and convolves both; it
is written down here with the same weights. Both sides are checked to compute the same numbers, then timed in turns,
forward and backward, and the medians are compared. The speed-up depends on the size: on large maps the arithmetic,
which is the same on both sides, is nearly all the time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from floor import timed
from torch import Tensor, nn

from cliplift.models.convrnn.conv_lstm import ConvLSTM


@dataclass(frozen=True, kw_only=True)
class Size:
    """A stack on maps of ``side`` x ``side``; the input needs no gradient, as pixels and frozen features do not."""

    what: str
    batch: int
    frames: int
    channels: int
    hidden: tuple[int, ...]
    side: int
    kernel: int


SIZES = [
    Size(what="patches, 1 clip", batch=1, frames=10, channels=16, hidden=(64,), side=16, kernel=3),
    Size(what="patches", batch=8, frames=10, channels=16, hidden=(64,), side=16, kernel=3),
    Size(what="Moving-MNIST, 5x5", batch=4, frames=10, channels=16, hidden=(64, 64), side=16, kernel=5),
    Size(what="radar", batch=2, frames=5, channels=4, hidden=(64, 64), side=50, kernel=3),
    Size(what="pixels", batch=2, frames=10, channels=1, hidden=(32,), side=64, kernel=5),
    Size(
        what="deep features, two layers", batch=4, frames=10, channels=64, hidden=(64, 64), side=7, kernel=3
    ),
    Size(what="ResNet-18 features", batch=4, frames=10, channels=512, hidden=(256,), side=7, kernel=3),
    Size(what="VGG features, long", batch=2, frames=32, channels=512, hidden=(128,), side=7, kernel=3),
]


class Ours(nn.Module):
    """The hidden states alone: (B, C, T, H, W) -> (B, N, T, H, W)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.stack = ConvLSTM(
            size.channels,
            size.hidden,
            input_kernel=size.kernel,
            hidden_kernel=size.kernel,
            peephole="none",
        )

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.stack(x)[0]
        return states


class ConcatenatingCell(nn.Module):
    """One step: a convolution of [x, h]."""

    def __init__(self, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.conv = nn.Conv2d(channels + hidden, 4 * hidden, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = torch.split(self.conv(torch.cat([x, h], dim=1)), self.hidden, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class Concatenating(nn.Module):
    """The design compared with, step by step and layer by layer, on (B, T, C, H, W)."""

    def __init__(self, ours: Ours) -> None:
        super().__init__()
        self.cells = nn.ModuleList()
        for layer in ours.stack.layers:
            cell = ConcatenatingCell(layer.in_channels, layer.channels, layer.input_kernel)
            with torch.no_grad():
                cell.conv.weight.copy_(torch.cat([layer.weight_input, layer.weight_hidden], dim=1))
                cell.conv.bias.copy_(layer.bias)
            self.cells.append(cell)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _, H, W = x.shape
        for cell in self.cells:
            h = c = x.new_zeros(B, cell.hidden, H, W)
            states = []
            for t in range(T):
                h, c = cell(x[:, t], h, c)
                states.append(h)
            x = torch.stack(states, dim=1)
        return x


@dataclass(frozen=True, kw_only=True)
class Result:
    size: Size
    ours_ms: float
    concatenating_ms: float
    speedup: float
    slowest_round: float  # speed-ups of neighbouring passes: how much the machine was disturbed
    fastest_round: float


def compare(size: Size, *, rounds: int, device: str) -> Result:
    """Medians of ``rounds`` alternating forward+backward passes; the first of each kind is thrown away.

    Raises:
        RuntimeError: the two do not compute the same.
    """
    torch.manual_seed(0)
    ours = Ours(size).to(device)
    other = Concatenating(ours).to(device)
    x = torch.randn(size.batch, size.channels, size.frames, size.side, size.side, device=device)
    steps = x.transpose(1, 2).contiguous()  # each side gets the layout it likes
    with torch.no_grad():
        error = (ours(x).transpose(1, 2) - other(steps)).abs().max().item()
    if error > 1e-4:
        raise RuntimeError(f"{size.what}: the two compute different things ({error:.2e})")
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for side in (0, 1) if i % 2 else (1, 0):
            elapsed = timed(lambda: other(steps), other) if side else timed(lambda: ours(x), ours)
            if i:
                seconds[side].append(elapsed)
    ours_s, other_s = (statistics.median(s) for s in seconds)
    each = [b / a for a, b in zip(*seconds, strict=True)]
    return Result(
        size=size,
        ours_ms=ours_s * 1e3,
        concatenating_ms=other_s * 1e3,
        speedup=other_s / ours_s,
        slowest_round=min(each),
        fastest_round=max(each),
    )


def main() -> int:
    """Compare and print a table; exit code 1 when no size reaches ``--goal`` or one is below ``--limit``."""
    parser = argparse.ArgumentParser(
        description="ConvLSTM against the design that convolves [x, h] each step"
    )
    parser.add_argument("--only", nargs="*", help="names of the sizes to run")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--goal", type=float, default=1.5)
    parser.add_argument("--limit", type=float, default=0.97)
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} threads, {arguments.device}")
    print("| maps | B×C×T×H×W | states | kernel | ms | concatenating ms | speed-up | rounds |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | --- |")
    results = []
    chosen = [size for size in SIZES if arguments.only is None or size.what in arguments.only]
    if not chosen:
        parser.error(f"--only: choose from {[size.what for size in SIZES]}")
    for size in chosen:
        r = compare(size, rounds=arguments.rounds, device=arguments.device)
        results.append(r)
        shape = f"{size.batch}×{size.channels}×{size.frames}×{size.side}×{size.side}"
        print(
            f"| {size.what} | {shape} | {'-'.join(map(str, size.hidden))} | {size.kernel} | {r.ours_ms:.1f} "
            f"| {r.concatenating_ms:.1f} | {r.speedup:.2f} | {r.slowest_round:.2f} to {r.fastest_round:.2f} |",
            flush=True,
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(r) for r in results], indent=2), encoding="utf-8")
    best, worst = max(r.speedup for r in results), min(r.speedup for r in results)
    print(f"best {best:.2f} (goal {arguments.goal}), worst {worst:.2f} (limit {arguments.limit})")
    return 0 if best >= arguments.goal and worst >= arguments.limit else 1


if __name__ == "__main__":
    sys.exit(main())
