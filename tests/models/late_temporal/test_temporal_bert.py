"""BERT over time against PyTorch's own encoder layer and formulas written out with einsum."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import ModelError
from cliplift.models.late_temporal.bert import BertOptions, OriginalLayerNorm, TemporalBert, sinusoids

B, N, D, HEADS = 3, 4, 16, 4


def bert(**options: object) -> TemporalBert:
    torch.manual_seed(0)
    settings = {"heads": HEADS, "dropout": 0.0, **options}
    max_tokens = settings.pop("max_tokens", N)
    model = TemporalBert(D, max_tokens=max_tokens, options=BertOptions(**settings))  # type: ignore[arg-type]
    with torch.no_grad():  # far from their starting values, so that no term can hide
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(seed: int = 1, n: int = N) -> Tensor:
    return torch.randn(B, n, D, generator=torch.Generator().manual_seed(seed))


def std_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The original's normalisation from sums: unbiased std, eps outside the root."""
    d = x.shape[-1]
    centred = x - x.sum(-1, keepdim=True) / d
    return weight * centred / ((centred.square().sum(-1, keepdim=True) / (d - 1)).sqrt() + 1e-6) + bias


def reference(model: TemporalBert, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """(B, N, D) -> (B, N + 1, D) and attention, by einsum on the state dict; ``keep`` (B, N + 1) of the keys."""
    s = {k: v.detach() for k, v in model.state_dict().items()}
    x = torch.cat((s["cls_token"].repeat(len(x), 1, 1), x), 1) + s["positions"][:, : x.shape[1] + 1]
    attention = []
    for i in range(len(model.blocks)):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in s.items() if k.startswith(f"blocks.{i}.")}
        y = std_norm(x, w["attention_norm.weight"], w["attention_norm.bias"])
        q, k, v = (
            (torch.einsum("bnd,ed->bne", y, w[f"attention.{n}.weight"]) + w[f"attention.{n}.bias"]).reshape(
                len(x), -1, HEADS, D // HEADS
            )
            for n in ("query", "key", "value")
        )
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (D // HEADS) ** -0.5
        exponential = scores.double().exp()
        if keep is not None:
            exponential = exponential * keep[:, None, None, :]
        p = (exponential / exponential.sum(-1, keepdim=True)).float()
        attention.append(p)
        mixed = torch.einsum("bhnm,bmhd->bnhd", p, v).reshape(x.shape)
        x = x + mixed @ w["attention.out.weight"].T + w["attention.out.bias"]
        y = std_norm(x, w["feed_forward_norm.weight"], w["feed_forward_norm.bias"])
        y = y @ w["feed_forward.expand.weight"].T + w["feed_forward.expand.bias"]
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + y @ w["feed_forward.contract.weight"].T + w["feed_forward.contract.bias"]
    return x, attention


# --- the transformer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("n", [N, 2])
def test_bert_in_eval_mode_is_the_written_out_formula(layers: int, n: int) -> None:
    model = bert(layers=layers).eval()
    x = tokens(n=n)
    out = model(x, return_attention=True)
    expected, attention = reference(model, x)
    # float32 sums in another order; values are of size 1 to 10
    torch.testing.assert_close(out.summary, expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.tokens, expected[:, 1:], rtol=1e-4, atol=1e-5)
    assert len(out.attention) == layers
    for got, wanted in zip(out.attention, attention, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert model(x).attention == ()


def test_bert_with_torchs_layer_norm_is_torchs_encoder_layer() -> None:
    model = bert(norm="torch").eval()
    layer = nn.TransformerEncoderLayer(
        D,
        HEADS,
        4 * D,
        activation=lambda x: F.gelu(x, approximate="tanh"),
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
    ).eval()
    s = {k.removeprefix("blocks.0."): v for k, v in model.state_dict().items()}
    names = ("query", "key", "value")
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat([s[f"attention.{n}.weight"] for n in names]),
            "self_attn.in_proj_bias": torch.cat([s[f"attention.{n}.bias"] for n in names]),
            "self_attn.out_proj.weight": s["attention.out.weight"],
            "self_attn.out_proj.bias": s["attention.out.bias"],
            "linear1.weight": s["feed_forward.expand.weight"],
            "linear1.bias": s["feed_forward.expand.bias"],
            "linear2.weight": s["feed_forward.contract.weight"],
            "linear2.bias": s["feed_forward.contract.bias"],
            "norm1.weight": s["attention_norm.weight"],
            "norm1.bias": s["attention_norm.bias"],
            "norm2.weight": s["feed_forward_norm.weight"],
            "norm2.bias": s["feed_forward_norm.bias"],
        }
    )
    x = tokens()
    whole = torch.cat((s["cls_token"].expand(B, -1, -1), x), 1) + s["positions"]
    out = model(x)
    torch.testing.assert_close(
        torch.cat((out.summary[:, None], out.tokens), 1), layer(whole), rtol=1e-4, atol=1e-5
    )


