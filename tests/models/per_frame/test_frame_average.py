"""The image baseline: time is averaged away, the encoder stays frozen when asked."""

from __future__ import annotations

import pytest
import torch

from cliplift.models import ModelError, create_model


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(
        "frame_average", num_classes=5, in_frames=4, pretrained="imagenet", train_encoder=False
    ).eval()


def test_the_order_of_frames_cannot_matter(model: torch.nn.Module) -> None:
    clips = torch.rand(2, 3, 4, 64, 64)
    shuffled = clips[:, :, [2, 0, 3, 1]]
    assert torch.allclose(model(clips), model(shuffled), atol=1e-5)


def test_features_are_the_mean_of_the_encoders(model: torch.nn.Module) -> None:
    clips = torch.rand(2, 3, 4, 64, 64)
    with torch.no_grad():
        by_hand = torch.stack([model.encoder(clips[:, :, t]) for t in range(4)]).mean(dim=0)
        assert torch.allclose(model(clips), by_hand @ model.head.weight.T + model.head.bias, atol=1e-5)


def test_a_frozen_encoder_gets_no_gradient_and_keeps_its_statistics(model: torch.nn.Module) -> None:
    model.train()
    before = {name: buffer.clone() for name, buffer in model.encoder.named_buffers()}
    model(torch.rand(2, 3, 4, 64, 64)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(torch.equal(before[name], buffer) for name, buffer in model.encoder.named_buffers())


def test_a_trained_encoder_gets_gradients() -> None:
    model = create_model("frame_average", num_classes=5, in_frames=2)
    model(torch.rand(2, 3, 2, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_3d_encoder_is_refused() -> None:
    with pytest.raises(ModelError, match="not a 2D model"):
        create_model("frame_average", encoder="t3d_tiny")
