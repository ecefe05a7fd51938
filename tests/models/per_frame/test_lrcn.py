"""LRCN, its single-frame baseline, the LSTM under them, and the image networks of the paper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import InputSpec, ModelError, create_model
from cliplift.models.factory import load_pretrained
from cliplift.models.layers import PooledClassifier
from cliplift.models.per_frame.frame_sequence import averaged_predictions, frame_encoder, step_losses
from cliplift.models.per_frame.lrcn import LRCN, SingleFrame
from cliplift.models.per_frame.lstm import LSTM
from cliplift.pipelines.stages.classification import Classifier


class TinyEncoder(PooledClassifier):
    """One strided convolution: (B, 1, H, W) -> 6 channels on a quarter of the side."""

    input_dims = 4

    def __init__(self) -> None:
        super().__init__(
            feature_dim=6, num_classes=0, input_spec=InputSpec(channels=1, mean=(0.0,), std=(1.0,))
        )
        self.conv = nn.Conv2d(1, 6, 4, stride=4)
        self.reset_classifier(0)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def checkpoint_blocks(self) -> list[str]:
        return ["conv"]


def tiny_lrcn(**options: object) -> LRCN:
    torch.manual_seed(0)
    settings = {"num_classes": 3, "in_frames": 5, "hidden": 4, "feature_dropout": 0.0, "dropout": 0.0}
    return LRCN(TinyEncoder(), **{**settings, "init": "torch", **options})


def clips(frames: int = 5) -> Tensor:
    return torch.randn(2, 1, frames, 8, 8, generator=torch.Generator().manual_seed(3))


# --- the LSTM ---------------------------------------------------------------------------------------------------------


def torch_lstm(ours: LSTM) -> nn.LSTM:
    """torch.nn.LSTM with our weights; its second bias is zero."""
    reference = nn.LSTM(ours.input_size, ours.hidden_size, ours.layers, batch_first=True).to(ours.bias0.dtype)
    with torch.no_grad():
        for layer in range(ours.layers):
            weight_x, weight_h, bias = ours.layer_weights(layer)
            getattr(reference, f"weight_ih_l{layer}").copy_(weight_x)
            getattr(reference, f"weight_hh_l{layer}").copy_(weight_h)
            getattr(reference, f"bias_ih_l{layer}").copy_(bias)
            getattr(reference, f"bias_hh_l{layer}").zero_()
    return reference


@pytest.fixture
def lstm() -> LSTM:
    torch.manual_seed(1)
    return LSTM(3, 4, layers=2).double()


def sequence(batch: int = 3, frames: int = 6) -> Tensor:
    return torch.randn(batch, frames, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("written_out", [False, True])
def test_the_lstm_is_torchs(lstm: LSTM, written_out: bool) -> None:
    x = sequence()
    state = (torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double())
    everything = {"lengths": torch.tensor([6, 6, 6])} if written_out else {}
    outputs, (h, c) = lstm(x, state, **everything)
    wanted, (wanted_h, wanted_c) = torch_lstm(lstm)(x, state)
    for ours, theirs in ((outputs, wanted), (h, wanted_h), (c, wanted_c)):
        assert (ours - theirs).abs().max() < 1e-12  # float64, another order of additions


def test_padding_changes_nothing_and_the_state_stops_at_the_last_real_frame(lstm: LSTM) -> None:
    x, lengths = sequence(), torch.tensor([6, 2, 4])
    other = x.clone()
    other[1, 2:], other[2, 4:] = 7.0, -7.0
    outputs, (h, c) = lstm(x, lengths=lengths)
    assert torch.equal(outputs, lstm(other, lengths=lengths)[0])
    for clip, length in enumerate(lengths.tolist()):
        alone, (own_h, own_c) = torch_lstm(lstm)(x[clip : clip + 1, :length])
        assert (outputs[clip, :length] - alone[0]).abs().max() < 1e-12
        assert (h[:, clip] - own_h[:, 0]).abs().max() < 1e-12
        assert (c[:, clip] - own_c[:, 0]).abs().max() < 1e-12


def test_a_state_carried_over_chunks_is_one_long_pass(lstm: LSTM) -> None:
    x = sequence()
    whole, _ = lstm(x)
    first, state = lstm(x[:, :2])
    second, _ = lstm(x[:, 2:], state)
    assert (torch.cat([first, second], dim=1) - whole).abs().max() < 1e-12


def test_a_start_resets_the_state_of_that_clip_alone(lstm: LSTM) -> None:
    x = sequence(batch=2)
    starts = torch.zeros(2, 6, dtype=torch.bool)
    starts[0, 0] = starts[0, 4] = True
    state = (torch.randn(2, 2, 4).double(), torch.randn(2, 2, 4).double())
    outputs, _ = lstm(x, state, starts=starts)
    reference = torch_lstm(lstm)
    fresh = torch.cat([reference(x[:1, :4])[0], reference(x[:1, 4:])[0]], dim=1)
    assert (outputs[:1] - fresh).abs().max() < 1e-12
    continued, _ = reference(x[1:], (state[0][:, 1:].contiguous(), state[1][:, 1:].contiguous()))
    assert (outputs[1:] - continued).abs().max() < 1e-12


def test_initialisers() -> None:
    torch.manual_seed(0)
    lrcn = LSTM(8, 16, init="lrcn")
    assert 0.009 < lrcn.weight_x0.abs().max() <= 0.01
    assert lrcn.weight_h0.abs().max() <= 0.01
    assert not lrcn.bias0.any()
    for gate in LSTM(8, 16, init="orthogonal").weight_h0.split(16):
        assert torch.allclose(gate @ gate.T, torch.eye(16), atol=1e-5)
    with pytest.raises(ModelError, match="init='zero'"):
        LSTM(8, 16, init="zero")  # type: ignore[arg-type]


def test_bad_sequences_are_refused(lstm: LSTM) -> None:
    with pytest.raises(ModelError, match="takes"):
        lstm(torch.zeros(1, 2, 5).double())
    with pytest.raises(ModelError, match="starts must be bool"):
        lstm(sequence(), starts=torch.zeros(3, 6))
    with pytest.raises(ModelError, match="lengths must be int64"):
        lstm(sequence(), lengths=torch.tensor([1, 2]))


# --- predictions and losses of several steps --------------------------------------------------------------------------


def test_the_average_is_that_of_the_probabilities() -> None:
    torch.manual_seed(0)
    logits, weights = torch.randn(2, 4, 5), torch.tensor([[1.0, 1, 1, 1], [1, 2, 0, 0]])
    share = weights / weights.sum(dim=1, keepdim=True)
    single = averaged_predictions(logits, weights, multi_label=False).softmax(dim=1)
    assert torch.allclose(single, torch.einsum("bt,btk->bk", share, logits.softmax(dim=2)), atol=1e-6)
    multi = averaged_predictions(logits, weights, multi_label=True).sigmoid()
    assert torch.allclose(multi, torch.einsum("bt,btk->bk", share, logits.sigmoid()), atol=1e-6)


@pytest.mark.parametrize("multi_label", [False, True])
def test_certain_steps_stay_finite(multi_label: bool) -> None:
    logits = torch.tensor([[[200.0, -200.0], [200.0, -200.0]]], requires_grad=True)
    out = averaged_predictions(logits, torch.tensor([[1.0, 0.0]]), multi_label=multi_label)
    assert out.isfinite().all()
    out.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_step_losses_against_loops() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4), torch.tensor([1, 3])
    by_hand = [[-logits[b, t].log_softmax(0)[labels[b]] for t in range(3)] for b in range(2)]
    assert torch.allclose(step_losses(logits, labels, multi_label=False), torch.tensor(by_hand), atol=1e-6)
    targets = torch.randint(0, 2, (2, 3, 4))
    wanted = F.binary_cross_entropy(logits.sigmoid(), targets.float(), reduction="none").mean(dim=2)
    assert torch.allclose(step_losses(logits, targets, multi_label=True), wanted, atol=1e-6)
    repeated = step_losses(logits, targets[:, 0], multi_label=True)
    assert torch.allclose(repeated[:, 0], wanted[:, 0], atol=1e-6)
    with pytest.raises(ModelError, match="labels must be"):
        step_losses(logits, torch.zeros(3, dtype=torch.int64), multi_label=False)


# --- LRCN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "parameters"), [(256, 4_483_429), (1024, 21_079_141)])
def test_the_temporal_part_of_the_paper(hidden: int, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model("lrcn", encoder="caffenet_hybrid", hidden=hidden)
        logits = model.step_logits(torch.empty(1, 3, 16, 227, 227))
    assert logits.shape == (1, 16, 101)
    assert len(model.encoder.fc) == 1, "the paper's network is read at fc6"
    after = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("encoder."))
    assert after == parameters


def test_every_step_against_a_loop_over_frames() -> None:
    model, x = tiny_lrcn().eval(), clips()
    vectors = torch.stack([model.encoder.conv(x[:, :, t]).mean(dim=(2, 3)) for t in range(5)], dim=1)
    outputs, _ = torch_lstm(model.lstm)(vectors)
    logits = outputs @ model.head.weight.T + model.head.bias
    assert torch.allclose(model.step_logits(x), logits, atol=1e-5)
    assert torch.allclose(model(x).exp(), logits.softmax(dim=2).mean(dim=1), atol=1e-5)
    labels = torch.tensor([2, 0])
    by_hand = torch.stack([F.cross_entropy(logits[:, t], labels) for t in range(5)]).mean()
    assert torch.allclose(model.loss(x, labels), by_hand, atol=1e-5)


def test_padded_frames_do_not_count() -> None:
    model, x = tiny_lrcn().eval(), clips()
    lengths, labels = torch.tensor([5, 3]), torch.tensor([2, 0])
    other = x.clone()
    other[1, :, 3:] = 9.0
    assert torch.allclose(model(x, lengths=lengths), model(other, lengths=lengths), atol=1e-6)
    assert torch.allclose(model(x, lengths=lengths)[1:], model(x[1:, :, :3]), atol=1e-6)
    padded = model.loss(other, labels, lengths=lengths)
    parts = 5 * model.loss(x[:1], labels[:1]) + 3 * model.loss(x[1:, :, :3], labels[1:])
    assert torch.allclose(padded, parts / 8, atol=1e-6)


def test_a_stream_is_the_clip_and_a_start_forgets_it() -> None:
    model, x = tiny_lrcn().eval(), clips(frames=6)
    first, state = model.stream(x[:, :, :4])
    second, _ = model.stream(x[:, :, 4:], state)
    assert torch.allclose(torch.cat([first, second], dim=1), model.step_logits(x), atol=1e-6)
    starts = torch.tensor([[True, False]] * 2)
    again, _ = model.stream(x[:, :, 4:], state, starts=starts)
    assert torch.allclose(again, model.step_logits(x[:, :, 4:]), atol=1e-6)
    assert (again - second).abs().max() > 1e-3


def test_the_baseline_ignores_order_and_lrcn_does_not() -> None:
    torch.manual_seed(0)
    baseline, x = SingleFrame(TinyEncoder(), num_classes=3, in_frames=5).eval(), clips()
    assert torch.allclose(baseline(x), baseline(x.flip(2)), atol=1e-6)
    model = tiny_lrcn().eval()
    assert (model(x) - model(x.flip(2))).abs().max() > 1e-3


def rising_or_falling(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips that brighten (class 0) or darken (class 1): every frame by itself tells nothing."""
    labels = torch.randint(0, 2, (number,), generator=generator)
    ramp = torch.linspace(-1, 1, 5).expand(number, 5)
    levels = torch.where(labels[:, None] == 0, ramp, ramp.flip(1))
    noise = 0.1 * torch.randn(number, 1, 5, 8, 8, generator=generator)
    return noise + levels[:, None, :, None, None], labels


