"""VideoViT, its decoder, predictor and probe against ``transformers``: numbers, gradients, and weights both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cliplift.models import ModelError, create_model
from cliplift.models.factory import load_pretrained
from cliplift.models.state_dicts import load_state
from cliplift.models.video_vit.attentive import AttentiveProbe
from cliplift.models.video_vit.decoder import MaskedAutoencoder
from cliplift.models.video_vit.huggingface import (
    save_huggingface,
    videomae_to_huggingface,
    vjepa2_to_huggingface,
)
from cliplift.models.video_vit.latent import LatentPredictor
from cliplift.models.video_vit.masks import MaskDraws, token_numbers, tube_mask
from cliplift.models.video_vit.model import VideoViT

transformers = pytest.importorskip("transformers")

SMALL = {
    "crop": 32,
    "patch": 8,
    "in_frames": 4,
    "width": 48,
    "depth": 3,
    "heads": 4,
    "hidden": 96,
    "drop_path": 0.0,
}
PREDICTOR = {"width": 36, "depth": 2, "heads": 3}


def videomae_config(**options: object) -> object:
    return transformers.VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        layer_norm_eps=1e-6,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=48,
        num_labels=7,
        **options,
    )


def vjepa_config() -> object:
    return transformers.VJEPA2Config(
        crop_size=32,
        patch_size=8,
        frames_per_clip=4,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_ratio=2.0,
        pred_hidden_size=36,
        pred_num_hidden_layers=2,
        pred_num_attention_heads=3,
        pred_num_mask_tokens=5,
        num_labels=7,
    )


@pytest.fixture
def clips() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 4, 32, 32)


def randomised(net: nn.Module) -> nn.Module:
    """Nothing at zero or one, so that every tensor is seen; eps where a config cannot say it is the released code's."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    for name, module in net.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5 if "pooler" in name else 1e-6
    return net.eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def same_gradients(ours: nn.Module, theirs: nn.Module, export: Callable[[], dict[str, Tensor]]) -> None:
    """Gradients put where the parameters stand, and sent through the export, which only renames and cuts."""
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    renamed = export()
    for name, parameter in theirs.named_parameters():
        wanted = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        found = renamed.get(
            name, renamed.get(name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"))
        )
        if found is None:
            assert parameter.grad is None, name
            continue
        torch.testing.assert_close(
            found, wanted, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def autoencoder() -> MaskedAutoencoder:
    encoder = create_model("video_vit_base_16", num_classes=0, final_norm="tokens", **SMALL)
    assert isinstance(encoder, VideoViT)
    return MaskedAutoencoder(encoder, width=24, depth=2, heads=3).eval()


def hidden_tokens() -> tuple[Tensor, Tensor]:
    mask = tube_mask(
        autoencoder().encoder.native_grid, MaskDraws.of(3, epoch=0, positions=[5, 9]), ratio=0.75
    )
    return mask, token_numbers(mask)[0]


def test_videomae_pretraining(clips: Tensor) -> None:
    theirs = randomised(transformers.VideoMAEForPreTraining(videomae_config(use_mean_pooling=False)))
    ours = autoencoder()
    load_state(ours, theirs.state_dict(), source="transformers")
    mask, visible = hidden_tokens()
    wanted = theirs(clips.transpose(1, 2), bool_masked_pos=mask)
    found = ours(clips, visible)
    close(found.prediction, wanted.logits)
    close(found.loss, wanted.loss)
    wanted.loss.backward()
    found.loss.backward()
    same_gradients(ours, theirs, lambda: videomae_to_huggingface(ours)[0])


def test_videomae_classifier(clips: Tensor) -> None:
    theirs = randomised(transformers.VideoMAEForVideoClassification(videomae_config()))
    ours = create_model("video_vit_base_16", num_classes=7, **SMALL).eval()
    load_state(ours, theirs.state_dict(), source="transformers")
    wanted, found = theirs(clips.transpose(1, 2)).logits, ours(clips)
    close(found, wanted)
    for logits in (wanted, found):
        nn.functional.cross_entropy(logits, torch.tensor([2, 6])).backward()
    same_gradients(ours, theirs, lambda: videomae_to_huggingface(ours)[0])


def vjepa(num_classes: int = 0) -> VideoViT:
    model = create_model("vjepa2_large_16", num_classes=num_classes, **SMALL)
    assert isinstance(model, VideoViT)
    return model.eval()


def test_vjepa2_encoder_and_predictor(clips: Tensor) -> None:
    theirs = randomised(transformers.VJEPA2Model(vjepa_config()))
    ours, predictor = vjepa(), LatentPredictor(48, mask_tokens=5, **PREDICTOR).eval()
    load_state(ours, theirs.state_dict(), source="transformers")
    load_state(predictor, theirs.state_dict(), source="transformers")
    numbers = torch.stack([torch.randperm(32) for _ in clips])
    context, targets = numbers[:, :11], numbers[:, 11:20]
    wanted = theirs(clips.transpose(1, 2), context_mask=[context], target_mask=[targets])
    tokens = ours.forward_tokens(clips)
    close(tokens, wanted.last_hidden_state)
    seen = tokens.gather(1, context[..., None].expand(-1, -1, 48))
    found, _ = predictor(seen, context, targets, ours.grid(4, 32), mask_token=1)
    close(found, wanted.predictor_output.last_hidden_state)
    for prediction in (found, wanted.predictor_output.last_hidden_state):
        prediction.square().mean().backward()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.predictor = ours, predictor

    same_gradients(Both(), theirs, lambda: vjepa2_to_huggingface(ours, predictor)[0])


def test_vjepa2_classifier(clips: Tensor) -> None:
    theirs = randomised(transformers.VJEPA2ForVideoClassification(vjepa_config()))
    ours = create_model("vjepa2_large_16", num_classes=7, probe_heads=4, **SMALL).eval()
    load_state(ours, theirs.state_dict(), source="transformers")
    wanted, found = theirs(clips.transpose(1, 2)).logits, ours(clips)
    close(found, wanted)
    for logits in (wanted, found):
        nn.functional.cross_entropy(logits, torch.tensor([2, 6])).backward()
    same_gradients(ours, theirs, lambda: vjepa2_to_huggingface(ours)[0])


def loaded(kind: type, folder: Path) -> nn.Module:
    """Read by ``transformers``, which must have found every tensor."""
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5 if "pooler" in name else 1e-6
    return model.eval()


def test_transformers_loads_an_exported_pretraining_net(tmp_path: Path, clips: Tensor) -> None:
    ours = randomised(autoencoder())
    theirs = loaded(transformers.VideoMAEForPreTraining, save_huggingface(ours, tmp_path))
    mask, visible = hidden_tokens()
    close(ours(clips, visible).loss, theirs(clips.transpose(1, 2), bool_masked_pos=mask).loss)


def test_transformers_loads_an_exported_classifier(tmp_path: Path, clips: Tensor) -> None:
    ours = randomised(create_model("video_vit_base_16", num_classes=7, **SMALL))
    theirs = loaded(transformers.VideoMAEForVideoClassification, save_huggingface(ours, tmp_path))
    close(ours(clips), theirs(clips.transpose(1, 2)).logits)


def test_transformers_loads_an_exported_vjepa2(tmp_path: Path, clips: Tensor) -> None:
    ours = randomised(vjepa())
    predictor = randomised(LatentPredictor(48, mask_tokens=5, **PREDICTOR))
    theirs = loaded(transformers.VJEPA2Model, save_huggingface(ours, tmp_path, predictor=predictor))
    numbers = torch.arange(32).expand(2, -1)
    prediction = predictor(ours.forward_tokens(clips), numbers, numbers, ours.grid(4, 32), mask_token=1)[0]
    found = theirs(clips.transpose(1, 2))
    close(ours.forward_tokens(clips), found.last_hidden_state)
    close(prediction, found.predictor_output.last_hidden_state)


def test_transformers_loads_an_exported_vjepa2_classifier(tmp_path: Path, clips: Tensor) -> None:
    ours = randomised(create_model("vjepa2_large_16", num_classes=7, probe_heads=4, **SMALL))
    predictor = LatentPredictor(48, mask_tokens=5, **PREDICTOR)
    theirs = loaded(
        transformers.VJEPA2ForVideoClassification, save_huggingface(ours, tmp_path, predictor=predictor)
    )
    close(ours(clips), theirs(clips.transpose(1, 2)).logits)


def test_a_folder_of_transformers_is_read(tmp_path: Path, clips: Tensor) -> None:
    """As ``save_pretrained`` of the installed version writes it, whose biases are named otherwise than on the Hub."""
    theirs = randomised(transformers.VideoMAEForVideoClassification(videomae_config()))
    theirs.save_pretrained(tmp_path)
    ours = create_model("video_vit_base_16", num_classes=7, **SMALL).eval()
    assert load_pretrained(ours, tmp_path).head_fresh == ()
    close(ours(clips), theirs(clips.transpose(1, 2)).logits)


def test_a_probe_alone_is_read_from_a_classifier(clips: Tensor) -> None:
    theirs = randomised(transformers.VJEPA2ForVideoClassification(vjepa_config()))
    probe = AttentiveProbe(48, num_classes=7, heads=4)
    load_state(probe, theirs.state_dict(), source="transformers")
    tokens = torch.randn(2, 32, 48)
    close(probe(tokens), theirs.classifier(theirs.pooler(tokens)))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("video_vit_base_16", {"num_classes": 0}, "classifier"),
        ("video_vit_base_16", {"num_classes": 7, "positions": "rope"}, "full biases"),
        ("vjepa21_base_16", {"num_classes": 0}, "2.1"),
        ("vjepa2_large_16", {"num_classes": 7}, "probe_heads=16"),
        ("vjepa2_large_16", {"num_classes": 7, "head": "linear"}, "head='linear'"),
    ],
)
def test_what_transformers_lacks_is_refused(
    tmp_path: Path, name: str, options: dict[str, object], told: str
) -> None:
    small = SMALL | ({"depth": 12} if "21" in name else {})
    with torch.device("meta"):
        model = create_model(name, **small, **options)
    with pytest.raises(ModelError, match=told):
        save_huggingface(model, tmp_path)
