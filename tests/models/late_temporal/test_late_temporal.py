"""Late-temporal nets: published sizes, feature reduction, and the whole net against its parts."""

import copy
import functools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from cliplift.models import ModelError, create_model
from cliplift.models.conv3d.i3d import Mixed
from cliplift.models.factory import from_pretrained, save_pretrained
from cliplift.models.late_temporal.heads import HEAD_KINDS, HeadKind
from cliplift.models.late_temporal.model import (
    HeadOptions,
    LateTemporal,
    ReductionOptions,
    with_temporal_head,
)
from cliplift.models.late_temporal.reduction import ReducingBottleneck
from cliplift.models.layers import PooledClassifier
from cliplift.models.protocol import InputSpec

RESNEXT_FRMB = {"backbone": "resnext3d_101", "reduction": "frmb"}
KINETICS_HEAD = 2304 * 400 + 400  # the public SlowFast nets carry it along, unused; ours do not have it
# the counts of the public code at 51 classes, part of which are printed in the paper's Table 1
PUBLISHED: list[tuple[str, dict[str, Any], int, int]] = [
    ("resnext3d_101", {}, 47_625_715, 0),
    ("late_temporal", {**RESNEXT_FRMB, "head": "tgap"}, 44_222_451, 0),
    ("late_temporal", {**RESNEXT_FRMB, "head": "lstm"}, 47_578_089, 0),
    ("late_temporal", {**RESNEXT_FRMB, "head": "concat_fc"}, 47_451_339, 0),
    ("late_temporal", {**RESNEXT_FRMB, "head": "nonlocal_concat_fc"}, 47_347_987, 0),
    ("late_temporal", {**RESNEXT_FRMB, "head": "bert"}, 47_377_907, 0),
    ("resnext3d_101_frmb_bert", {}, 47_377_907, 0),
    ("resnext3d_101_frab_bert", {}, 52_465_139, 0),
    ("r2plus1d_34", {}, 63_518_138, 0),
    ("r2plus1d_34_bert", {"in_frames": 32}, 66_673_594, 0),
    ("r2plus1d_34_bert", {"in_frames": 64}, 66_675_642, 0),
    ("i3d_inception", {}, 12_339_539, 0),
    ("i3d_bert", {}, 24_946_003, 0),
    ("i3d_frmb_bert", {}, 13_539_427, 0),
    ("i3d_frab_bert", {}, 16_396_355, 0),
    ("slowfast_r50_8x8", {}, 33_762_043, 0),
    ("slowfast_r50_8x8_frab_bert_early", {}, 43_174_283, KINETICS_HEAD),
    ("slowfast_r50_8x8_frab_bert_late", {}, 42_038_155, KINETICS_HEAD),
    ("slowfast_r50_8x8_frmb_bert_early", {}, 36_511_371, KINETICS_HEAD),
    ("slowfast_r50_8x8_frmb_bert_late", {}, 35_478_411, KINETICS_HEAD),
]


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, num_classes=51, **options).eval()


@functools.cache
def built(**options: Any) -> LateTemporal:
    torch.manual_seed(0)
    model = create_model("late_temporal", num_classes=4, dropout=0.0, **options)
    assert isinstance(model, LateTemporal)
    return model.eval()


def small(head: str = "bert", **options: Any) -> LateTemporal:
    """ResNet3D-18 on 32 frames: T' = 2 tokens of 512, or fewer channels with a reduction. A copy of one's own."""
    return copy.deepcopy(built(head=head, **{"backbone": "resnet3d_18", "in_frames": 32, **options}))


def clips(seed: int = 1, frames: int = 32) -> Tensor:
    return torch.randn(2, 3, frames, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "options", "published", "unused"), PUBLISHED)
def test_parameters_are_the_published_ones(
    name: str, options: dict[str, Any], published: int, unused: int
) -> None:
    model = on_meta(name, **options)
    assert sum(p.numel() for p in model.parameters()) + unused == published


