"""One block of every scheme against its definition: which tokens reach which, and the numbers.

The definitions below are written from the paper token by token; none of them rearranges anything.
Token 0 is CLS, token 1 + (t*H + h)*W + w the patch (t, h, w).
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.timesformer.attention import Attention, Block, DropPath

T, H, W = GRID = (2, 4, 6)  # no two alike, so that no axis can stand in for another
N = 1 + T * H * W
PATCHES = list(itertools.product(range(T), range(H), range(W)))
Place = tuple[int, int, int]

# step -> do these two patches attend to each other?
MEETS: dict[str, Callable[[Place, Place], bool]] = {
    "joint": lambda a, b: True,
    "space": lambda a, b: a[0] == b[0],
    "time": lambda a, b: a[1:] == b[1:],
    "width": lambda a, b: a[:2] == b[:2],
    "height": lambda a, b: (a[0], a[2]) == (b[0], b[2]),
    "local": lambda a, b: (a[1] < H // 2) == (b[1] < H // 2) and (a[2] < W // 2) == (b[2] < W // 2),
    "global": lambda a, b: all((i - j) % 2 == 0 for i, j in zip(a, b, strict=True)),
}
# scheme, CLS rule -> (module prefix, step, part of CLS) in order
SCHEMES = {
    ("joint", "released"): [("", "joint", "in")],
    ("space", "released"): [("", "joint", "in")],  # of one frame
    ("divided", "released"): [("temporal_", "time", "out"), ("", "space", "in")],
    ("divided", "paper"): [("temporal_", "time", "in"), ("", "space", "in")],
    ("local_global", "released"): [("local_", "local", "out"), ("", "global", "in")],
    ("axial", "released"): [("temporal_", "time", "out"), ("width_", "width", "out"), ("", "height", "in")],
}
STEPS = [(*key, i) for key, steps in SCHEMES.items() for i in range(len(steps))]


def sees(step: str, part: str) -> Tensor:
    """(N, N) bool: the output of token i depends on the input of token j."""
    seen = torch.eye(N, dtype=torch.bool)
    for i, a in enumerate(PATCHES, start=1):
        for j, b in enumerate(PATCHES, start=1):
            seen[i, j] = MEETS[step](a, b)
    if part == "in":
        seen[0, :] = seen[:, 0] = True
    return seen


def lively_block(scheme: str, cls: str, *, width: int = 16) -> Block:
    torch.manual_seed(0)
    block = Block(width, 2, scheme=scheme, cls=cls, drop_path=0.0).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    return block


def silenced(block: Block, prefixes: list[str]) -> Block:
    """The block with nothing coming out of these steps."""
    for prefix in prefixes:
        last = block.get_submodule(f"{prefix}fc" if prefix else "attn.proj")
        for p in last.parameters():
            nn.init.zeros_(p)
    return block


def moved_by(block: Block, token: int) -> Tensor:
    """(N,) bool: the outputs of a block that change when one token changes."""
    torch.manual_seed(1)
    z = torch.randn(1, N, 16, dtype=torch.float64)
    other = z.clone()
    other[0, token] = torch.randn(16, dtype=torch.float64)
    with torch.no_grad():
        return ((block(z, GRID) - block(other, GRID)).abs() > 1e-9)[0].any(-1)


TOKENS = [0, 1, 1 + (1 * H + 2) * W + 3, N - 1]


@pytest.mark.parametrize(("scheme", "cls", "index"), STEPS)
def test_one_step_of_a_block_moves_exactly_its_keys(scheme: str, cls: str, index: int) -> None:
    steps = SCHEMES[scheme, cls]
    block = silenced(lively_block(scheme, cls), [p for i, (p, _, _) in enumerate(steps) if i != index])
    seen = sees(*steps[index][1:])
    for token in TOKENS:
        assert torch.equal(moved_by(block, token), seen[:, token]), f"token {token}"


@pytest.mark.parametrize(("scheme", "cls"), list(SCHEMES))
def test_a_whole_block_moves_what_its_steps_reach_one_after_the_other(scheme: str, cls: str) -> None:
    reach = torch.eye(N)
    for _, step, part in SCHEMES[scheme, cls]:
        reach = sees(step, part).float() @ reach
    block = lively_block(scheme, cls)
    for token in TOKENS:
        assert torch.equal(moved_by(block, token), reach[:, token] > 0), f"token {token}"


def test_without_the_last_step_axial_reaches_rows_of_all_frames_only() -> None:
    """Two extra steps compose: time, then width."""
    block = silenced(lively_block("axial", "released"), [""])
    row = torch.tensor([False] + [h == 2 for _, h, _ in PATCHES])
    assert torch.equal(moved_by(block, 1 + (0 * H + 2) * W + 5), row)


def dense_step(x: Tensor, attention: nn.Module, step: str, part: str) -> Tensor:
    """(N, D) -> (N, D): every token by its own sum over its keys. ``part``: "out", "whole" or "copied" (CLS)."""
    state, heads = dict(attention.named_parameters()), 2
    q, k, v = F.linear(x, state["qkv.weight"], state["qkv.bias"]).unflatten(-1, (3, heads, -1)).unbind(1)

    def attend(query: int, keys: list[int]) -> Tensor:
        scores = torch.einsum("ad,sad->as", q[query], k[keys]) / q.shape[-1] ** 0.5
        return torch.einsum("as,sad->ad", scores.softmax(-1), v[keys]).flatten()

    seen = sees(step, "out" if part == "out" else "in")
    rows = [attend(i, seen[i].nonzero().flatten().tolist()) for i in range(1, N)]
    if part == "copied":  # CLS asks in every group, and takes the mean of the answers
        groups = {tuple(seen[i, 1:].nonzero().flatten().tolist()) for i in range(1, N)}
        first = torch.stack([attend(0, [0, *(j + 1 for j in group)]) for group in groups]).mean(0)
    else:
        first = attend(0, list(range(N)))
    y = F.linear(torch.stack([first, *rows]), state["proj.weight"], state["proj.bias"])
    return torch.cat([torch.zeros_like(y[:1]), y[1:]]) if part == "out" else y


def dense_block(z: Tensor, block: Block, scheme: str, cls: str) -> Tensor:
    """(N, D) -> (N, D), Fig. 1 and eq. 8-9 written down."""

    def norm(x: Tensor, name: str) -> Tensor:
        layer = block.get_submodule(name)
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias

    for prefix, step, part in SCHEMES[scheme, cls]:
        rule = "copied" if not prefix else "whole" if part == "in" else "out"
        update = dense_step(norm(z, f"{prefix}norm1"), block.get_submodule(f"{prefix}attn"), step, rule)
        if prefix:
            fc = block.get_submodule(f"{prefix}fc")
            update = F.linear(update, fc.weight, fc.bias)
            if part == "out":  # CLS gets no update, not even the bias
                update = torch.cat([torch.zeros_like(update[:1]), update[1:]])
        z = z + update
    hidden = F.gelu(F.linear(norm(z, "norm2"), block.mlp.fc1.weight, block.mlp.fc1.bias))
    return z + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)


@pytest.mark.parametrize(("scheme", "cls"), list(SCHEMES))
def test_a_block_computes_its_definition(scheme: str, cls: str) -> None:
    block = lively_block(scheme, cls)
    z = torch.randn(2, N, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([dense_block(clip, block, scheme, cls) for clip in z])
        torch.testing.assert_close(block(z, GRID), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("built", ["released", "paper"])
def test_the_two_cls_rules_are_told_apart(built: str) -> None:
    """The same weights under the other rule's definition give other numbers, for CLS and for patches."""
    block = lively_block("divided", built)
    other = "paper" if built == "released" else "released"
    z = torch.randn(N, 16, dtype=torch.float64)
    with torch.no_grad():
        difference = (block(z[None], GRID)[0] - dense_block(z, block, "divided", other)).abs().amax(-1)
    assert difference[0] > 1e-3
    assert difference[1:].min() > 1e-3