def test_training_tells_brightening_from_darkening() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    held_out, labels = rising_or_falling(200, generator)
    accuracy = {}
    for network in (
        LRCN(TinyEncoder(), num_classes=2, in_frames=5, hidden=8, feature_dropout=0, dropout=0, init="torch"),
        SingleFrame(TinyEncoder(), num_classes=2, in_frames=5, dropout=0),
    ):
        task = Classifier(network, label_smoothing=0.0, multi_label=False)
        optimizer = torch.optim.Adam(task.parameters(), lr=0.02)
        for _ in range(80):
            x, y = rising_or_falling(16, generator)
            optimizer.zero_grad()
            task({"clips": x, "labels": y})["loss"].backward()
            optimizer.step()
        with torch.no_grad():
            accuracy[type(network)] = (network.eval()(held_out).argmax(dim=1) == labels).float().mean()
    assert accuracy[LRCN] > 0.95
    assert accuracy[SingleFrame] < 0.65  # 200 fair coins stay below with probability 0.99999


# --- weights ----------------------------------------------------------------------------------------------------------


def test_lrcn_starts_from_the_single_frame_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    baseline = SingleFrame(TinyEncoder(), num_classes=3, in_frames=1)
    save_file(baseline.state_dict(), tmp_path / "single.safetensors")
    model = tiny_lrcn()
    before = model.lstm.weight_x0.clone()
    report = load_pretrained(model, tmp_path / "single.safetensors")
    assert torch.equal(model.encoder.conv.weight, baseline.encoder.conv.weight)
    assert torch.equal(model.lstm.weight_x0, before)
    assert report.head_fresh == ("head.weight", "head.bias")  # 6 features there, 4 here
    assert any("starts fresh: lstm.bias0" in note for note in report.notes)


