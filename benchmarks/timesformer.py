"""TimeSformer against Hugging Face's on the same weights, and its memory: ``python benchmarks/timesformer.py --help``.

``speed``: forward and backward passes of both in turns, after checking that they compute the same logits.
``memory``: peak resident memory of one forward and backward pass, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from floor import synchronise
from torch import Tensor, nn

from cliplift.models import create_model
from cliplift.models.timesformer.huggingface import to_huggingface
from cliplift.pipelines.compute.recompute import recompute_blocks

MODEL = "timesformer_base"


def speed(arguments: argparse.Namespace) -> int:
    """Prints a row per batch size; exit code 1 when a ratio is below ``--goal``."""
    print(
        f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} threads, {arguments.device}, "
        f"{arguments.precision}, {arguments.attention}, median of {arguments.rounds} rounds"
    )
    print("| clips x frames x pixels | ms | its Linear layers alone, ms | transformers ms | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    ratios = [compare(arguments, clips=clips) for clips in arguments.clips]
    if min(ratios) < arguments.goal:
        print(f"below {arguments.goal}", file=sys.stderr)
    return 1 if min(ratios) < arguments.goal else 0


def compare(arguments: argparse.Namespace, *, clips: int) -> float:
    """Times of transformers over ours: the median over rounds in which both ran, the first one thrown away.

    Raises:
        RuntimeError: the two compute different logits.
    """
    torch.manual_seed(0)
    ours, theirs = both(arguments)
    size = (clips, 3, arguments.frames, arguments.crop, arguments.crop)
    x = torch.randn(size, device=arguments.device)
    by_frame = x.transpose(
        1, 2
    ).contiguous()  # (B, T, C, H, W), so that neither side pays for the other's layout
    with torch.no_grad():
        difference = (ours(x) - theirs(by_frame).logits).abs().max().item()
    if difference > 1e-4:
        raise RuntimeError(f"the two models compute different logits ({difference:.2e})")
    sides = ((ours, lambda: ours(x)), (theirs, lambda: theirs(by_frame).logits))
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(arguments.rounds + 1):
        for side in (0, 1) if i % 2 else (1, 0):
            elapsed = timed(*sides[side], autocast=arguments.precision == "autocast_bf16")
            if i:
                seconds[side].append(elapsed)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    mine, other = (statistics.median(s) * 1e3 for s in seconds)
    products = products_ms(*sides[0], autocast=arguments.precision == "autocast_bf16")
    size_text = f"{clips}x{arguments.frames}x{arguments.crop}"
    print(f"| {size_text} | {mine:.0f} | {products:.0f} | {other:.0f} | {ratio:.2f} |", flush=True)
    return ratio


def products_ms(model: nn.Module, step: Callable[[], Tensor], *, autocast: bool) -> float:
    """Milliseconds of the Linear layers of one pass run by themselves: what no implementation can leave out."""
    calls: Counter[tuple[torch.Size, int]] = Counter()
    handles = [
        layer.register_forward_hook(lambda m, x, _: calls.update([(x[0].shape, m.out_features)]))
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        step()
    for handle in handles:
        handle.remove()
    device = next(model.parameters()).device
    total = 0.0
    for (shape, out), count in calls.items():
        layer = nn.Linear(shape[-1], out, device=device)
        x = torch.randn(shape, device=device, requires_grad=True)
        seconds = [timed(layer, partial(layer, x), autocast=autocast) for _ in range(4)]
        total += count * statistics.median(seconds[1:])
    return total * 1e3


def both(arguments: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Ours and Hugging Face's with our random weights, in training mode, without drop path."""
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    ours = create_model(
        MODEL,
        attention=arguments.attention,
        in_frames=arguments.frames,
        crop=arguments.crop,
        drop_path=0.0,
    )
    for name, p in ours.named_parameters():
        if "_fc." in name:  # zero at the start: the time step would not count in the comparison of the logits
            nn.init.normal_(p, std=0.02)
    state, config = to_huggingface(ours)
    theirs = TimesformerForVideoClassification(TimesformerConfig(**config))
    theirs.load_state_dict(state)
    return ours.to(arguments.device).train(), theirs.to(arguments.device).train()


def timed(model: nn.Module, step: Callable[[], Tensor], *, autocast: bool) -> float:
    """Seconds of one forward and backward pass; gradients start from None.

    On a CPU they are processor seconds of all threads, so that other processes of the machine do not count.
    """
    model.zero_grad(set_to_none=True)
    kind = next(model.parameters()).device.type
    clock = time.process_time if kind == "cpu" else time.perf_counter
    synchronise()
    start = clock()
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=autocast):
        out = step()
    out.float().sum().backward()
    synchronise()
    return clock() - start


def memory(arguments: argparse.Namespace) -> int:
    """Prints a row per share of checkpointed blocks."""
    print(
        f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} threads, {arguments.attention}"
    )
    print("| clips x frames x pixels | checkpointed blocks | peak resident GiB | seconds |")
    print("| --- | --- | ---: | ---: |")
    for share in arguments.shares:
        words = [sys.executable, __file__, "one-pass", "--share", str(share)]
        for option in ("attention", "frames", "crop", "threads"):
            words += [f"--{option}", str(getattr(arguments, option))]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
        size = f"1x{arguments.frames}x{arguments.crop}"
        if done.returncode:
            print(f"| {size} | {share:.0%} | failed, exit code {done.returncode} | |", flush=True)
            continue
        facts = json.loads(done.stdout)
        print(f"| {size} | {share:.0%} | {facts['gib']:.2f} | {facts['seconds']:.1f} |", flush=True)
    return 0


def one_pass(arguments: argparse.Namespace) -> int:
    """What ``memory`` runs in a process of its own: weights, gradients and activations of one clip."""
    torch.manual_seed(0)
    model = create_model(
        MODEL, attention=arguments.attention, in_frames=arguments.frames, crop=arguments.crop
    ).train()
    recompute_blocks(model, arguments.share)
    x = torch.randn(1, 3, arguments.frames, arguments.crop, arguments.crop)
    start = time.perf_counter()
    model(x).sum().backward()
    seconds = time.perf_counter() - start
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"gib": kib / 2**20, "seconds": seconds}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    for task, run, frames in (("speed", speed, 8), ("memory", memory, 96), ("one-pass", one_pass, 96)):
        words = tasks.add_parser(task)
        words.set_defaults(run=run)
        words.add_argument("--attention", default="divided")
        words.add_argument("--frames", type=int, default=frames)
        words.add_argument("--crop", type=int, default=224)
        words.add_argument("--threads", type=int, default=1)
    fast = tasks.choices["speed"]
    fast.add_argument("--clips", type=int, nargs="+", default=[1], help="batch sizes")
    fast.add_argument("--rounds", type=int, default=7)
    fast.add_argument("--device", default="cpu")
    fast.add_argument("--precision", choices=("fp32", "autocast_bf16"), default="fp32")
    fast.add_argument("--goal", type=float, default=1.3)
    shares = tasks.choices["memory"]
    shares.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.0], help="of blocks, checkpointed")
    tasks.choices["one-pass"].add_argument("--share", type=float, default=0.0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
