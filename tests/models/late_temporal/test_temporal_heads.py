"""The temporal heads against formulas written out with einsum."""

import math

import pytest
import torch
from torch import Tensor, nn

from cliplift.models import ModelError
from cliplift.models.late_temporal.heads import HEAD_KINDS, BertOptions, HeadOptions, NonLocalBlock

B, N, D, HEADS = 3, 4, 16, 4


def feature_map(seed: int = 2) -> Tensor:
    return torch.randn(B, D, N, 3, 2, generator=torch.Generator().manual_seed(seed))


def head(kind: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "bert": BertOptions(heads=HEADS), **options}
    return HeadOptions(kind=kind, **settings).build(dim=D, tokens=N).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_every_head_takes_a_feature_map_and_trains(kind: str) -> None:
    module = head(kind).train()
    maps = feature_map().requires_grad_()
    out = module(maps)
    assert out.shape == (B, module.out_dim)
    out.square().sum().backward()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_gradients_reach_cls_and_every_position() -> None:
    module = head("bert").train()
    module(feature_map()).square().sum().backward()
    assert module.bert.cls_token.grad.abs().max() > 0
    assert (module.bert.positions.grad.abs().amax(dim=(0, 2)) > 0).all()


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_the_order_of_frames_changes_every_head_but_tgap(kind: str) -> None:
    module = head(kind)
    maps = feature_map()
    change = (module(maps) - module(maps[:, :, [3, 1, 0, 2]])).abs().max().item()
    assert change < 1e-6 if kind == "tgap" else change > 1e-3


def test_tgap_and_concat_are_plain_averages() -> None:
    maps = feature_map()
    torch.testing.assert_close(head("tgap")(maps), torch.einsum("bcthw->bc", maps) / (N * 6))
    tokens_ = torch.einsum("bcthw->bct", maps) / 6
    torch.testing.assert_close(head("concat")(maps), tokens_.reshape(B, D * N))  # channel-major as published
    module = head("concat_fc", width=7)
    torch.testing.assert_close(
        module(maps), tokens_.reshape(B, -1) @ module.linear.weight.T + module.linear.bias
    )


def test_lstm_is_the_written_out_recurrence() -> None:
    module = head("lstm", width=5)
    maps = feature_map()
    sequence = list(torch.einsum("bcthw->tbc", maps) / 6)
    for layer in range(2):
        w, u, b, c = (
            getattr(module.lstm, f"{n}_l{layer}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        hidden = memory = torch.zeros(B, 5)
        outputs = []
        for x in sequence:
            i, f, g, o = (x @ w.T + b + hidden @ u.T + c).split(5, dim=1)
            memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(memory)
            outputs.append(hidden)
        sequence = outputs
    torch.testing.assert_close(module(maps), sequence[-1])


def test_non_local_block_is_the_written_out_formula() -> None:
    torch.manual_seed(0)
    block = NonLocalBlock(D).eval()
    x = feature_map()
    torch.testing.assert_close(block(x), x, msg="BN's scale of zero makes it the identity at first")
    with torch.no_grad():
        block.norm.weight.normal_()
        block.norm.bias.normal_()
        block.norm.running_mean.normal_()  # type: ignore[union-attr]
    flat = x.flatten(2)
    theta, phi, g = (
        torch.einsum("ec,bcn->ben", m.weight.flatten(1), flat) + m.bias[:, None]  # type: ignore[union-attr, operator]
        for m in (block.theta, block.phi, block.g)
    )
    f = torch.einsum("ben,bem->bnm", theta, phi) / math.sqrt(flat.shape[2])
    y = torch.einsum("bnm,bem->ben", f.softmax(-1), g)
    z = torch.einsum("ec,bcn->ben", block.out.weight.flatten(1), y) + block.out.bias[:, None]  # type: ignore[union-attr, operator]
    norm = block.norm
    z = (z - norm.running_mean[:, None]) / (norm.running_var[:, None] + norm.eps).sqrt()  # type: ignore[index, operator]
    z = z * norm.weight[:, None] + norm.bias[:, None]
    torch.testing.assert_close(block(x), (flat + z).reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_normalised_tokens_have_length_one_before_bert() -> None:
    module = head("bert", bert=BertOptions(heads=HEADS, normalise_tokens=True))
    seen: list[Tensor] = []
    module.bert.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(feature_map())
    torch.testing.assert_close(seen[0].square().sum(-1), torch.ones(B, N))
    assert module(torch.zeros(B, D, N, 1, 1)).isfinite().all(), "a dead feature map must not give NaN"


def test_the_dropout_before_the_classifier_is_on_in_training_only() -> None:
    maps = torch.ones(400, D, N, 1, 1)
    module = head("tgap", dropout=0.8)
    assert torch.equal(module(maps), torch.ones(400, D))
    dropped = module.train()(maps)
    share = (dropped == 0).float().mean().item()
    assert share == pytest.approx(0.8, abs=4.5 * math.sqrt(0.16 / dropped.numel()))
    assert dropped.max().item() == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mean", {}, "head='mean'"),
        ("bert", {"width": 3}, "width=3"),
        ("lstm", {"width": 0}, "width=0"),
        ("tgap", {"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_impossible_heads_are_refused(kind: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        head(kind, **options)


def test_a_concatenation_needs_all_time_steps() -> None:
    with pytest.raises(ModelError, match="4 time steps"):
        head("concat")(torch.zeros(1, D, N - 1, 1, 1))
