"""Every layout of public weights, on synthetic files, into the nets they are for."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cliplift.launch.cli import main
from cliplift.models import ModelError, create_model, from_pretrained
from cliplift.models.factory import load_pretrained
from cliplift.models.video_vit.attentive import AttentiveProbe
from cliplift.models.video_vit.decoder import MaskedAutoencoder
from cliplift.models.video_vit.huggingface import save_huggingface
from cliplift.models.video_vit.latent import LatentPredictor
from cliplift.models.video_vit.model import VideoViT

SMALL: dict[str, Any] = {
    "crop": 32,
    "in_frames": 4,
    "width": 48,
    "depth": 2,
    "heads": 4,
    "hidden": 96,
    "patch": 8,
}


def filled(net: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def videomae(seed: int, **options: Any) -> VideoViT:
    return cast(
        VideoViT, filled(create_model("video_vit_base_16", **(SMALL | {"num_classes": 0} | options)), seed)
    )


def autoencoder(seed: int) -> MaskedAutoencoder:
    net = MaskedAutoencoder(videomae(seed, final_norm="tokens"), width=24, depth=2, heads=3)
    return cast(MaskedAutoencoder, filled(net, seed))


def vjepa(seed: int, **options: Any) -> VideoViT:
    return cast(
        VideoViT, filled(create_model("vjepa2_large_16", **(SMALL | {"num_classes": 0} | options)), seed)
    )


def as_videomae(net: nn.Module) -> dict[str, Tensor]:
    """The released names and shapes: the two biases stand in the attention, the mask token in three dimensions."""
    return {
        re.sub(r"attn\.qkv\.([qv]_bias)", r"attn.\1", key): value[None, None]
        if key == "mask_token"
        else value
        for key, value in net.state_dict().items()
    }


def same(one: nn.Module, two: nn.Module) -> None:
    ours, theirs = one.state_dict(), two.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [k for k in ours if not torch.equal(ours[k], theirs[k])]


@pytest.fixture
def pretrained_file(tmp_path: Path) -> Path:
    """As VideoMAE saves: the training's arguments beside the weights."""
    content = {
        "model": as_videomae(autoencoder(1)),
        "epoch": 799,
        "args": argparse.Namespace(model="pretrain_videomae_base_patch16_224", lr=1.5e-4),
        "optimizer": {"state": {}, "param_groups": []},
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def test_a_pretraining_file_into_the_whole_net(pretrained_file: Path) -> None:
    net = autoencoder(2)
    load_pretrained(net, pretrained_file)
    same(net, autoencoder(1))


def test_a_pretraining_file_into_an_encoder(pretrained_file: Path) -> None:
    encoder = videomae(2, final_norm="tokens")
    report = load_pretrained(encoder, pretrained_file)
    same(encoder, autoencoder(1).encoder)
    assert any("pretraining alone" in note for note in report.notes)


def test_a_pretraining_file_into_a_net_to_finetune(pretrained_file: Path) -> None:
    model = videomae(2, num_classes=5)
    report = load_pretrained(model, pretrained_file)
    assert set(report.head_fresh) == {"head.weight", "head.bias"}
    assert any("fc_norm starts fresh" in note for note in report.notes)
    assert torch.equal(model.fc_norm.weight, torch.ones(48))
    assert torch.equal(model.blocks[1].mlp.fc2.weight, autoencoder(1).encoder.blocks[1].mlp.fc2.weight)


@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_a_finetuned_file(tmp_path: Path, wrapper: str) -> None:
    torch.save({wrapper: as_videomae(videomae(1, num_classes=5))}, tmp_path / "finetuned.pth")
    model = videomae(2, num_classes=5)
    assert load_pretrained(model, tmp_path / "finetuned.pth").head_fresh == ()
    same(model, videomae(1, num_classes=5))
    other = videomae(2, num_classes=7)
    assert load_pretrained(other, tmp_path / "finetuned.pth").head_fresh


def test_hugging_faces_pretraining_folder_into_an_encoder(tmp_path: Path) -> None:
    """The names on the Hub, whose biases are apart from queries and values."""
    folder = save_huggingface(autoencoder(1), tmp_path)
    encoder, net = videomae(2, final_norm="tokens"), autoencoder(2)
    load_pretrained(encoder, folder)
    same(encoder, autoencoder(1).encoder)
    load_pretrained(net, folder)
    same(net, autoencoder(1))


def test_a_folder_with_another_number_of_heads_is_refused(tmp_path: Path) -> None:
    """No shape tells: the same tensors would load and compute something else."""
    save_huggingface(autoencoder(1), tmp_path)
    with pytest.raises(ModelError, match=r"num_attention_heads=4, this model has 6"):
        load_pretrained(videomae(2, final_norm="tokens", heads=6), tmp_path)
    other = MaskedAutoencoder(videomae(2, final_norm="tokens"), width=24, depth=2, heads=6)
    with pytest.raises(ModelError, match=r"decoder_num_attention_heads=3, this model has 6"):
        load_pretrained(other, tmp_path)


def as_released(net: nn.Module) -> dict[str, Tensor]:
    """V-JEPA's prefixes, and a table of positions that rotary nets do not use."""
    state = {f"module.backbone.{key}": value for key, value in net.state_dict().items()}
    return state | {"module.backbone.pos_embed": torch.zeros(1, 32, 48)}


def as_released_predictor(net: LatentPredictor) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, value in net.state_dict().items():
        if key == "mask_tokens":
            state |= {f"module.backbone.mask_tokens.{i}": row[None, None] for i, row in enumerate(value)}
        else:
            name = (
                "predictor_embed." + key.removeprefix("embed.out.")
                if key.startswith("embed.")
                else f"predictor_{key}"
            )
            state[f"module.backbone.{name}"] = value
    return state


def predictor(seed: int) -> LatentPredictor:
    return cast(
        LatentPredictor, filled(LatentPredictor(48, width=36, depth=2, heads=3, mask_tokens=11), seed)
    )


@pytest.fixture
def vjepa_file(tmp_path: Path) -> Path:
    content = {
        "encoder": as_released(vjepa(1)),
        "target_encoder": as_released(vjepa(3)),
        "predictor": as_released_predictor(predictor(1)),
        "opt": {"state": {}},
        "epoch": 10,
        "loss": 0.4,
    }
    torch.save(content, tmp_path / "vitl.pt")
    return tmp_path / "vitl.pt"


def test_a_vjepa2_file_gives_the_teacher_and_the_predictor(vjepa_file: Path) -> None:
    encoder, own = vjepa(2), predictor(2)
    report = load_pretrained(encoder, vjepa_file)
    same(encoder, vjepa(3))
    assert any("pos_embed" in note for note in report.notes)
    load_pretrained(own, vjepa_file)
    same(own, predictor(1))
    assert torch.equal(own.mask_tokens[10], predictor(1).mask_tokens[10])  # numbered, not sorted as words


def test_a_vjepa21_file_gives_its_ema_encoder(tmp_path: Path) -> None:
    def dense(seed: int) -> nn.Module:
        options = SMALL | {"depth": 12, "num_classes": 0}
        return filled(create_model("vjepa21_base_16", **options), seed)

    table = {
        "image_embed.proj": "patch_embed_img.proj",
        "image_embed.modality": "img_mod_embed",
        "patch_embed.modality": "video_mod_embed",
        "level_norms": "norms_block",
    }
    state = {}
    for key, value in dense(1).state_dict().items():
        name = next(
            (theirs + key.removeprefix(ours) for ours, theirs in table.items() if key.startswith(ours)), key
        )
        state[f"module.backbone.{name}"] = value
    torch.save({"ema_encoder": state}, tmp_path / "vitb.pt")
    model = dense(2)
    load_pretrained(model, tmp_path / "vitb.pt")
    same(model, dense(1))


def probe(seed: int) -> AttentiveProbe:
    return cast(AttentiveProbe, filled(AttentiveProbe(48, num_classes=5), seed))


def test_a_probe_of_a_file_of_one(tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in probe(1).state_dict().items()}
    torch.save({"classifiers": [state], "epoch": 20}, tmp_path / "one.pt")
    own = probe(2)
    load_pretrained(own, tmp_path / "one.pt")
    same(own, probe(1))
    torch.save({"classifiers": [state] * 20}, tmp_path / "grid.pt")
    with pytest.raises(ModelError, match="holds 20 nets"):
        load_pretrained(own, tmp_path / "grid.pt")


def test_a_probe_becomes_the_head_of_its_encoder(tmp_path: Path) -> None:
    state = vjepa(1).state_dict() | probe(1).state_dict()
    save_file(state, tmp_path / "both.safetensors")
    model = vjepa(2, num_classes=5)
    assert load_pretrained(model, tmp_path / "both.safetensors").head_fresh == ()
    same(cast(nn.Module, model.head), probe(1))


@pytest.mark.parametrize("family", ["videomae", "vjepa"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda s: s | {"blocks.0.attn.relative_position": torch.zeros(3)},
            r"1 unexpected \(blocks.0.attn.relative_position\)",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "mlp.fc2" not in k},
            r"4 missing \(.*blocks.0.mlp.fc2.weight",
        ),
        (
            lambda s: s | {"patch_embed.proj.weight": torch.zeros(48, 3, 2, 16, 16)},
            r"another shape \(patch_embed",
        ),
    ],
)
def test_unknown_missing_and_misshapen_tensors_are_listed_and_refused(
    tmp_path: Path, family: str, change: Any, told: str
) -> None:
    make = {"videomae": videomae, "vjepa": vjepa}[family]
    torch.save(change(as_videomae(make(1))), tmp_path / "odd.pth")
    with pytest.raises(ModelError, match=told):
        load_pretrained(make(2), tmp_path / "odd.pth")


def test_half_of_queries_keys_and_values_is_refused(tmp_path: Path) -> None:
    save_huggingface(autoencoder(1), tmp_path)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "model.safetensors")
    del state["videomae.encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(ModelError, match=r"blocks\.1\.attn\.q\.weight"):
        load_state_of(videomae(2, final_norm="tokens"), state, tmp_path)


def load_state_of(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    save_file(state, folder / "half.safetensors")
    load_pretrained(model, folder / "half.safetensors")


def test_import_weights_from_the_command_line(
    tmp_path: Path, pretrained_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "import-weights",
        str(pretrained_file),
        "--model",
        "video_vit_base_16",
        "--output",
        str(tmp_path / "out"),
    ]
    options = {"final_norm": "tokens"} | {k: v for k, v in SMALL.items() if k != "in_frames"}
    for key, value in options.items():
        words += ["--option", f"{key}={value}"]
    assert main([*words, "--in-frames", "4"]) == 0
    assert "pretraining alone" in capsys.readouterr().out
    same(from_pretrained(tmp_path / "out"), autoencoder(1).encoder)