@pytest.mark.parametrize(
    ("name", "frames", "tokens", "dims"),
    [
        ("resnext3d_101_frmb_bert", 64, [4], [512]),
        ("resnext3d_101_frab_bert", 64, [4], [512]),
        ("r2plus1d_34_bert", 32, [4], [512]),
        ("r2plus1d_34_bert", 64, [8], [512]),
        ("i3d_bert", 64, [8], [1024]),
        ("i3d_frab_bert", 64, [8], [512]),
        ("slowfast_r50_8x8_frab_bert_early", 64, [8], [640]),
        ("slowfast_r50_8x8_frab_bert_late", 64, [8, 32], [512, 256]),
        ("slowfast_r50_8x8_frmb_bert_early", 64, [8], [640]),
        ("slowfast_r50_8x8_frmb_bert_late", 64, [8, 32], [512, 256]),
    ],
)
def test_tokens_and_attention_have_the_published_sizes(
    name: str, frames: int, tokens: list[int], dims: list[int]
) -> None:
    model: Any = on_meta(name, in_frames=frames)
    spec = model.input_spec
    assert spec.frames == frames
    x = torch.empty(1, 3, frames, spec.crop_height, spec.crop_width, device="meta")
    logits, attention = model.forward_attention(x)
    assert logits.shape == (1, 51)
    assert [[tuple(layer.shape) for layer in layers] for layers in attention] == [
        [(1, 8, n + 1, n + 1)] for n in tokens
    ]
    assert [maps.shape[1] for _, maps in model.head_inputs(x)] == dims
    assert model.feature_dim == sum(dims)
    assert model.forward_features(x).shape[1:3] == (sum(dims), tokens[0])


# --- feature reduction ------------------------------------------------------------------------------------------------


def test_frmb_replaces_the_last_block_and_frab_appends_one() -> None:
    plain, modified, added = (
        cast(
            LateTemporal,
            on_meta(
                "late_temporal",
                backbone="resnet3d_18",
                in_frames=32,
                reduction=reduction,
                reduced_channels=64,
            ),
        )
        for reduction in ("none", "frmb", "frab")
    )
    x = torch.empty(2, 3, 32, 64, 64, device="meta")
    assert plain.forward_features(x).shape == (2, 512, 2, 2, 2)
    for model, block in (
        (modified, modified.backbone.get_submodule("layer4.1")),
        (added, added.reduction),
    ):
        assert isinstance(block, ReducingBottleneck)
        assert [c.out_channels for c in (block.conv1, block.conv2, block.conv3)] == [32, 32, 64]
        assert block.conv1.in_channels == 512
        assert model.forward_features(x).shape == (2, 64, 2, 2, 2)
    assert modified.replaced_blocks == ("layer4.1",)
    assert not isinstance(added.backbone.get_submodule("layer4.1"), ReducingBottleneck)
    assert plain.checkpoint_blocks() == modified.checkpoint_blocks() == added.checkpoint_blocks()[:-1]
    assert added.checkpoint_blocks()[-1] == "reduction"


def test_the_reducing_block_is_of_the_backbones_kind() -> None:
    grouped: Any = on_meta("resnext3d_101_frab_bert").reduction
    assert (grouped.conv2.groups, grouped.conv1.in_channels, grouped.conv3.out_channels) == (32, 2048, 512)
    inception: Any = on_meta("i3d_frmb_bert").backbone.get_submodule("Mixed_5c")  # type: ignore[union-attr]
    assert isinstance(inception, Mixed)
    widths = [getattr(inception, b).conv3d.out_channels for b in ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")]
    assert widths == [192, 96, 192, 24, 64, 64]
    assert inception.in_channels == 832
    pathways: Any = on_meta("slowfast_r50_8x8_frab_bert_early").reduction
    assert (pathways["slow"].conv2.groups, pathways["slow"].conv1.in_channels) == (1, 2048)
    assert (pathways["fast"].conv1.in_channels, pathways["fast"].conv3.out_channels) == (256, 128)


def test_a_reducing_bottleneck_is_the_written_out_residual() -> None:
    torch.manual_seed(0)
    block = ReducingBottleneck(8, 12, groups=3).eval()
    x = torch.randn(2, 8, 3, 4, 4)
    identity = torch.einsum("oc,bcthw->bothw", block.downsample[0].weight.flatten(1), x)  # type: ignore[arg-type, operator]
    y = torch.einsum("oc,bcthw->bothw", block.conv1.weight.flatten(1), x).relu() / (1 + 1e-5) ** 0.5
    y = nn.functional.conv3d(y, block.conv2.weight, padding=1, groups=3).relu() / (1 + 1e-5) ** 0.5
    y = torch.einsum("oc,bcthw->bothw", block.conv3.weight.flatten(1), y) / (1 + 1e-5) ** 0.5
    expected = (y + identity / (1 + 1e-5) ** 0.5).relu()
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    # Kaiming by fan-in: gain sqrt(2) over 8 inputs
    wide = ReducingBottleneck(512, 512, groups=1)
    assert wide.conv1.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)


