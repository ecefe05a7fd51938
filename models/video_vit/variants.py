"""The published sizes of VideoViT, by name.

``video_vit_*`` are VideoMAE's and VideoMAE v2's, ``vjepa2_*`` and ``vjepa21_*`` V-JEPA 2's and 2.1's. All take any
clip of whole tubelets, at construction (``in_frames``, ``crop``) and at run time.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from cliplift.models.protocol import InputSpec
from cliplift.models.registry import variant
from cliplift.models.video_vit.blocks import BlockSpec
from cliplift.models.video_vit.model import FinalNorm, Head, Positions, VideoViT

VIDEOMAE = "Tong et al., NeurIPS 2022"
VIDEOMAE_2 = "Wang et al., CVPR 2023"
VJEPA_2 = "Assran et al., 2025"
PositionResize = Literal["flat", "trilinear"]
# V-JEPA 2.1: depth -> the blocks whose outputs are levels
LEVELS = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 40: (9, 19, 29, 39), 48: (11, 23, 37, 47)}


def videomae(
    *,
    num_classes: int = 400,
    in_frames: int = 16,
    crop: int = 224,
    patch: int = 16,
    tubelet: int = 2,
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
) -> VideoViT:
    """VideoMAE's blocks on frames 4 apart; tested on 5 clips of 3 crops (Kinetics).

    Args:
        crop: H = W in pixels.
        patch: pixels of a tubelet's side.
        tubelet: its frames; 1 for Unmasked Teacher's 8 frames.
        hidden: width of the MLPs' hidden layer.
        positions: "sincos" (VideoMAE) or "rope" (V-JEPA).
        position_resize: of the sine/cosine vectors, for another grid at run time: "flat" (released code), "trilinear".
        final_norm: "pooled", LN of the mean token (finetuning), or "tokens", LN of every token (pretraining).
        head: "linear" or "attentive" (needs final_norm="tokens").
        probe_heads: attention heads of the attentive head.
        drop_path: rate of the last block; it rises linearly from 0 in the first.
        dropout: before the classifier.
    """
    return VideoViT(
        spec=BlockSpec(width=width, heads=heads, hidden=hidden, qkv_bias="query_value", init="xavier"),
        depth=depth,
        patch=patch,
        tubelet=tubelet,
        num_classes=num_classes,
        input_spec=_input_spec(in_frames, crop, test_clips=5),
        positions=positions,
        position_resize=position_resize,
        final_norm=final_norm,
        head=head,
        probe_heads=probe_heads,
        drop_path=drop_path,
        dropout=dropout,
    )


def vjepa(
    *,
    dense: bool,
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
) -> VideoViT:
    """V-JEPA's blocks with rotary positions, on frames 4 apart (of 25 to 30 frames per second).

    Args:
        dense: 2.1's four levels, tubelets of one frame for images, and rule for the rotary positions.
        crop: H = W in pixels; published 256 and 384.
        patch: pixels of a tubelet's side; a tubelet has 2 frames.
        hidden: width of the MLPs' hidden layer.
        head: "attentive", V-JEPA 2's classifier of 4 blocks on the tokens, or "linear" on the mean token.
        probe_heads: attention heads of the attentive head; 16 whatever the encoder has (published).
        drop_path: rate of the last block; it rises linearly from 0 in the first.
        dropout: before the classifier.
    """
    return VideoViT(
        spec=BlockSpec(width=width, heads=heads, hidden=hidden),
        depth=depth,
        patch=patch,
        num_classes=num_classes,
        input_spec=_input_spec(in_frames, crop, test_clips=2),
        positions="rope",
        layout="interleaved" if dense else "concatenated",
        interpolate_rope=dense,
        levels=LEVELS[depth] if dense else (),
        images=dense,
        head=head,
        probe_heads=probe_heads,
        drop_path=drop_path,
        dropout=dropout,
    )


def _input_spec(in_frames: int, crop: int, *, test_clips: int) -> InputSpec:
    return InputSpec.square(crop, frames=in_frames, frame_stride=4, test_clips=test_clips, test_crops=3)


class Size(TypedDict):
    """Width, depth, heads and MLP width of a published size."""

    width: int
    depth: int
    heads: int
    hidden: int


TINY = Size(width=192, depth=6, heads=3, hidden=768)
SMALL = Size(width=384, depth=12, heads=6, hidden=1536)
BASE = Size(width=768, depth=12, heads=12, hidden=3072)
LARGE = Size(width=1024, depth=24, heads=16, hidden=4096)
HUGE = Size(width=1280, depth=32, heads=16, hidden=5120)
GIANT = Size(width=1408, depth=40, heads=16, hidden=6144)
GIANT_64 = Size(width=1408, depth=40, heads=22, hidden=6144)  # V-JEPA's: heads of 64 channels
GIGANTIC = Size(width=1664, depth=48, heads=26, hidden=8192)

# Not published, for CPUs and small pictures: 512 tokens for 16 frames of 64 pixels
video_vit_tiny_8 = variant(
    "video_vit_tiny_8", videomae, paper=VIDEOMAE, crop=64, patch=8, drop_path=0.0, **TINY
)
video_vit_small_16 = variant("video_vit_small_16", videomae, paper=VIDEOMAE, **SMALL)
video_vit_base_16 = variant("video_vit_base_16", videomae, paper=VIDEOMAE, **BASE)  # 86,534,800 parameters
video_vit_large_16 = variant("video_vit_large_16", videomae, paper=VIDEOMAE, **LARGE)
video_vit_huge_16 = variant("video_vit_huge_16", videomae, paper=VIDEOMAE, drop_path=0.2, **HUGE)
# v2, with the classes of Kinetics-710
video_vit_giant_14 = variant(
    "video_vit_giant_14", videomae, paper=VIDEOMAE_2, num_classes=710, patch=14, drop_path=0.3, **GIANT
)

V2, V21 = {"dense": False}, {"dense": True}
vjepa2_large_16 = variant("vjepa2_large_16", vjepa, paper=VJEPA_2, fixed=V2, **LARGE)  # 303,885,312, no head
vjepa2_huge_16 = variant("vjepa2_huge_16", vjepa, paper=VJEPA_2, fixed=V2, **HUGE)
vjepa2_giant_16 = variant("vjepa2_giant_16", vjepa, paper=VJEPA_2, fixed=V2, **GIANT_64)
vjepa21_base_16 = variant("vjepa21_base_16", vjepa, paper=VJEPA_2, fixed=V21, **BASE)
vjepa21_large_16 = variant("vjepa21_large_16", vjepa, paper=VJEPA_2, fixed=V21, **LARGE)
vjepa21_giant_16 = variant("vjepa21_giant_16", vjepa, paper=VJEPA_2, fixed=V21, **GIANT_64)
vjepa21_gigantic_16 = variant(
    "vjepa21_gigantic_16", vjepa, paper=VJEPA_2, fixed=V21, **GIGANTIC
)  # 1.8 billion