def test_a_temporal_part_with_holes_is_refused(tmp_path: Path) -> None:
    state = tiny_lrcn().state_dict()
    del state["lstm.weight_h0"]
    save_file(state, tmp_path / "holes.safetensors")
    with pytest.raises(ModelError, match=r"missing \(lstm.weight_h0\)"):
        load_pretrained(tiny_lrcn(), tmp_path / "holes.safetensors")


def test_the_weights_of_the_image_network_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = TinyEncoder()
    torch.save(source.state_dict(), tmp_path / "image.pt")
    model = tiny_lrcn()
    assert not torch.equal(model.encoder.conv.weight, source.conv.weight)
    load_pretrained(model, tmp_path / "image.pt")
    assert torch.equal(model.encoder.conv.weight, source.conv.weight)


def test_imagenet_weights_of_a_registered_encoder() -> None:
    model = create_model("lrcn", num_classes=3, pretrained="imagenet", train_encoder=False)
    image = create_model("efficientnet_lite0", pretrained="imagenet")
    assert torch.equal(model.encoder.stem[0].weight, image.stem[0].weight)
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert not model.train().encoder.training
    assert model.checkpoint_blocks() == []


# --- the image networks -----------------------------------------------------------------------------------------------


def test_caffenet_is_the_bvlc_reference_network() -> None:
    with torch.device("meta"):
        model = create_model("caffenet")
        assert model.forward_features(torch.empty(1, 3, 227, 227)).shape == (1, 256, 6, 6)
    assert sum(p.numel() for p in model.parameters()) == 60_965_224  # bvlc_reference_caffenet