@pytest.mark.parametrize("step", list(MEETS))
def test_a_step_without_cls_keeps_to_its_groups(step: str) -> None:
    torch.manual_seed(0)
    layer = Attention(16, 2, step=step, cls="none").double()
    x = torch.randn(1, N, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = dense_step(x[0], layer, step, "out")[1:]
        torch.testing.assert_close(layer(x[:, 1:], GRID)[0], expected, atol=1e-12, rtol=0)


def test_drop_path_drops_whole_clips_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    y = drop(torch.ones(4000, 3, 2))
    kept = y[:, 0, 0] != 0
    assert torch.equal(y, torch.where(kept, 1 / 0.75, 0.0)[:, None, None].expand_as(y))
    # share kept: mean 0.75, standard deviation sqrt(0.75 * 0.25 / 4000) = 0.0068; four of them
    assert abs(kept.float().mean().item() - 0.75) < 0.028
    assert torch.equal(drop.eval()(y), y)


@pytest.mark.parametrize("scheme", ["divided", "local_global", "axial"])
def test_a_dropped_extra_step_keeps_the_bias_of_its_linear(scheme: str) -> None:
    """Released code: drop path comes before ``temporal_fc``."""
    block = silenced(lively_block(scheme, "released"), [""]).train()
    for p in block.mlp.fc2.parameters():
        nn.init.zeros_(p)
    block.drop_path.rate = 1 - 1e-12  # everything is dropped
    z = torch.randn(2, N, 16, dtype=torch.float64)
    biases = sum(block.get_submodule(f"{prefix}_fc").bias for prefix in block.extra)
    with torch.no_grad():
        moved = block(z, GRID) - z
    assert torch.equal(moved[:, 0], torch.zeros_like(moved[:, 0]))
    torch.testing.assert_close(moved[:, 1:], biases.expand_as(moved[:, 1:]), atol=1e-12, rtol=0)
