"""Image ViTs of timm as teachers, of random weights: maps and attention against timm's own, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cliplift.configs.supervision import TeacherConfig
from cliplift.models import ModelError, create_model, list_models
from cliplift.models.registry import model_entry
from cliplift.models.video_vit import image_teachers
from cliplift.models.video_vit.distil import image_targets
from cliplift.models.video_vit.image_teachers import TimmTeacher
from cliplift.pipelines.stages.teacher import build_teachers

NAME = "timm:test_vit"  # timm's own of 6 blocks of width 64, patches of 16


@pytest.fixture
def timm() -> ModuleType:
    return pytest.importorskip("timm", exc_type=ImportError)


def made(name: str = NAME) -> TimmTeacher:
    torch.manual_seed(0)
    net = create_model(name, crop=64).eval()
    assert isinstance(net, TimmTeacher)
    return net


def test_maps_and_attention_of_a_class_token(timm: ModuleType) -> None:
    net, x = made(), torch.randn(2, 3, 64, 48)  # other than its places are made for
    found: list[torch.Tensor] = []
    block = net.network.blocks[-1].attn  # type: ignore[index, union-attr]
    block.fused_attn = False  # timm then goes through this dropout with the probabilities
    block.attn_drop.register_forward_hook(lambda _, given, __: found.append(given[0]))
    with torch.no_grad():
        tokens = net.network.forward_features(x)  # type: ignore[operator]
        expected = found[0].mean(dim=1)[:, 0, 1:]
        maps, attention = image_targets(net, x, layers=2)
        torch.testing.assert_close(net(x), net.network(x))
    assert [tuple(one.shape) for one in maps] == [(2, 64, 4, 3)] * 2
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), tokens[:, 1:])
    torch.testing.assert_close(net.forward_features(x), maps[-1])
    torch.testing.assert_close(attention.flatten(1), expected)


def test_attention_of_a_pools_query(timm: ModuleType) -> None:
    """SigLIP's kind: no class token, a latent query that pools."""
    network = timm.create_model(
        "test_vit", num_classes=0, class_token=False, global_pool="map", dynamic_img_size=True, img_size=64
    ).eval()
    spec = made().input_spec
    net, x = TimmTeacher(network, patch=16, num_classes=0, input_spec=spec).eval(), torch.randn(2, 3, 64, 64)
    nn.init.normal_(network.attn_pool.latent)
    network.attn_pool.fused_attn = False
    with torch.no_grad():
        maps, attention = net.teach_tokens(x, layers=1)
        # the pool is linear in its values: with values of 1 for one place and 0 elsewhere it gives that place's weight
        pool, heads = network.attn_pool, network.attn_pool.num_heads
        tokens = maps[0].flatten(2).transpose(1, 2)
        q = pool.q(pool.latent).reshape(1, heads, -1)
        k = pool.kv(tokens)[..., :64].reshape(2, 16, heads, -1)
        scores = torch.einsum("ohd,bnhd->bhn", q, k) * pool.scale
    torch.testing.assert_close(attention.flatten(1), scores.softmax(dim=-1).mean(dim=1))


def test_a_file_of_timms_names_is_read(timm: ModuleType, tmp_path: Path) -> None:
    theirs = timm.create_model("test_vit", num_classes=10, img_size=64)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    teachers = build_teachers(
        TeacherConfig(name=NAME, options={"crop": 64}, pretrained=str(tmp_path / "model.safetensors")),
        weights=True,
    )
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.eval().forward_head(theirs.forward_features(x), pre_logits=True)
        torch.testing.assert_close(teachers(x), expected)
    assert not any(parameter.requires_grad for parameter in teachers.parameters())


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:no_such_model"])
def test_what_has_no_patch_tokens_is_refused(timm: ModuleType, name: str) -> None:
    with pytest.raises(ModelError, match=r"has no (patch tokens that could teach|model)"):
        create_model(name)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(image_teachers, "importlib", SimpleNamespace(import_module=missing))
    assert model_entry(NAME).dims == "2d"
    assert NAME not in list_models()
    with pytest.raises(ModelError, match=r"need the extra timm: pip install 'cliplift\[timm\]'"):
        create_model(NAME)
