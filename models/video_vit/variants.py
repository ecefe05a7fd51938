"""The published sizes of VideoViT, by name.

``video_vit_*`` are VideoMAE's and VideoMAE v2's, ``vjepa2_*`` and ``vjepa21_*`` V-JEPA 2's and 2.1's. All take any
clip of whole tubelets, at construction (``in_frames``, ``crop``) and at run time.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from cliplift.models.protocol import InputSpec
from cliplift.models.registry import register_model
from cliplift.models.video_vit.blocks import BlockSpec
from cliplift.models.video_vit.model import FinalNorm, Head, Positions, VideoViT

VIDEOMAE = "Tong et al., NeurIPS 2022"
VIDEOMAE_2 = "Wang et al., CVPR 2023"
VJEPA_2 = "Assran et al., 2025"
PositionResize = Literal["flat", "trilinear"]


def _videomae(
    *,
    in_frames: int,
    crop: int,
    width: int,
    heads: int,
    hidden: int,
    positions: Positions,
    stride: int = 4,
    **options: Any,
) -> VideoViT:
    """VideoMAE's blocks; 5 clips of 3 crops, 4 frames apart (Kinetics)."""
    spec = InputSpec(
        frames=in_frames,
        frame_stride=stride,
        crop_height=crop,
        crop_width=crop,
        test_clips=5,
        test_crops=3,
    )
    block = BlockSpec(width=width, heads=heads, hidden=hidden, qkv_bias="query_value", init="xavier")
    return VideoViT(spec=block, input_spec=spec, positions=positions, **options)


