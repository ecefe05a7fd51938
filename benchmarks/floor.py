"""Time a model's forward and backward pass against the same arithmetic written plainly.

The floor is a function on the model's own weights that calls torch.nn.functional and nothing of ours. Both sides are
checked to compute the same numbers, then timed in turns, and the medians are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Floor = Callable[["Weights", Tensor], Tensor]


class Weights:
    """A model's tensors by name, and the three layers every floor needs."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def conv(self, x: Tensor, name: str, *, stride: object = 1, padding: object = 0) -> Tensor:
        function = F.conv3d if x.ndim == 5 else F.conv2d
        return function(
            x,
            self.tensors[f"{name}.weight"],
            self.tensors.get(f"{name}.bias"),
            stride=stride,
            padding=padding,
        )

    def norm(self, x: Tensor, name: str) -> Tensor:
        t = self.tensors
        t[f"{name}.num_batches_tracked"].add_(1)
        return F.batch_norm(
            x,
            t[f"{name}.running_mean"],
            t[f"{name}.running_var"],
            t[f"{name}.weight"],
            t[f"{name}.bias"],
            training=True,
        )

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: a way to build the model, its floor, and the input (B, C, T, H, W)."""

    name: str
    build: Callable[[], nn.Module]
    floor: Floor
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    name: str
    shape: tuple[int, ...]
    model_ms: float
    floor_ms: float
    ratio: float
    channels_last_ms: float | None
    compiled_ms: float | None


def compare(case: Case, *, rounds: int, device: str, channels_last: bool, compiled: bool) -> Result:
    """Medians of ``rounds`` alternating forward+backward passes; the first of each kind is thrown away.

    Raises:
        RuntimeError: model and floor do not compute the same.
    """
    torch.manual_seed(0)
    model = case.build().to(device).train()
    x = torch.randn(case.shape, device=device)
    weights = Weights(model)
    with torch.no_grad():
        ours, plain = model(x), case.floor(weights, x)
    if not torch.allclose(ours, plain, rtol=1e-3, atol=1e-4 * max(1.0, float(plain.abs().max()))):
        raise RuntimeError(
            f"{case.name}: the floor computes something else ({(ours - plain).abs().max():.2e})"
        )
    sides: list[Callable[[], Tensor]] = [lambda: model(x), lambda: case.floor(weights, x)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for side in (0, 1) if i % 2 else (1, 0):
            elapsed = timed(sides[side], model)
            if i:
                seconds[side].append(elapsed)
    model_s, floor_s = (statistics.median(s) for s in seconds)
    last_s = compiled_s = None
    if compiled:
        torch.compiler.reset()  # the sizes of the case before would make these dynamic
        fast = torch.compile(model, dynamic=False)
        compiled_s = median_seconds(lambda: fast(x), model, rounds)
    if channels_last:
        layout = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
        model, x = model.to(memory_format=layout), x.to(memory_format=layout)
        last_s = median_seconds(lambda: model(x), model, rounds)
    return Result(
        name=case.name,
        shape=case.shape,
        model_ms=model_s * 1e3,
        floor_ms=floor_s * 1e3,
        ratio=model_s / floor_s,
        channels_last_ms=None if last_s is None else last_s * 1e3,
        compiled_ms=None if compiled_s is None else compiled_s * 1e3,
    )


def median_seconds(step: Callable[[], Tensor], model: nn.Module, rounds: int) -> float:
    """Median seconds of a forward and backward pass, after one that is thrown away."""
    return statistics.median([timed(step, model) for _ in range(rounds + 1)][1:])


def timed(step: Callable[[], Tensor], model: nn.Module) -> float:
    """Seconds of one forward and backward pass; gradients start from None."""
    model.zero_grad(set_to_none=True)
    synchronise()
    start = time.perf_counter()
    step().sum().backward()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(cases: list[Case]) -> int:
    """Parse the command line, compare, print a table; exit code 1 when a ratio is above ``--limit``."""
    parser = argparse.ArgumentParser(description="forward+backward time against the plain PyTorch floor")
    parser.add_argument("--only", nargs="*", help="names of the cases to run")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--limit", type=float, default=1.03)
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} threads, {arguments.device}")
    print("| model | input | ms | floor ms | ratio | channels-last ms | compiled ms |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    results = []
    for case in cases:
        if arguments.only and case.name not in arguments.only:
            continue
        r = compare(
            case,
            rounds=arguments.rounds,
            device=arguments.device,
            channels_last=arguments.channels_last,
            compiled=arguments.compile,
        )
        results.append(r)
        extra = " | ".join("" if ms is None else f"{ms:.1f}" for ms in (r.channels_last_ms, r.compiled_ms))
        shape = "×".join(map(str, r.shape))
        print(
            f"| {r.name} | {shape} | {r.model_ms:.1f} | {r.floor_ms:.1f} | {r.ratio:.3f} | {extra} |",
            flush=True,
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump([dataclasses.asdict(r) for r in results], file, indent=2)
    slow = [r.name for r in results if r.ratio > arguments.limit]
    if slow:
        print(f"above {arguments.limit}: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0