def test_the_original_layer_norm_has_the_unbiased_std_and_eps_outside_the_root() -> None:
    norm = OriginalLayerNorm(D)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = tokens().double() * 1e-3  # small enough for eps to count
    got = norm.double()(x)
    torch.testing.assert_close(got, std_norm(x, norm.weight, norm.bias), rtol=1e-12, atol=1e-12)
    theirs = F.layer_norm(x, (D,), norm.weight, norm.bias, eps=1e-6)
    assert (got - theirs).abs().max() > 1e-2, "it must differ from nn.LayerNorm"


def test_in_training_a_fifth_of_the_key_tokens_is_masked_per_clip_and_cls_never() -> None:
    clips = 4000
    model = bert(layers=2, max_tokens=8).train()
    x = torch.randn(clips, 8, D)
    first, second = model(x, return_attention=True).attention
    kept = first > 0
    by_clip = kept[:, 0, 0]  # (clips, 9)
    assert torch.equal(kept, by_clip[:, None, None, :].expand_as(kept)), (
        "the same keys for all heads and queries"
    )
    assert torch.equal(second > 0, kept), "the same keys in every layer"
    assert by_clip[:, 0].all(), "CLS is always kept"
    share = by_clip[:, 1:].float().mean(0)
    # Bernoulli(0.8) over 4000 clips: standard deviation 0.0063 a token; 4.5 of them over 8 tokens
    assert (share - 0.8).abs().max() < 4.5 * math.sqrt(0.8 * 0.2 / clips), share
    # independent tokens: all 8 are kept in 0.8^8 = 16.8 % of the clips
    everything = by_clip.all(1).float().mean().item()
    assert abs(everything - 0.8**8) < 4.5 * math.sqrt(0.168 * 0.832 / clips)
    pairs = torch.corrcoef(by_clip[:, 1:].float().T) - torch.eye(8)
    assert pairs.abs().max() < 0.08, "masks of two tokens are independent"
    torch.testing.assert_close(first.sum(-1), torch.ones_like(first.sum(-1)))


def test_a_masked_forward_is_the_reference_without_those_keys() -> None:
    model = bert(layers=2).train()
    x = tokens()
    torch.manual_seed(3)
    out = model(x, return_attention=True)
    keep = out.attention[0][:, 0, 0] > 0
    assert not keep.all(), "the seed must mask something"
    expected, _ = reference(model, x, keep)
    torch.testing.assert_close(out.summary, expected[:, 0], rtol=1e-4, atol=1e-5)


def test_no_mask_in_eval_or_with_probability_one() -> None:
    x = tokens()
    for model in (bert().eval(), bert(keep_probability=1.0).train()):
        out = model(x, return_attention=True)
        assert (out.attention[0] > 0).all()
        assert torch.equal(model(x).summary, out.summary), "nothing is drawn"


def test_without_cls_the_tokens_are_averaged_and_a_fully_masked_clip_is_finite() -> None:
    model = bert(cls_token=False, keep_probability=1e-6)
    out = model.eval()(tokens())
    assert out.tokens.shape == (B, N, D)
    torch.testing.assert_close(out.summary, out.tokens.mean(1))
    assert model.train()(tokens()).summary.isfinite().all()


