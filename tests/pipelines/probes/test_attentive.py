"""The grid of attentive heads: each head is what it would be alone, and it learns what tokens tell."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cliplift.configs.load import validate
from cliplift.configs.sections import ConfigError
from cliplift.configs.supervision import AttentiveProbeConfig
from cliplift.models.video_vit.attentive import AttentiveProbe
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.probes.attentive import HeadGrid, train_heads

ONE_RANK = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def grid_of(lrs: list[float], decays: list[float], *, width: int = 16, classes: int = 3) -> HeadGrid:
    torch.manual_seed(0)
    config = AttentiveProbeConfig.model_validate({"lrs": lrs, "weight_decays": decays})
    return HeadGrid(AttentiveProbe(width, num_classes=classes, heads=2, depth=2), config)


def some_batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each clip one token of five is of the class; where it lies is chance."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(steps):
        labels = torch.randint(3, (12,), generator=generator)
        tokens = 0.3 * torch.randn(12, 5, 16, generator=generator)
        place = torch.randint(5, (12,), generator=generator)
        tokens[torch.arange(12), place, labels] += 3.0
        batches.append((tokens, labels))
    return batches


def test_every_head_is_what_it_is_alone() -> None:
    grid = grid_of([0.01, 0.001], [0.0, 0.5])
    alone = [copy.deepcopy(head) for head in grid.heads]
    assert grid.settings == ((0.01, 0.0), (0.01, 0.5), (0.001, 0.0), (0.001, 0.5))
    batches = some_batches(5)
    train_heads(grid, batches, steps=5, topology=ONE_RANK)
    for (lr, decay), head, together in zip(grid.settings, alone, grid.heads, strict=True):
        decayed = [p for p in head.parameters() if p.ndim > 1]
        plain = [p for p in head.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}], lr=lr
        )
        for step, (tokens, labels) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * step / 5)) / 2
            optimizer.zero_grad()
            F.cross_entropy(head(tokens), labels).backward()
            optimizer.step()
        for mine, other in zip(together.parameters(), head.parameters(), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_a_head_finds_the_token_that_tells_the_class() -> None:
    grid = grid_of([1e-2, 1e-7], [0.01])
    train_heads(grid, some_batches(150), steps=150, topology=ONE_RANK)
    tokens, labels = (torch.cat(parts) for parts in zip(*some_batches(158)[150:], strict=True))
    with torch.no_grad():
        good, idle = (grid(tokens).argmax(dim=2) == labels).double().mean(dim=1).tolist()
    assert good > 0.9
    assert idle < 0.7


RANK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_attentive import Topology, grid_of, some_batches, train_heads
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}/meeting", rank=rank, world_size=2)
topology = Topology(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
grid = grid_of([0.01, 0.001], [0.1])
halves = [tuple(part[6 * rank : 6 * rank + 6] for part in batch) for batch in some_batches(4)]
train_heads(grid, halves, steps=4, topology=topology)
torch.save(grid.state_dict(), f"{sys.argv[3]}/rank{rank}.pt")
"""


@pytest.mark.slow
def test_two_ranks_train_the_heads_of_one(tmp_path: Path) -> None:
    """Each with half of every batch."""
    words = [sys.executable, "-c", RANK, str(Path(__file__).parent)]
    ranks = [subprocess.Popen([*words, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=250) for rank in ranks] == [0, 0]
    alone = grid_of([0.01, 0.001], [0.1])
    tokens, _ = some_batches(5)[-1]
    with torch.no_grad():
        untrained = alone(tokens)
    train_heads(alone, some_batches(4), steps=4, topology=ONE_RANK)
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    together = grid_of([0.01, 0.001], [0.1])
    together.load_state_dict(states[0])
    with torch.no_grad():
        # not the weights: AdamW makes steps of the noise that the gradient of the keys' biases is
        torch.testing.assert_close(together(tokens), alone(tokens), atol=1e-4, rtol=1e-3)
        assert (together(tokens) - untrained).abs().max() > 0.01


@pytest.mark.parametrize(
    ("settings", "key"), [({"lrs": [0.1, 0.0]}, "lrs"), ({"weight_decays": [-0.1]}, "weight_decays")]
)
def test_rates_that_make_no_sense_are_refused(settings: dict[str, list[float]], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(settings, AttentiveProbeConfig, {}, "")
    assert caught.value.key == key