def test_early_fusion_averages_fast_over_the_frames_of_slow() -> None:
    torch.manual_seed(0)
    model = create_model(
        "late_temporal",
        num_classes=3,
        backbone="slowfast_r50_8x8",
        in_frames=8,
        head="tgap",
        reduction="frab",
        reduced_channels=64,
    ).eval()
    x = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        slow, fast = model.reduced_pathways(x)  # type: ignore[operator]
        fused = model.forward_features(x)  # type: ignore[operator]
    assert slow.shape[:3] == (1, 64, 2)
    assert fast.shape[:3] == (1, 16, 8)
    torch.testing.assert_close(fused[:, :64], slow)
    torch.testing.assert_close(fused[:, 64:, 1], fast[:, :, 4:].mean(2))


# --- the whole net ----------------------------------------------------------------------------------------------------


def test_the_net_is_backbone_head_and_classifier() -> None:
    model = small()
    x = clips()
    backbone: Any = model.backbone
    tokens = backbone.forward_features(x).mean((3, 4)).transpose(1, 2)
    summary = model.temporal.bert(tokens).summary  # type: ignore[union-attr, operator]
    expected = nn.functional.linear(summary, model.classifier.weight, model.classifier.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), expected)
    logits, attention = model.forward_attention(x)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(attention[0][0].sum(-1), torch.ones(2, 8, 3))


class FrameFeatures(PooledClassifier):
    """A backbone of somebody else's: one 3x3 convolution on every frame, nothing across time."""

    def __init__(self) -> None:
        super().__init__(feature_dim=16, num_classes=0, input_spec=InputSpec(frames=4))
        self.conv = nn.Conv3d(3, 16, (1, 3, 3))
        self.reset_classifier(0)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()  # type: ignore[no-any-return]

    def checkpoint_blocks(self) -> list[str]:
        return ["conv"]


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_over_frame_features_every_head_but_tgap_sees_the_order_of_frames(kind: HeadKind) -> None:
    torch.manual_seed(0)
    model = with_temporal_head(
        FrameFeatures(),
        tokens=(4,),
        head=HeadOptions(kind=kind),
        reduction=ReductionOptions(),
        num_classes=3,
    ).eval()
    x = clips(frames=4) * torch.tensor([0.2, 0.5, 1.0, 2.0])[:, None, None]
    with torch.no_grad():
        change = (model(x) - model(x[:, :, [2, 0, 3, 1]])).abs().max().item()
    assert change < 1e-6 if kind == "tgap" else change > 1e-4


def test_export_and_reload_with_nested_options(tmp_path: Path) -> None:
    options = {
        "backbone": "resnet3d_18",
        "backbone_options": {"stem_depth": 3},
        "reduction": "frab",
        "heads": 4,
    }
    torch.manual_seed(0)
    model = create_model("late_temporal", num_classes=3, in_frames=32, **options).eval()
    again = from_pretrained(save_pretrained(model, tmp_path, name="late_temporal", options=options))
    x = clips()
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


def test_a_head_without_attention_says_so() -> None:
    model: Any = on_meta("late_temporal", backbone="resnet3d_18", in_frames=32, head="tgap")
    with pytest.raises(ModelError, match="head='bert'"):
        model.forward_attention(clips().to("meta"))


def test_the_classifier_starts_xavier_uniform() -> None:
    model = small()
    bound = (6 / (512 + 4)) ** 0.5
    weight: Any = model.classifier.weight
    assert bound * 0.98 < weight.abs().max().item() <= bound
    assert not model.classifier.bias.any()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet_50"}, "2D model"),
        ({"backbone": "timesformer_base", "in_frames": 8, "reduction": "frab"}, "3D convolutional backbone"),
        ({"reduction": "fram"}, "reduction='fram'"),
        ({"fusion": "late"}, "fusion='late'"),
        ({"in_channels": 2}, "no option 'in_channels'"),
        ({"reduction": "frab", "reduced_channels": 63}, "reduced_channels=63"),
        ({"backbone_options": {"stem_dept": 3}}, "did you mean 'stem_depth'"),
        ({"backbone": "slowfast_r50_8x8", "fusion": "middle"}, "fusion='middle'"),
    ],
)
def test_impossible_combinations_are_refused(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=message):
        create_model("late_temporal", **{"backbone": "resnet3d_18", **options})


def test_backbone_options_reach_the_backbone() -> None:
    model: Any = on_meta("late_temporal", backbone="resnet3d_18", backbone_options={"stem_depth": 3})
    assert model.backbone.conv1.kernel_size == (3, 7, 7)
    flow: Any = on_meta("resnext3d_101_frmb_bert", in_channels=2)
    assert flow.backbone.conv1.in_channels == flow.input_spec.channels == 2
    # one plane less in the 7x7x7 stem: the published flow net
    assert sum(p.numel() for p in flow.parameters()) == 47_377_907 - 64 * 7 * 7 * 7