@register_model(paper=VIDEOMAE)
def video_vit_tiny_8(
    *,
    num_classes: int = 400,
    in_frames: int = 16,
    crop: int = 64,
    patch: int = 8,
    width: int = 192,
    depth: int = 6,
    heads: int = 3,
    hidden: int = 768,
    positions: Positions = "sincos",
    position_resize: PositionResize = "flat",
    final_norm: FinalNorm = "pooled",
    head: Head = "linear",
    probe_heads: int = 16,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> nn.Module:
    """A small one for CPUs and small pictures: 512 tokens for 16 frames of 64 pixels. Not published.

    Args:
        crop: H = W in pixels.
        patch: pixels of a tubelet's side; a tubelet has 2 frames.
        hidden: width of the MLPs' hidden layer.
        positions: "sincos" (VideoMAE) or "rope" (V-JEPA).
        position_resize: of the sine/cosine vectors, for another grid at run time: "flat" (released code), "trilinear".
        final_norm: "pooled", LN of the mean token (finetuning), or "tokens", LN of every token (pretraining).
        head: "linear" or "attentive" (needs final_norm="tokens").
        probe_heads: attention heads of the attentive head.
        drop_path: rate of the last block; it rises linearly from 0 in the first.
        dropout: before the classifier."""
    return _videomae(**locals())


@register_model(paper=VIDEOMAE)
def video_vit_small_16(
    *,
    num_classes: int = 400,
    in_frames: int = 16,
    crop: int = 224,
    patch: int = 16,
    width: int = 384,
    depth: int = 12,
    heads: int = 6,
    hidden: int = 1536,
    positions: Positions = "sincos",
    position_resize: PositionResize = "flat",
    final_norm: FinalNorm = "pooled",
    head: Head = "linear",
    probe_heads: int = 16,
    drop_path: float = 0.1,
    dropout: float = 0.0,
) -> nn.Module:
    """VideoMAE ViT-S/16, 16 frames of 224 pixels; options as :func:`video_vit_tiny_8`."""
    return _videomae(**locals())


@register_model(paper=VIDEOMAE)
def video_vit_base_16(
    *,
    num_classes: int = 400,
    in_frames: int = 16,
    crop: int = 224,
    patch: int = 16,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    hidden: int = 3072,
    positions: Positions = "sincos",
    position_resize: PositionResize = "flat",
    final_norm: FinalNorm = "pooled",
    head: Head = "linear",
    probe_heads: int = 16,
    drop_path: float = 0.1,
    dropout: float = 0.0,
) -> nn.Module:
    """VideoMAE ViT-B/16; options as :func:`video_vit_tiny_8`. 86,534,800 parameters at 400 classes."""
    return _videomae(**locals())


@register_model(paper=VIDEOMAE)
def video_vit_large_16(
    *,
    num_classes: int = 400,
    in_frames: int = 16,
    crop: int = 224,
    patch: int = 16,
    width: int = 1024,
    depth: int = 24,
    heads: int = 16,
    hidden: int = 4096,
    positions: Positions = "sincos",
    position_resize: PositionResize = "flat",
    final_norm: FinalNorm = "pooled",
    head: Head = "linear",
    probe_heads: int = 16,
    drop_path: float = 0.1,
    dropout: float = 0.0,
) -> nn.Module:
    """VideoMAE ViT-L/16; options as :func:`video_vit_tiny_8`."""
    return _videomae(**locals())


@register_model(paper=VIDEOMAE)
def video_vit_huge_16(
    *,
    num_classes: int = 400,
    in_frames: int = 16,
    crop: int = 224,
    patch: int = 16,
    width: int = 1280,
    depth: int = 32,
    heads: int = 16,
    hidden: int = 5120,
    positions: Positions = "sincos",
    position_resize: PositionResize = "flat",
    final_norm: FinalNorm = "pooled",
    head: Head = "linear",
    probe_heads: int = 16,
    drop_path: float = 0.2,
    dropout: float = 0.0,
) -> nn.Module:
    """VideoMAE ViT-H/16; options as :func:`video_vit_tiny_8`."""
    return _videomae(**locals())


@register_model(paper=VIDEOMAE_2, default_classes=710)
def video_vit_giant_14(
    *,
    num_classes: int = 710,
    in_frames: int = 16,
    crop: int = 224,
    patch: int = 14,
    width: int = 1408,
    depth: int = 40,
    heads: int = 16,
    hidden: int = 6144,
    positions: Positions = "sincos",
    position_resize: PositionResize = "flat",
    final_norm: FinalNorm = "pooled",
    head: Head = "linear",
    probe_heads: int = 16,
    drop_path: float = 0.3,
    dropout: float = 0.0,
) -> nn.Module:
    """VideoMAE v2 ViT-g/14, Kinetics-710's classes; options as :func:`video_vit_tiny_8`."""
    return _videomae(**locals())


def _vjepa(
    *, in_frames: int, crop: int, width: int, heads: int, hidden: int, dense: bool, depth: int, **options: Any
) -> VideoViT:
    """V-JEPA's blocks; ``dense``: 2.1's levels, image tubelets and rotary rule. 4 frames/s of 25 to 30 fps video."""
    spec = InputSpec(
        frames=in_frames,
        frame_stride=4,
        crop_height=crop,
        crop_width=crop,
        test_clips=2,
        test_crops=3,
    )
    block = BlockSpec(width=width, heads=heads, hidden=hidden)
    of_version: dict[str, Any] = {"layout": "interleaved" if dense else "concatenated"}
    if dense:
        of_version |= {"interpolate_rope": True, "images": True, "levels": LEVELS[depth]}
    return VideoViT(spec=block, input_spec=spec, depth=depth, positions="rope", **(of_version | options))


# V-JEPA 2.1: depth -> the blocks whose outputs are levels
LEVELS = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 40: (9, 19, 29, 39), 48: (11, 23, 37, 47)}