def test_order_is_seen_through_positions_only() -> None:
    x = tokens()
    swapped = x[:, [2, 0, 3, 1]]
    for positions, sees_order in (("learned", True), ("sinusoidal", True), ("none", False)):
        model = bert(positions=positions).eval()
        change = (model(x).summary - model(swapped).summary).abs().max().item()
        assert change > 1e-2 if sees_order else change < 1e-5, positions


def test_sinusoids() -> None:
    table = sinusoids(5, 6)
    for position in range(5):
        for i in range(3):
            angle = position / 64 ** (2 * i / 6)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert sinusoids(3, 5).shape == (3, 5)


def test_starting_values() -> None:
    for init, std, linear_std in (("bert5", 0.02, None), ("bert2", 512**-0.5, 0.02)):
        torch.manual_seed(0)
        model = TemporalBert(512, max_tokens=64, options=BertOptions(init=init))  # type: ignore[arg-type]
        assert model.positions is not None
        # 33280 draws: their standard deviation is known to 0.4 %
        assert model.positions.std().item() == pytest.approx(std, rel=0.02)
        assert model.cls_token is not None
        assert model.cls_token.std().item() == pytest.approx(std, rel=0.15)
        weight = model.blocks[0].feed_forward.expand.weight  # type: ignore[union-attr]
        if linear_std is None:
            assert weight.abs().max().item() <= 512**-0.5, "PyTorch's uniform bounds"
        else:
            assert weight.std().item() == pytest.approx(linear_std, rel=0.01)
            assert not model.blocks[0].feed_forward.expand.bias.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "divisor of 16"),
        ({"layers": 0}, "layers=0"),
        ({"heads": 0}, "heads=0"),
        ({"heads": -2}, "heads=-2"),
        ({"keep_probability": 1.5}, "keep_probability=1.5"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"keep_probability": 0.0}, "keep_probability=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"positions": "rotary"}, "positions='rotary'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"init": "bert9"}, "init='bert9'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        bert(**options)


@pytest.mark.parametrize("shape", [(2, D), (2, 3, D, 1), (2, 3, D - 1), (2, 3, D + 1), (2, 0, D)])
def test_tokens_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=rf"takes \(B, N, {D}\) with N up to {N}"):
        bert().eval()(torch.zeros(shape))


@pytest.mark.parametrize("max_tokens", [1, 3, 4])
def test_there_is_a_position_for_every_token_and_one_for_cls(max_tokens: int) -> None:
    for cls_token in (True, False):
        for positions in ("learned", "sinusoidal"):
            model = bert(max_tokens=max_tokens, cls_token=cls_token, positions=positions).eval()
            assert model.positions.shape == (1, max_tokens + cls_token, D)
            assert model(tokens(n=max_tokens)).tokens.shape == (B, max_tokens, D)
    # A position that is not trained is no parameter, and not saved: it follows from the sizes.
    assert "positions" not in model.state_dict()
    assert torch.equal(model.positions[0], sinusoids(max_tokens, D))


def test_one_layer_with_eight_heads_and_a_fifth_masked_unless_told_otherwise() -> None:
    """The paper's Table 2, and its masked share."""
    model = TemporalBert(16, max_tokens=2, options=BertOptions())
    assert (len(model.blocks), model.blocks[0].attention.heads, model.keep_probability) == (1, 8, 0.8)
    assert (model.cls_token is not None, isinstance(model.positions, nn.Parameter)) == (True, True)
    assert isinstance(model.blocks[0].attention_norm, OriginalLayerNorm)
    assert model.blocks[0].feed_forward.expand.weight.shape == (64, 16)
    assert bert(heads=1, layers=1).blocks[0].attention.heads == 1
    TemporalBert(
        16, max_tokens=2, options=BertOptions(dropout=0.0, keep_probability=1.0)
    )  # both ends are possible


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ModelError, match="in_frames"):
        bert()(tokens(n=N + 1))
