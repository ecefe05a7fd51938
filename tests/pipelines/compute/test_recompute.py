"""Recomputed blocks: the same gradients, statistics counted once; if selective, no dear operation runs twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cliplift.configs.training import EngineConfig
from cliplift.models import create_model
from cliplift.pipelines.compute.recompute import recompute_blocks

SHAPES = {"t3d_tiny": (2, 3, 8, 32, 32), "video_vit_tiny_8": (2, 3, 4, 32, 32), "gru_rcn": (1, 3, 2, 40, 33)}
# products of the forward pass; those of the backward pass have other names, or come in equal number
FORWARD = (
    "convolution",
    "_scaled_dot_product_flash_attention_for_cpu",
    "native_batch_norm",
    "native_layer_norm",
    "gelu",
)


class Operations(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.calls[func.overloadpacket.__name__] += 1  # type: ignore[attr-defined]
        return func(*args, **(kwargs or {}))


def trained(name: str, share: float, *, selective: bool) -> tuple[dict[str, Tensor], Counter[str]]:
    """Gradients and buffers after one pass, and the operations it took."""
    torch.manual_seed(0)
    network = create_model(name, num_classes=3, dropout=0.0).train()
    wrapped = recompute_blocks(network, share, selective=selective)
    assert bool(wrapped) == bool(share)
    x = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1))
    with Operations() as operations:
        nn.functional.cross_entropy(network(x), torch.arange(len(x)) % 3).backward()
    found = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
    return found | dict(network.named_buffers()), operations.calls


@pytest.mark.parametrize(
    "name", ["t3d_tiny", "video_vit_tiny_8", pytest.param("gru_rcn", marks=pytest.mark.slow)]
)
def test_nothing_changes_and_dear_operations_run_once(name: str) -> None:
    plain, once = trained(name, 0.0, selective=False)
    whole, twice = trained(name, 1.0, selective=False)
    kept, chosen = trained(name, 1.0, selective=True)
    assert plain.keys() == whole.keys() == kept.keys()
    for key, value in plain.items():
        assert torch.equal(value, whole[key]), key
        assert torch.equal(value, kept[key]), key
    dear, cheap = FORWARD[:2], FORWARD[2:]
    assert sum(once[x] for x in dear) == sum(chosen[x] for x in dear) < sum(twice[x] for x in dear)
    assert sum(once[x] for x in cheap) < sum(chosen[x] for x in cheap)


def test_a_share_of_the_blocks_is_recomputed_selectively() -> None:
    names = recompute_blocks(create_model("video_vit_tiny_8", num_classes=3), 0.5, selective=True)
    assert names == [f"blocks.{i}" for i in range(len(names))]
    assert names


def test_selective_needs_blocks_to_recompute() -> None:
    assert EngineConfig(checkpoint_blocks_share=0.5, recompute="selective").recompute == "selective"
    with pytest.raises(ValidationError, match="recompute: recomputes no block"):
        EngineConfig(recompute="selective")
