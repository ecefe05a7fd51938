"""``late_temporal``: any 3D backbone, any temporal head, any reduction; and the published nets with BERT by name.

Paper: Kalfaoglu et al., arXiv 2008.01232; the named nets are those of artest08/LateTemporalModeling3DCNN. The other
rows of the paper's Table 1 are ``late_temporal`` with ``backbone="resnext3d_101", reduction="frmb"`` and another head.

Parameters at 51 classes are those of the public code; its SlowFast nets count 922,000 more, which are Kinetics'
classifier (2304 to 400), carried along and never called.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cliplift.models.late_temporal.bert import Init, Norm, Positions
from cliplift.models.late_temporal.heads import BertOptions, HeadKind
from cliplift.models.late_temporal.model import (
    Fusion,
    HeadOptions,
    ReductionOptions,
    with_temporal_head,
    with_temporal_heads_on_pathways,
)
from cliplift.models.late_temporal.reduction import Reduction
from cliplift.models.registry import ModelError, create_model, model_entry, register_model

PAPER = "Kalfaoglu et al. 2020"


@functools.cache
def time_steps(backbone: str, in_frames: int, options: tuple[tuple[str, Any], ...]) -> tuple[int, ...]:
    """T' of a backbone's feature map for a clip of ``in_frames``; of Slow's and Fast's for two pathways.

    Found by running the backbone on the meta device, where nothing is computed.

    Raises:
        ModelError: the backbone's features are not (B, C, T', H', W').
    """
    with torch.device("meta"), torch.no_grad():
        probe: Any = create_model(backbone, num_classes=0, in_frames=in_frames, **dict(options)).eval()
        spec = probe.input_spec
        x = torch.empty(1, spec.channels, in_frames, spec.crop_height, spec.crop_width)
        maps = (
            probe.forward_pathways(x) if hasattr(probe, "forward_pathways") else (probe.forward_features(x),)
        )
    if any(m.ndim != 5 for m in maps):
        raise ModelError(
            f"backbone={backbone!r} gives features {tuple(maps[0].shape)}; a temporal head needs (B, C, T', H', W')"
        )
    return tuple(int(m.shape[2]) for m in maps)


def _late_temporal(
    backbone: str,
    *,
    num_classes: int,
    in_frames: int | None,
    in_channels: int,
    backbone_options: Mapping[str, Any],
    head: HeadOptions,
    reduction: ReductionOptions,
    fusion: Fusion | None = None,
) -> nn.Module:
    entry = model_entry(backbone)
    if entry.dims != "3d":
        raise ModelError(f"backbone={backbone!r} is a 2D model; list_models(dims='3d') names the others")
    options = dict(backbone_options)
    if in_channels != 3 or "in_channels" in inspect.signature(entry.build).parameters:
        options.setdefault("in_channels", in_channels)
    network = create_model(backbone, num_classes=0, in_frames=in_frames, **options)
    frames: int = network.input_spec.frames  # type: ignore[assignment, union-attr]
    hashable = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    tokens = time_steps(backbone, frames, tuple(sorted(hashable.items())))
    if hasattr(network, "forward_pathways"):
        return with_temporal_heads_on_pathways(
            network,
            tokens=tokens,
            head=head,
            reduction=reduction,
            fusion=fusion or "early",
            num_classes=num_classes,
        )
    if fusion is not None:
        raise ModelError(f"fusion={fusion!r} is for backbones with two pathways; {backbone!r} has one")
    return with_temporal_head(network, tokens=tokens, head=head, reduction=reduction, num_classes=num_classes)


@register_model(paper=PAPER, default_classes=51)
def late_temporal(
    *,
    num_classes: int = 51,
    in_frames: int | None = None,
    backbone: str = "r2plus1d_34",
    backbone_options: Mapping[str, Any] | None = None,
    in_channels: int = 3,
    head: HeadKind = "bert",
    reduction: Reduction = "none",
    reduced_channels: int = 512,
    fusion: Fusion | None = None,
    dropout: float = 0.8,
    width: int | None = None,
    layers: int = 1,
    heads: int = 8,
    cls_token: bool = True,
    positions: Positions = "learned",
    keep_probability: float = 0.8,
    bert_dropout: float = 0.1,
    norm: Norm = "original",
    init: Init = "bert5",
    normalise_tokens: bool = False,
) -> nn.Module:
    """A 3D backbone of this package with a temporal head before the classifier.

    Args:
        in_frames: T of a clip; None is the backbone's own.
        backbone: a 3D model with features (B, C, T', H', W').
        backbone_options: its options, such as ``{"stem_depth": 3}``.
        in_channels: 3, or 2 for flow, where the backbone has that option.
        head: "tgap", "concat", "concat_fc", "lstm", "nonlocal_concat_fc" or "bert".
        reduction: "none", "frmb" (replaces the backbone's last block) or "frab" (adds one), to ``reduced_channels``.
        fusion: of SlowFast's pathways, "early" (None) or "late".
        dropout: before the classifier.
        width: outputs of concat_fc (1550), lstm (450), nonlocal_concat_fc (1000).
        layers, heads, cls_token, positions, keep_probability, bert_dropout, norm, init, normalise_tokens: of the
            bert head; see ``temporal_bert.TemporalBert``.
    """
    bert = BertOptions(
        layers=layers,
        heads=heads,
        cls_token=cls_token,
        positions=positions,
        keep_probability=keep_probability,
        dropout=bert_dropout,
        norm=norm,
        init=init,
        normalise_tokens=normalise_tokens,
    )
    return _late_temporal(
        backbone,
        num_classes=num_classes,
        in_frames=in_frames,
        in_channels=in_channels,
        backbone_options=backbone_options or {},
        head=HeadOptions(kind=head, dropout=dropout, width=width, bert=bert),
        reduction=ReductionOptions(kind=reduction, channels=reduced_channels),
        fusion=fusion,
    )


def _published(
    backbone: str,
    reduction: Reduction,
    *,
    num_classes: int,
    in_frames: int,
    in_channels: int,
    dropout: float,
    fusion: Fusion | None = None,
    **backbone_options: Any,
) -> nn.Module:
    """One of the nets with one layer of BERT; I3D's normalises its tokens and has the other initialisation."""
    i3d = backbone == "i3d_inception"
    bert = BertOptions(init="bert2", normalise_tokens=True) if i3d else BertOptions()
    return _late_temporal(
        backbone,
        num_classes=num_classes,
        in_frames=in_frames,
        in_channels=in_channels,
        backbone_options=backbone_options,
        head=HeadOptions(kind="bert", dropout=dropout, bert=bert),
        reduction=ReductionOptions(kind=reduction),
        fusion=fusion,
    )


@register_model(paper=PAPER, default_classes=51)
def resnext3d_101_frmb_bert(
    *, num_classes: int = 51, in_frames: int = 64, in_channels: int = 3, dropout: float = 0.8
) -> nn.Module:
    """ResNeXt3D-101 whose last block gives 512 channels, and BERT over 4 tokens; the paper's Table 1.

    Args:
        in_frames: 64 consecutive ones.
        in_channels: 3, or 2 for the flow stream.
        dropout: before the classifier.
    """
    return _published(
        "resnext3d_101",
        "frmb",
        num_classes=num_classes,
        in_frames=in_frames,
        in_channels=in_channels,
        dropout=dropout,
    )


@register_model(paper=PAPER, default_classes=51)
def resnext3d_101_frab_bert(
    *, num_classes: int = 51, in_frames: int = 64, in_channels: int = 3, dropout: float = 0.8
) -> nn.Module:
    """ResNeXt3D-101, one more block to 512 channels, and BERT; options as :func:`resnext3d_101_frmb_bert`."""
    return _published(
        "resnext3d_101",
        "frab",
        num_classes=num_classes,
        in_frames=in_frames,
        in_channels=in_channels,
        dropout=dropout,
    )


@register_model(paper=PAPER, default_classes=51)
def r2plus1d_34_bert(
    *, num_classes: int = 51, in_frames: int = 32, in_channels: int = 3, dropout: float = 0.8
) -> nn.Module:
    """R(2+1)D-34, whose features have 512 channels, and BERT over 4 tokens (32 frames) or 8 (64 frames).

    The paper's best net: 85.10 % on HMDB51 with 64 frames and IG65M's weights. Options as
    :func:`resnext3d_101_frmb_bert`.
    """
    return _published(
        "r2plus1d_34",
        "none",
        num_classes=num_classes,
        in_frames=in_frames,
        in_channels=in_channels,
        dropout=dropout,
    )


@register_model(paper=PAPER, default_classes=51)
def i3d_bert(
    *, num_classes: int = 51, in_frames: int = 64, in_channels: int = 3, dropout: float = 0.8
) -> nn.Module:
    """I3D and BERT over 8 normalised tokens of 1024; options as :func:`resnext3d_101_frmb_bert`."""
    return _published(
        "i3d_inception",
        "none",
        num_classes=num_classes,
        in_frames=in_frames,
        in_channels=in_channels,
        dropout=dropout,
    )


@register_model(paper=PAPER, default_classes=51)
def i3d_frmb_bert(
    *, num_classes: int = 51, in_frames: int = 64, in_channels: int = 3, dropout: float = 0.8
) -> nn.Module:
    """I3D whose Mixed_5c gives 512 channels, and BERT over 8 normalised tokens."""
    return _published(
        "i3d_inception",
        "frmb",
        num_classes=num_classes,
        in_frames=in_frames,
        in_channels=in_channels,
        dropout=dropout,
    )


@register_model(paper=PAPER, default_classes=51)
def i3d_frab_bert(
    *, num_classes: int = 51, in_frames: int = 64, in_channels: int = 3, dropout: float = 0.8
) -> nn.Module:
    """I3D, one more Inception module to 512 channels, and BERT over 8 normalised tokens."""
    return _published(
        "i3d_inception",
        "frab",
        num_classes=num_classes,
        in_frames=in_frames,
        in_channels=in_channels,
        dropout=dropout,
    )


@register_model(paper=PAPER, default_classes=51)
def slowfast_r50_8x8_frab_bert_early(
    *, num_classes: int = 51, in_frames: int = 64, in_channels: int = 3, dropout: float = 0.8
) -> nn.Module:
    """SlowFast on 64 consecutive frames, one more block on each pathway; one BERT over 8 joined tokens of 640."""
    return _published(
        "slowfast_r50_8x8",
        "frab",
        num_classes=num_classes,
        in_frames=in_frames,
        in_channels=in_channels,
        dropout=dropout,
        fusion="early",
        fast_stride=2,
    )


@register_model(paper=PAPER, default_classes=51)
def slowfast_r50_8x8_frab_bert_late(
    *, num_classes: int = 51, in_frames: int = 64, in_channels: int = 3, dropout: float = 0.8
) -> nn.Module:
    """SlowFast on 64 consecutive frames, one more block on Slow; BERT on Slow (8 of 512) and on Fast (32 of 256)."""
    return _published(
        "slowfast_r50_8x8",
        "frab",
        num_classes=num_classes,
        in_frames=in_frames,
        in_channels=in_channels,
        dropout=dropout,
        fusion="late",
        fast_stride=2,
    )


@register_model(paper=PAPER, default_classes=51)
def slowfast_r50_8x8_frmb_bert_early(
    *, num_classes: int = 51, in_frames: int = 64, in_channels: int = 3, dropout: float = 0.8
) -> nn.Module:
    """SlowFast on 64 consecutive frames, both last blocks reduced; one BERT over 8 joined tokens of 640."""
    return _published(
        "slowfast_r50_8x8",
        "frmb",
        num_classes=num_classes,
        in_frames=in_frames,
        in_channels=in_channels,
        dropout=dropout,
        fusion="early",
        fast_stride=2,
    )


@register_model(paper=PAPER, default_classes=51)
def slowfast_r50_8x8_frmb_bert_late(
    *, num_classes: int = 51, in_frames: int = 64, in_channels: int = 3, dropout: float = 0.8
) -> nn.Module:
    """SlowFast on 64 consecutive frames, Slow's last block reduced; BERT on Slow (8 of 512), on Fast (32 of 256)."""
    return _published(
        "slowfast_r50_8x8",
        "frmb",
        num_classes=num_classes,
        in_frames=in_frames,
        in_channels=in_channels,
        dropout=dropout,
        fusion="late",
        fast_stride=2,
    )