def test_the_hybrid_sees_thirteen_by_thirteen() -> None:
    with torch.device("meta"):
        model = create_model("caffenet_hybrid")
        x = torch.empty(1, 3, 227, 227)
        sizes = []
        for block in model.conv:
            x = block(x)
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [(96, 55, 55), (384, 13, 13), (512, 13, 13), (512, 13, 13), (384, 6, 6)]


def test_caffenet_layer_by_layer() -> None:
    torch.manual_seed(0)
    model = create_model("caffenet", num_classes=0, fully_connected=0).eval()
    x = torch.randn(1, 3, 227, 227)

    def norm(x: Tensor) -> Tensor:  # Caffe: x / (1 + alpha/n sum of squares over n channels)^beta
        total = F.pad(x.square(), (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(dim=-1)
        return x / (1 + 1e-4 / 5 * total) ** 0.75

    weights = [(block[0].weight, block[0].bias) for block in model.conv]
    y = norm(F.max_pool2d(F.conv2d(x, *weights[0], stride=4).relu(), 3, 2))
    y = norm(F.max_pool2d(F.conv2d(y, *weights[1], padding=2, groups=2).relu(), 3, 2))
    y = F.conv2d(y, *weights[2], padding=1).relu()
    y = F.conv2d(y, *weights[3], padding=1, groups=2).relu()
    y = F.max_pool2d(F.conv2d(y, *weights[4], padding=1, groups=2).relu(), 3, 2)
    assert torch.allclose(model.forward_features(x), y, rtol=1e-4, atol=1e-4)


def test_the_layer_a_caffenet_is_read_at() -> None:
    with torch.device("meta"):
        assert len(frame_encoder("caffenet", layer="fc6").fc) == 1
        assert len(frame_encoder("caffenet").fc) == 2
        assert frame_encoder("caffenet", unless_given="conv").feature_dim == 256
        with pytest.raises(ModelError, match="encoder_layer='fc8'"):
            create_model("lrcn", encoder="caffenet", encoder_layer="fc8")
        with pytest.raises(ModelError, match="has no such layer"):
            create_model("lrcn", encoder="resnet_50", encoder_layer="fc6")
        with pytest.raises(ModelError, match="not a 2D model"):
            create_model("lrcn", encoder="t3d_tiny")