@register_model(paper=VJEPA_2, default_classes=174)
def vjepa2_large_16(
    *,
    num_classes: int = 174,
    in_frames: int = 16,
    crop: int = 256,
    patch: int = 16,
    width: int = 1024,
    depth: int = 24,
    heads: int = 16,
    hidden: int = 4096,
    head: Head = "attentive",
    probe_heads: int = 16,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> nn.Module:
    """V-JEPA 2 ViT-L/16, 16 frames of 256 pixels, rotary positions; 303,885,312 parameters without a head.

    Args:
        crop: H = W in pixels; published 256 and 384.
        patch: pixels of a tubelet's side; a tubelet has 2 frames.
        hidden: width of the MLPs' hidden layer.
        head: "attentive", V-JEPA 2's classifier of 4 blocks on the tokens, or "linear" on the mean token.
        probe_heads: attention heads of the attentive head; 16 whatever the encoder has (published).
        drop_path: rate of the last block; it rises linearly from 0 in the first.
        dropout: before the classifier."""
    return _vjepa(dense=False, **locals())


@register_model(paper=VJEPA_2, default_classes=174)
def vjepa2_huge_16(
    *,
    num_classes: int = 174,
    in_frames: int = 16,
    crop: int = 256,
    patch: int = 16,
    width: int = 1280,
    depth: int = 32,
    heads: int = 16,
    hidden: int = 5120,
    head: Head = "attentive",
    probe_heads: int = 16,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> nn.Module:
    """V-JEPA 2 ViT-H/16; options as :func:`vjepa2_large_16`."""
    return _vjepa(dense=False, **locals())


@register_model(paper=VJEPA_2, default_classes=174)
def vjepa2_giant_16(
    *,
    num_classes: int = 174,
    in_frames: int = 16,
    crop: int = 256,
    patch: int = 16,
    width: int = 1408,
    depth: int = 40,
    heads: int = 22,
    hidden: int = 6144,
    head: Head = "attentive",
    probe_heads: int = 16,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> nn.Module:
    """V-JEPA 2 ViT-g/16, heads of 64 channels; options as :func:`vjepa2_large_16`."""
    return _vjepa(dense=False, **locals())


@register_model(paper=VJEPA_2, default_classes=174)
def vjepa21_base_16(
    *,
    num_classes: int = 174,
    in_frames: int = 16,
    crop: int = 256,
    patch: int = 16,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    hidden: int = 3072,
    head: Head = "attentive",
    probe_heads: int = 16,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> nn.Module:
    """V-JEPA 2.1 ViT-B/16: four levels, clips and images; options as :func:`vjepa2_large_16`."""
    return _vjepa(dense=True, **locals())


@register_model(paper=VJEPA_2, default_classes=174)
def vjepa21_large_16(
    *,
    num_classes: int = 174,
    in_frames: int = 16,
    crop: int = 256,
    patch: int = 16,
    width: int = 1024,
    depth: int = 24,
    heads: int = 16,
    hidden: int = 4096,
    head: Head = "attentive",
    probe_heads: int = 16,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> nn.Module:
    """V-JEPA 2.1 ViT-L/16; options as :func:`vjepa2_large_16`."""
    return _vjepa(dense=True, **locals())


@register_model(paper=VJEPA_2, default_classes=174)
def vjepa21_giant_16(
    *,
    num_classes: int = 174,
    in_frames: int = 16,
    crop: int = 256,
    patch: int = 16,
    width: int = 1408,
    depth: int = 40,
    heads: int = 22,
    hidden: int = 6144,
    head: Head = "attentive",
    probe_heads: int = 16,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> nn.Module:
    """V-JEPA 2.1 ViT-g/16; options as :func:`vjepa2_large_16`."""
    return _vjepa(dense=True, **locals())


@register_model(paper=VJEPA_2, default_classes=174)
def vjepa21_gigantic_16(
    *,
    num_classes: int = 174,
    in_frames: int = 16,
    crop: int = 256,
    patch: int = 16,
    width: int = 1664,
    depth: int = 48,
    heads: int = 26,
    hidden: int = 8192,
    head: Head = "attentive",
    probe_heads: int = 16,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> nn.Module:
    """V-JEPA 2.1 ViT-G/16, 1.8 billion parameters; options as :func:`vjepa2_large_16`."""
    return _vjepa(dense=True, **locals())
