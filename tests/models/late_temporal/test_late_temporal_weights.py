"""Where the tensors of public files go in a late-temporal net, and what stays fresh."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cliplift.models import ModelError, create_model
from cliplift.models.factory import load_pretrained
from cliplift.models.late_temporal.model import LateTemporal
from cliplift.models.late_temporal.weights import public_name
from cliplift.models.state_dicts import load_state


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, num_classes=51)


@functools.cache
def built(**options: Any) -> LateTemporal:
    torch.manual_seed(0)
    model = create_model("late_temporal", num_classes=4, **options)
    assert isinstance(model, LateTemporal)
    return model


def small(head: str = "bert", **options: Any) -> LateTemporal:
    """ResNet3D-18 on 32 frames: T' = 2 tokens of 512, or fewer channels with a reduction. A copy of one's own."""
    return copy.deepcopy(built(head=head, **{"backbone": "resnet3d_18", "in_frames": 32, **options}))


@functools.cache
def backbone_state(name: str, num_classes: int) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return create_model(name, num_classes=num_classes).state_dict()


# names in the public code's modules (BERT5 and BERT2, NLBlockND, SlowFast's members) and here
PUBLIC_NAMES = {
    "fc_action.weight": "classifier.weight",
    "fc_action.bias": "classifier.bias",
    "bert.clsToken": "temporal.bert.cls_token",
    "bert.embedding.learnedPosition.pe": "temporal.bert.positions",
    "bert.transformer_blocks.0.attention.linear_layers.0.weight": "temporal.bert.blocks.0.attention.query.weight",
    "bert.transformer_blocks.0.attention.linear_layers.0.bias": "temporal.bert.blocks.0.attention.query.bias",
    "bert.transformer_blocks.0.attention.linear_layers.1.weight": "temporal.bert.blocks.0.attention.key.weight",
    "bert.transformer_blocks.0.attention.linear_layers.1.bias": "temporal.bert.blocks.0.attention.key.bias",
    "bert.transformer_blocks.0.attention.linear_layers.2.weight": "temporal.bert.blocks.0.attention.value.weight",
    "bert.transformer_blocks.0.attention.linear_layers.2.bias": "temporal.bert.blocks.0.attention.value.bias",
    "bert.transformer_blocks.0.attention.output_linear.weight": "temporal.bert.blocks.0.attention.out.weight",
    "bert.transformer_blocks.0.attention.output_linear.bias": "temporal.bert.blocks.0.attention.out.bias",
    "bert.transformer_blocks.0.feed_forward.w_1.weight": "temporal.bert.blocks.0.feed_forward.expand.weight",
    "bert.transformer_blocks.0.feed_forward.w_1.bias": "temporal.bert.blocks.0.feed_forward.expand.bias",
    "bert.transformer_blocks.0.feed_forward.w_2.weight": "temporal.bert.blocks.0.feed_forward.contract.weight",
    "bert.transformer_blocks.0.feed_forward.w_2.bias": "temporal.bert.blocks.0.feed_forward.contract.bias",
    "bert.transformer_blocks.0.input_sublayer.norm.a_2": "temporal.bert.blocks.0.attention_norm.weight",
    "bert.transformer_blocks.0.input_sublayer.norm.b_2": "temporal.bert.blocks.0.attention_norm.bias",
    "bert.transformer_blocks.0.output_sublayer.norm.a_2": "temporal.bert.blocks.0.feed_forward_norm.weight",
    "bert.transformer_blocks.0.output_sublayer.norm.b_2": "temporal.bert.blocks.0.feed_forward_norm.bias",
}


def test_a_checkpoint_of_the_public_code_fills_head_reduction_and_backbone(tmp_path: Path) -> None:
    source, target = (
        small(reduction="frab", reduced_channels=64),
        small(reduction="frab", reduced_channels=64),
    )
    with torch.no_grad():
        for number, p in enumerate(source.parameters()):
            p.fill_(number)
    own = source.state_dict()
    public = {theirs: own[ours] for theirs, ours in PUBLIC_NAMES.items()}
    public |= {k.replace("reduction.", "mapper."): v for k, v in own.items() if k.startswith("reduction.")}
    public |= {k.removeprefix("backbone."): v for k, v in own.items() if k.startswith("backbone.")}
    torch.save({"epoch": 7, "arch": "net", "state_dict": public}, tmp_path / "model_best.pth.tar")
    report = load_pretrained(target, tmp_path / "model_best.pth.tar")
    assert report.loaded == len(own)
    assert any("LateTemporalModeling3DCNN" in note for note in report.notes)
    assert all(torch.equal(value, own[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize(
    ("public", "pathways", "ours"),
    [
        ("bert_slow.clsToken", True, "temporal.slow.bert.cls_token"),
        ("bert_fast.embedding.learnedPosition.pe", True, "temporal.fast.bert.positions"),
        ("mapper.downsample.0.weight", True, "reduction.slow.downsample.0.weight"),
        ("mapper.downsample.0.weight", False, "reduction.downsample.0.weight"),
        ("mapper_slow.bn1.weight", True, "reduction.slow.bn1.weight"),
        ("mapper_fast.bn1.weight", True, "reduction.fast.bn1.weight"),
        ("lstm.weight_ih_l1", False, "temporal.lstm.weight_ih_l1"),
        ("linear.bias", False, "temporal.linear.bias"),
        ("NLB.W_z.0.weight", False, "temporal.block.out.weight"),
        ("NLB.W_z.1.running_mean", False, "temporal.block.norm.running_mean"),
        ("NLB.theta.bias", False, "temporal.block.theta.bias"),
        ("features.7.2.conv1.weight", False, None),
        ("model.s5.pathway0_res2.branch2.a.weight", True, None),
    ],
)
def test_public_names(public: str, pathways: bool, ours: str | None) -> None:
    assert public_name(public, pathways=pathways) == ours


@pytest.mark.parametrize("name", ["slowfast_r50_8x8_frmb_bert_late", "slowfast_r50_8x8_frab_bert_early"])
def test_public_slowfast_checkpoints_by_name_and_shape(name: str) -> None:
    """The public nets name FRMB's block twice and carry Kinetics' classifier; nothing may be missing or left over."""
    model = on_meta(name)
    back = {"classifier": "fc_action", "reduction.slow": "mapper_slow", "reduction.fast": "mapper_fast"}
    if name.endswith("late"):
        back |= {"temporal.slow.bert": "bert_slow", "temporal.fast.bert": "bert_fast"}
    names = {ours.removeprefix("temporal.bert."): k.removeprefix("bert.") for k, ours in PUBLIC_NAMES.items()}
    public: dict[str, Tensor] = {"model.head.projection.weight": torch.empty(400, 2304, device="meta")}
    public["model.head.projection.bias"] = torch.empty(400, device="meta")
    for key, value in model.state_dict().items():
        start = next((s for s in (*back, "temporal.bert") if key.startswith(f"{s}.")), "")
        inner = key.removeprefix(f"{start}.")
        if start.startswith("temporal"):
            public[f"{back.get(start, 'bert')}.{names[inner]}"] = value
        elif start:
            public[f"{back[start]}.{inner}"] = value
        else:
            public["model." + key.removeprefix("backbone.")] = value
            if "s5.pathway0_res2." in key and name.endswith("late"):
                public["mapper." + key.rpartition("pathway0_res2.")[2]] = value
    report = load_state(model, public, source="public")
    assert report.loaded == len(model.state_dict())
    assert not report.head_skipped
    assert any("projection" in note for note in report.notes)


@pytest.mark.parametrize("reduction", ["none", "frmb", "frab"])
def test_weights_of_the_backbone_alone_leave_the_rest_fresh(reduction: str) -> None:
    public = backbone_state("resnet3d_18", 7)
    model = small(reduction=reduction, reduced_channels=64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_state(model, public, source="kinetics")
    fresh = ("temporal.", "reduction.", "classifier.", *(f"backbone.{b}." for b in model.replaced_blocks))
    for key, value in model.state_dict().items():
        expected = before[key] if key.startswith(fresh) else public[key.removeprefix("backbone.")]
        assert torch.equal(value, expected), key
    notes = " ".join(report.notes)
    assert "fc.weight, fc.bias" in notes
    assert "freshly initialised, temporal.*: 18 tensors" in notes
    assert ("backbone.layer4.1.*" in notes) == (reduction == "frmb")
    assert ("reduction.*" in notes) == (reduction == "frab")


def test_another_head_takes_over_the_backbone_and_another_class_count_keeps_bert() -> None:
    tgap, bert = small("tgap"), small()
    with torch.no_grad():
        tgap.backbone.conv1.weight.fill_(3.0)  # type: ignore[union-attr, operator]
    report = load_state(bert, tgap.state_dict(), source="tgap")
    assert "freshly initialised, temporal.*" in " ".join(report.notes)
    assert torch.equal(bert.backbone.conv1.weight, tgap.backbone.conv1.weight)  # type: ignore[union-attr, arg-type]
    bert.reset_classifier(9)
    again = small()
    report = load_state(again, bert.state_dict(), source="9 classes")
    assert set(report.head_fresh) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(again.temporal.bert.positions, bert.temporal.bert.positions)  # type: ignore[union-attr, arg-type]


def test_weights_that_are_not_this_nets_are_refused() -> None:
    model = small()
    other = {k.replace("layer4.1", "layer4.2"): v for k, v in backbone_state("resnet3d_18", 7).items()}
    with pytest.raises(ModelError, match="unexpected"):
        load_state(model, other, source="other")
    longer = small(in_frames=64).state_dict()  # 4 positions and CLS instead of 2
    with pytest.raises(ModelError, match=r"positions \(1, 5, 512\) for \(1, 3, 512\)"):
        load_state(model, longer, source="longer")
