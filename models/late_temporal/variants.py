"""``late_temporal``: any 3D backbone, any temporal head, any reduction; and the published nets with BERT by name.

Paper: Kalfaoglu et al., arXiv 2008.01232; the named nets are those of artest08/LateTemporalModeling3DCNN. The other
rows of the paper's Table 1 are ``late_temporal`` with ``backbone="resnext3d_101", reduction="frmb"`` and another head.

Parameters at 51 classes are those of the public code; its SlowFast nets count 922,000 more, which are Kinetics'
classifier (2304 to 400), carried along and never called.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cliplift.models.factory import create_model
from cliplift.models.late_temporal.bert import BertOptions, Init, Norm, Positions
from cliplift.models.late_temporal.heads import HeadKind, HeadOptions
from cliplift.models.late_temporal.model import (
    Fusion,
    LateTemporal,
    ReductionOptions,
    with_temporal_head,
    with_temporal_heads_on_pathways,
)
from cliplift.models.late_temporal.reduction import Reduction
from cliplift.models.protocol import HasPathways, ModelError
from cliplift.models.registry import model_entry, register_model, variant

PAPER = "Kalfaoglu et al. 2020"


@functools.cache
def time_steps(backbone: str, in_frames: int, options: tuple[tuple[str, Any], ...]) -> tuple[int, ...]:
    """T' of a backbone's feature map for a clip of ``in_frames``; of Slow's and Fast's for two pathways.

    Found by running the backbone on the meta device, where nothing is computed.

    Raises:
        ModelError: the backbone's features are not (B, C, T', H', W').
    """
    with torch.device("meta"), torch.no_grad():
        probe = create_model(backbone, num_classes=0, in_frames=in_frames, **dict(options))
        probe.eval()
        spec = probe.input_spec
        x = torch.empty(1, spec.channels, in_frames, spec.crop_height, spec.crop_width)
        maps = probe.forward_pathways(x) if isinstance(probe, HasPathways) else (probe.forward_features(x),)
    if any(m.ndim != 5 for m in maps):
        raise ModelError(
            f"backbone={backbone!r} gives features {tuple(maps[0].shape)}; a temporal head needs (B, C, T', H', W')"
        )
    return tuple(int(m.shape[2]) for m in maps)


def _build(
    backbone: str,
    *,
    num_classes: int,
    in_frames: int | None,
    in_channels: int,
    backbone_options: Mapping[str, Any],
    head: HeadOptions,
    reduction: ReductionOptions,
    fusion: Fusion | None = None,
) -> LateTemporal:
    entry = model_entry(backbone)
    if entry.dims != "3d":
        raise ModelError(f"backbone={backbone!r} is a 2D model; list_models(dims='3d') names the others")
    options = dict(backbone_options)
    if in_channels != 3 or "in_channels" in inspect.signature(entry.build).parameters:
        options.setdefault("in_channels", in_channels)
    network = create_model(backbone, num_classes=0, in_frames=in_frames, **options)
    # options of a config are lists; the cache of time_steps needs tuples
    hashable = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    tokens = time_steps(backbone, network.input_spec.frames, tuple(sorted(hashable.items())))
    if isinstance(network, HasPathways):
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
) -> LateTemporal:
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
            bert head; see :class:`~cliplift.models.late_temporal.bert.BertOptions`.
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
    return _build(
        backbone,
        num_classes=num_classes,
        in_frames=in_frames,
        in_channels=in_channels,
        backbone_options=backbone_options or {},
        head=HeadOptions(kind=head, dropout=dropout, width=width, bert=bert),
        reduction=ReductionOptions(kind=reduction, channels=reduced_channels),
        fusion=fusion,
    )


# what may still be chosen of a published net
OPEN_OPTIONS = ("num_classes", "in_frames", "in_channels", "dropout")


def _with_bert(
    name: str, backbone: str, reduction: Reduction, *, in_frames: int = 64, **options: object
) -> Callable[..., LateTemporal]:
    """A published net: a backbone and one layer of BERT; I3D's normalises its tokens and has another initialisation."""
    defaults = inspect.signature(late_temporal).parameters
    fixed = {key: p.default for key, p in defaults.items() if key not in OPEN_OPTIONS}
    fixed |= {"backbone": backbone, "reduction": reduction, **options}
    if backbone == "i3d_inception":
        fixed |= {"init": "bert2", "normalise_tokens": True}
    return variant(name, late_temporal, paper=PAPER, fixed=fixed, in_frames=in_frames)


def _slowfast_with_bert(name: str, reduction: Reduction, fusion: Fusion) -> Callable[..., LateTemporal]:
    """On 64 consecutive frames, of which Fast sees every second: those of the 8x8 configuration."""
    return _with_bert(name, "slowfast_r50_8x8", reduction, fusion=fusion, backbone_options={"fast_stride": 2})


# Table 1: the last block gives 512 channels (FRMB), or one more block does (FRAB); BERT over 4 tokens
resnext3d_101_frmb_bert = _with_bert("resnext3d_101_frmb_bert", "resnext3d_101", "frmb")
resnext3d_101_frab_bert = _with_bert("resnext3d_101_frab_bert", "resnext3d_101", "frab")
# Features of 512 as they are; 4 tokens of 32 frames, 8 of 64. The paper's best net: 85.10 % on HMDB51 with 64 frames
# and IG65M's weights
r2plus1d_34_bert = _with_bert("r2plus1d_34_bert", "r2plus1d_34", "none", in_frames=32)
# 8 normalised tokens of 1024; of 512, from another Mixed_5c (FRMB) or one more Inception module (FRAB)
i3d_bert = _with_bert("i3d_bert", "i3d_inception", "none")
i3d_frmb_bert = _with_bert("i3d_frmb_bert", "i3d_inception", "frmb")
i3d_frab_bert = _with_bert("i3d_frab_bert", "i3d_inception", "frab")
# Early: both pathways reduced, one BERT over 8 joined tokens of 640. Late: Slow reduced, a BERT on Slow (8 tokens of
# 512) and one on Fast (32 of 256)
slowfast_r50_8x8_frab_bert_early = _slowfast_with_bert("slowfast_r50_8x8_frab_bert_early", "frab", "early")
slowfast_r50_8x8_frab_bert_late = _slowfast_with_bert("slowfast_r50_8x8_frab_bert_late", "frab", "late")
slowfast_r50_8x8_frmb_bert_early = _slowfast_with_bert("slowfast_r50_8x8_frmb_bert_early", "frmb", "early")
slowfast_r50_8x8_frmb_bert_late = _slowfast_with_bert("slowfast_r50_8x8_frmb_bert_late", "frmb", "late")
