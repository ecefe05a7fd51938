"""Attention maps against whole attention matrices built token by token from the model's own q and k."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cliplift.models import ModelError, create_model
from cliplift.models.timesformer import rollout as module
from cliplift.models.timesformer.rollout import attention_rollout, head_maps

T, H, W = GRID = (2, 2, 4)
PATCHES = list(itertools.product(range(T), range(H), range(W)))
N, HEADS, DEPTH, B = 1 + len(PATCHES), 2, 3, 2
Place = tuple[int, int, int]

# which patches a patch attends to, by the place of the step in a block; and what CLS does there
STEPS: dict[tuple[str, str], list[tuple[Callable[[Place], object], str]]] = {
    ("joint", "released"): [(lambda p: 0, "whole")],
    ("space", "released"): [(lambda p: p[0], "own")],  # every frame has a CLS of its own
    ("divided", "released"): [(lambda p: p[1:], "none"), (lambda p: p[0], "copied")],
    ("divided", "paper"): [(lambda p: p[1:], "whole"), (lambda p: p[0], "copied")],
    ("local_global", "released"): [
        (lambda p: (p[1] // (H // 2), p[2] // (W // 2)), "none"),
        (lambda p: tuple(i % 2 for i in p), "copied"),
    ],
    ("axial", "released"): [
        (lambda p: p[1:], "none"),
        (lambda p: p[:2], "none"),
        (lambda p: (p[0], p[2]), "copied"),
    ],
}


def model_of(scheme: str, cls: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "in_frames": T, "crop": 64, "width": 16, "depth": DEPTH, "heads": HEADS}
    model = create_model("timesformer_base", attention=scheme, cls=cls, **sizes)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def clips() -> Tensor:
    return torch.randn(B, 3, T, 16 * H, 16 * W, generator=torch.Generator().manual_seed(3))


def matrices(model: nn.Module, scheme: str, cls: str) -> list[list[Tensor]]:
    """[block][step] -> (B, A, N, N) attention weights; for "space", (B*T, A, 1 + H*W, 1 + H*W)."""
    inputs: list[Tensor] = []
    layers = [m for m in model.modules() if hasattr(m, "qkv")]
    handles = [m.register_forward_pre_hook(lambda _, x: inputs.append(x[0])) for m in layers]
    with torch.no_grad():
        model.eval()(clips())
    for handle in handles:
        handle.remove()
    found = []
    for layer, x, (group, rule) in zip(layers, inputs, STEPS[scheme, cls] * DEPTH, strict=True):
        qkv = F.linear(x, layer.qkv.weight, layer.qkv.bias).unflatten(-1, (3, HEADS, -1))
        if rule == "none":  # no CLS in this step: a row and a column that are never read
            qkv = F.pad(qkv, (0, 0, 0, 0, 0, 0, 1, 0))
        scores = torch.einsum("biad,bjad->baij", qkv[:, :, 0], qkv[:, :, 1]) / (16 / HEADS) ** 0.5
        found.append(dense(scores, group, rule))
    steps = len(STEPS[scheme, cls])
    return [found[i : i + steps] for i in range(0, len(found), steps)]


def dense(scores: Tensor, group: Callable[[Place], object], rule: str) -> Tensor:
    """Softmax of every row over its own keys."""
    if rule == "own":
        return scores.softmax(-1)
    labels = [group(p) for p in PATCHES]
    weights = torch.zeros_like(scores)
    keys_of = {
        g: [*([] if rule == "none" else [0]), *(1 + i for i, label in enumerate(labels) if label == g)]
        for g in labels
    }
    for i, label in enumerate(labels, start=1):
        weights[:, :, i, keys_of[label]] = scores[:, :, i, keys_of[label]].softmax(-1)
    if rule == "none":
        weights[:, :, 0, 0] = 1
    elif rule == "whole":
        weights[:, :, 0] = scores[:, :, 0].softmax(-1)
    else:
        for keys in keys_of.values():
            weights[:, :, 0, keys] += scores[:, :, 0, keys].softmax(-1) / len(keys_of)
    return weights


@pytest.mark.parametrize(("scheme", "cls"), list(STEPS))
def test_rollout_is_the_product_of_all_matrices(scheme: str, cls: str) -> None:
    model = model_of(scheme, cls)
    rolled: Tensor | None = None
    for weights in itertools.chain.from_iterable(matrices(model, scheme, cls)):
        layer = 0.5 * weights.mean(1) + 0.5 * torch.eye(weights.shape[-1])
        rolled = layer if rolled is None else layer @ rolled
    assert rolled is not None
    share = rolled[:, 0, 1:]
    if scheme == "space":  # the clip's CLS is the mean of the frames'
        share = share.reshape(B, T * H * W) / T
    maps = attention_rollout(model, clips(), scaled=False)
    assert maps.shape == (B, *GRID)
    torch.testing.assert_close(maps, share.reshape(B, *GRID), atol=1e-6, rtol=1e-4)
    assert (maps.sum((1, 2, 3)) < 1).all()


@pytest.mark.parametrize(("scheme", "cls"), list(STEPS))
@pytest.mark.parametrize("block", [0, -1])
def test_head_maps_are_the_cls_row_of_one_block(scheme: str, cls: str, block: int) -> None:
    model = model_of(scheme, cls)
    row = matrices(model, scheme, cls)[block][-1][:, :, 0, 1:]  # (B, A, T*H*W)
    if scheme == "space":
        row = row.unflatten(0, (B, T)).transpose(1, 2).flatten(2) / T
    maps = head_maps(model, clips(), block=block, scaled=False)
    assert maps.shape == (B, HEADS, *GRID)
    torch.testing.assert_close(maps, row.reshape(B, HEADS, *GRID), atol=1e-6, rtol=1e-4)


def test_scaled_maps_are_the_same_maps_up_to_one() -> None:
    model = model_of("divided", "released")
    rolled, heads = attention_rollout(model, clips()), head_maps(model, clips())
    torch.testing.assert_close(rolled.amax((1, 2, 3)), torch.ones(B))
    torch.testing.assert_close(heads.amax((2, 3, 4)), torch.ones(B, HEADS))
    shares = attention_rollout(model, clips(), scaled=False)
    torch.testing.assert_close(rolled, shares / shares.amax((1, 2, 3), keepdim=True))
    assert rolled.min() >= 0


def test_long_sequences_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("joint", "released")
    whole = attention_rollout(model, clips())
    monkeypatch.setattr(module, "ELEMENTS", 5 * B * HEADS * N)  # five queries at a time
    torch.testing.assert_close(attention_rollout(model, clips()), whole)


def test_a_planted_patch_is_found() -> None:
    """One patch whose key every query wants takes nearly all of the attention, in every head."""
    model = model_of("divided", "released")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("blocks"):
                p.zero_()
        for block in model.blocks:
            for norm in (block.norm1, block.norm2, block.temporal_norm1):
                norm.weight.fill_(1)
            block.attn.qkv.bias[:16] = 30.0  # every query asks for channel sums
            block.attn.qkv.weight[16:32, 0] = 1.0  # keys answer with channel 0
        model.pos_embed.zero_()
        model.pos_embed[0, 1 + 1 * 4 + 2, 0] = 100.0  # row 1, column 2 of 4x4
        model.patch_embed.proj.weight.mul_(0.01)
        model.time_embed.zero_()
        model.cls_token.zero_()
        model.cls_token[0, 0, 1] = 1.0
    maps = head_maps(model, torch.randn(B, 3, T, 64, 64), scaled=False)
    assert (maps[:, :, :, 1, 2] > 0.99 / T).all()


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("axial", "released").train()
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    model.requires_grad_(True)
    maps = attention_rollout(model, clips())
    assert not maps.requires_grad
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("scheme", "cls"), list(STEPS))
def test_the_models_own_pass_forms_no_attention_matrix(scheme: str, cls: str) -> None:
    """Training and evaluation use the fused kernel: no softmax, and no batched matrix product, is ever called."""
    model = model_of(scheme, cls)
    for train in (True, False):
        with Names() as seen:
            out = model.train(train)(clips())
            if train:
                out.sum().backward()
        assert any("flash_attention" in name for name in seen.names), seen.names
        assert not any(word in name for name in seen.names for word in ("softmax", "bmm")), seen.names


def test_other_models_and_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="need a TimeSformer, not a"):
        attention_rollout(create_model("t3d_tiny"), torch.zeros(1, 3, 8, 32, 32))
    with pytest.raises(ModelError, match=r"block=3 must be in \[-3, 2\]"):
        head_maps(model_of("joint", "released"), clips(), block=3)
    with pytest.raises(ModelError, match="takes"):
        attention_rollout(model_of("joint", "released"), torch.zeros(1, 1, 2, 32, 32))
