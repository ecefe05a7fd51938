"""SlowFast: a wide network at a low frame rate, a thin one at a high frame rate, and lateral connections between them.

Paper: Feichtenhofer et al., "SlowFast Networks for Video Recognition", arXiv 1812.03982, Table 1 and section 3.
Weights named as in facebookresearch/SlowFast (PySlowFast); pytorchvideo's names and Caffe2's blobs are read.

A clip of T frames is what the Fast pathway sees. The Slow pathway takes one frame in ``alpha`` and has ``beta_inv``
times the channels. After the stem and res2, res3, res4, a convolution over time of stride alpha brings Fast's maps to
Slow's frame rate, where they are concatenated. Time is never strided inside a pathway.

                         Slow (T/4)                 Fast (T)
    stem                 1x7x7, 64                  5x7x7, 8          then 1x3x3 max pooling
    res2, res3           1x1x1 - 1x3x3 - 1x1x1      3x1x1 - 1x3x3 - 1x1x1
    res4, res5           3x1x1 - 1x3x3 - 1x1x1      the same
    last map             2048                       256

Where sources differ: the paper's lateral kernel is 5 frames (section 4.1); the released 8x8 configuration, whose
weights circulate, has 7, the default. The paper takes Slow's frames at a stride ("strided", the default: it is what
the lateral convolutions, of stride alpha, assume); PySlowFast spreads them evenly from the first frame to the last
("spread").

Weights: our names are PySlowFast's (``.pyth`` files of facebookresearch/SlowFast), but for the classifier. Also read:
pytorchvideo's (``blocks.1.multipathway_blocks.0...``) and Caffe2's blobs (``t_res2_0_branch2a_w``), in which the
model zoo of PySlowFast has the Kinetics weights. Those ``.pkl`` files are plain pickles and are never opened here:
save their "blobs" as tensors (safetensors or ``torch.save``) first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.image.resnet import LAYERS, STAGE_WIDTHS
from cliplift.models.layers import Conv3d, PooledClassifier
from cliplift.models.protocol import InputSpec, ModelError, check_choices
from cliplift.models.registry import variant
from cliplift.models.state_dicts import CAFFE2_BLOB, CAFFE2_TENSORS, rename_prefixes
from cliplift.models.streams import flow_from_rgb, stream_spec

Patterns = Sequence[tuple[str, str]]

_PYTORCHVIDEO_TOP: Patterns = (
    (r"multipathway_blocks\.([01])\.(conv|norm)\.(.+)", r"pathway\1_stem.\2.\3"),
    (r"multipathway_fusion\.conv_fast_to_slow\.(.+)", r"fuse.conv_f2s.\1"),
    (r"multipathway_fusion\.norm\.(.+)", r"fuse.bn.\1"),
    (r"multipathway_blocks\.([01])\.res_blocks\.(\d+)\.(.+)", r"pathway\1_res\2.\3"),
)
_PYTORCHVIDEO_INNER: Patterns = (
    (r"_stem\.norm\.", "_stem.bn."),
    (r"\.branch1_conv\.", ".branch1."),
    (r"\.branch1_norm\.", ".branch1_bn."),
    (r"\.branch2\.conv_([abc])\.", r".branch2.\1."),
    (r"\.branch2\.norm_([abc])\.", r".branch2.\1_bn."),
)
# A lateral connection is called after the layer it leaves
_CAFFE2_LATERAL: Patterns = (
    (r"pool1_subsample_bn", "s1_fuse.bn"),
    (r"pool1_subsample", "s1_fuse.conv_f2s"),
    (r"res(\d)_\d+_branch2c_bn_subsample_bn", r"s\1_fuse.bn"),
    (r"res(\d)_\d+_branch2c_bn_subsample", r"s\1_fuse.conv_f2s"),
)
_CAFFE2: Patterns = (
    (r"res_conv1_bn", "s1.PATHWAY_stem.bn"),
    (r"conv1", "s1.PATHWAY_stem.conv"),
    (r"res(\d)_(\d+)_branch1(_bn)?", r"s\1.PATHWAY_res\2.branch1\3"),
    (r"res(\d)_(\d+)_branch2([abc](?:_bn)?)", r"s\1.PATHWAY_res\2.branch2.\3"),
    (r"pred", "projection"),
)


def adapt_slowfast(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Foreign weights under our names, and a note; names that no rule knows stay, and loading refuses them."""
    if any(key.startswith("blocks.0.multipathway") for key in state):
        return {_from_pytorchvideo(k): v for k, v in state.items()}, ["took pytorchvideo's names"]
    if "t_conv1_w" in state:
        return {_from_caffe2(k): v for k, v in state.items()}, ["took the names of Caffe2's blobs"]
    if "s1.pathway0_stem.conv.weight" in state and not any(k.startswith("projection.") for k in state):
        return rename_prefixes(state, {"head.projection.": "projection."}), ["took PySlowFast's names"]
    return state, []


def _from_pytorchvideo(key: str) -> str:
    """``blocks.N`` is stage N + 1 with the lateral connection that follows it; ``blocks.6`` is the head."""
    match = re.fullmatch(r"blocks\.(\d)\.(.+)", key)
    if match is None:
        return key
    stage, inner = int(match[1]) + 1, match[2]
    if inner.startswith("proj."):
        return "projection." + inner.removeprefix("proj.")
    for old, new in _PYTORCHVIDEO_TOP:
        inner, found = re.subn(f"^{old}$", new, inner)
        if found:
            break
    for old, new in _PYTORCHVIDEO_INNER:
        inner = re.sub(old, new, inner)
    return f"s{stage}_{inner}" if inner.startswith("fuse.") else f"s{stage}.{inner}"


def _from_caffe2(blob: str) -> str:
    match = CAFFE2_BLOB.fullmatch(blob)
    if match is None:
        return blob
    # the Fast pathway's names begin with t_
    fast, layer = match[1].startswith("t_"), match[1].removeprefix("t_")
    for old, new in _CAFFE2_LATERAL if "subsample" in layer else _CAFFE2:
        if re.fullmatch(old, layer):
            ours = re.sub(f"^{old}$", new, layer).replace("PATHWAY", f"pathway{int(fast)}")
            return f"{ours}.{CAFFE2_TENSORS[match[2]]}"
    return blob


SlowSampling = Literal["strided", "spread"]
PAPER = "Feichtenhofer et al. 2019"
EXPANSION = 4
STEM_DEPTHS = (1, 5)  # frames under the stem's kernel: Slow, Fast
# frames under the first kernel of a block in res2, res3, res4, res5
BLOCK_DEPTHS = ((1, 1, 3, 3), (3, 3, 3, 3))


@dataclass(frozen=True, kw_only=True)
class Pathways:
    """How the two pathways relate.

    Attributes:
        alpha: frames of Fast for one of Slow.
        beta_inv: channels of Slow for one of Fast (the paper's 1/beta).
        lateral_ratio: channels of a lateral connection for one of Fast.
        lateral_kernel: its frames; 7 in the released weights, 5 in the paper.
        slow_sampling: which frames Slow sees, "strided", or "spread" as PySlowFast samples.
        fast_stride: of the frames given, Fast sees one in so many.
    """

    alpha: int = 4
    beta_inv: int = 8
    lateral_ratio: int = 2
    lateral_kernel: int = 7
    slow_sampling: SlowSampling = "strided"
    fast_stride: int = 1

    def __post_init__(self) -> None:
        for name in ("alpha", "beta_inv", "lateral_ratio", "lateral_kernel", "fast_stride"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name}={getattr(self, name)} must be at least 1")
        if STAGE_WIDTHS[0] % self.beta_inv:
            raise ModelError(f"beta_inv={self.beta_inv} must divide {STAGE_WIDTHS[0]}, the stem's channels")
        if self.lateral_kernel % 2 == 0:
            raise ModelError(f"lateral_kernel={self.lateral_kernel} must be odd, to keep T / alpha frames")
        check_choices(SlowSampling, slow_sampling=self.slow_sampling)

    def check_frames(self, frames: int) -> None:
        """Raises ModelError unless both pathways get whole numbers of frames."""
        step = self.alpha * self.fast_stride
        if frames < step or frames % step:
            raise ModelError(
                f"SlowFast: in_frames={frames} must be a multiple of alpha * fast_stride = "
                f"{self.alpha} * {self.fast_stride} = {step}"
            )

    def split(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T, H, W) -> Slow (B, C, T/(fast_stride alpha), H, W) and Fast (B, C, T/fast_stride, H, W)."""
        fast = clip[:, :, :: self.fast_stride]
        if self.slow_sampling == "strided":
            return fast[:, :, :: self.alpha], fast
        frames = fast.shape[2]
        chosen = torch.linspace(0, frames - 1, frames // self.alpha, device="cpu").long()
        return fast[:, :, chosen.tolist()], fast


class ResidualNorm(nn.BatchNorm3d):
    """The last BN of a block, with a scale of zero: every block starts as its shortcut (section 4.1)."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)


class Stem(nn.Module):
    """kx7x7, BN, ReLU, max pooling over space: (B, in, T, H, W) -> (B, out, T, H/4, W/4)."""

    def __init__(self, in_channels: int, out_channels: int, depth: int) -> None:
        super().__init__()
        self.conv = Conv3d(
            in_channels, out_channels, (depth, 7, 7), stride=(1, 2, 2), padding=(depth // 2, 3, 3), bias=False
        )
        self.bn = nn.BatchNorm3d(out_channels)
        self.pool_layer = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.pool_layer(F.relu(self.bn(self.conv(x)), inplace=True)))


class Lateral(nn.Module):
    """Fast (B, C, alpha T, H, W) -> its contribution to Slow, (B, ratio C, T, H, W)."""

    def __init__(self, channels: int, pathways: Pathways) -> None:
        super().__init__()
        kernel, out_channels = pathways.lateral_kernel, channels * pathways.lateral_ratio
        self.conv_f2s = Conv3d(
            channels,
            out_channels,
            (kernel, 1, 1),
            stride=(pathways.alpha, 1, 1),
            padding=(kernel // 2, 0, 0),
            bias=False,
        )
        self.bn = nn.BatchNorm3d(out_channels)

    def forward(self, fast: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv_f2s(fast)), inplace=True)


class Transform(nn.Module):
    """kx1x1 - 1x3x3 - 1x1x1, each with BN; the residual branch of a block."""

    def __init__(self, in_channels: int, width: int, *, depth: int, stride: int) -> None:
        super().__init__()
        self.a = Conv3d(in_channels, width, (depth, 1, 1), padding=(depth // 2, 0, 0), bias=False)
        self.a_bn = nn.BatchNorm3d(width)
        self.b = Conv3d(width, width, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1), bias=False)
        self.b_bn = nn.BatchNorm3d(width)
        self.c = Conv3d(width, width * EXPANSION, 1, bias=False)
        self.c_bn = ResidualNorm(width * EXPANSION)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 4 * width, T, H/stride, W/stride)."""
        x = F.relu(self.a_bn(self.a(x)), inplace=True)
        x = F.relu(self.b_bn(self.b(x)), inplace=True)
        return cast(Tensor, self.c_bn(self.c(x)))


class Block(nn.Module):
    """:class:`Transform` and its shortcut, a strided 1x1x1 with BN where shapes change."""

    def __init__(self, in_channels: int, width: int, *, depth: int, stride: int) -> None:
        super().__init__()
        out_channels = width * EXPANSION
        self.projects = stride != 1 or in_channels != out_channels
        if self.projects:
            self.branch1 = Conv3d(in_channels, out_channels, 1, stride=(1, stride, stride), bias=False)
            self.branch1_bn = nn.BatchNorm3d(out_channels)
        self.branch2 = Transform(in_channels, width, depth=depth, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 4 * width, T, H/stride, W/stride)."""
        y = self.branch2(x)
        return F.relu(y + (self.branch1_bn(self.branch1(x)) if self.projects else x), inplace=True)


class SlowFast(PooledClassifier):
    """(B, C, T, H, W) -> (B, K) for T a multiple of ``alpha * fast_stride`` and any H, W.

    With the defaults 32 frames at a stride of 2 in the video: Slow sees 8, a stride of 8. ``in_frames=64,
    fast_stride=2`` takes 64 consecutive frames and sees the same ones.

    Args:
        depth: of both pathways' ResNet.
        in_frames: T, a multiple of ``alpha * fast_stride``.
        in_channels: 3, or 2 for the flow stream; both stems take them.
        alpha, beta_inv, lateral_ratio, lateral_kernel, slow_sampling, fast_stride: see :class:`Pathways`.
        dropout: before the classifier.
    """

    head_name = "projection"

    def __init__(
        self,
        *,
        depth: int,
        num_classes: int = 400,
        in_frames: int = 32,
        in_channels: int = 3,
        alpha: int = 4,
        beta_inv: int = 8,
        lateral_ratio: int = 2,
        lateral_kernel: int = 7,
        slow_sampling: SlowSampling = "strided",
        fast_stride: int = 1,
        dropout: float = 0.5,
    ) -> None:
        rgb = InputSpec.square(
            224,
            frames=in_frames,
            frame_stride=2 if fast_stride == 1 else 1,
            mean=(0.45,) * 3,
            std=(0.225,) * 3,
            test_clips=10,
            test_crops=3,
        )
        pathways = Pathways(
            alpha=alpha,
            beta_inv=beta_inv,
            lateral_ratio=lateral_ratio,
            lateral_kernel=lateral_kernel,
            slow_sampling=slow_sampling,
            fast_stride=fast_stride,
        )
        spec = stream_spec(rgb, in_channels)
        pathways.check_frames(in_frames)
        stem, last = STAGE_WIDTHS[0], STAGE_WIDTHS[-1] * EXPANSION
        super().__init__(
            feature_dim=last + last // beta_inv, num_classes=num_classes, input_spec=spec, dropout=dropout
        )
        self.pathways, self.counts = pathways, LAYERS[depth]
        narrow = (1, beta_inv)
        self.s1 = nn.ModuleDict(
            {f"pathway{p}_stem": Stem(spec.channels, stem // narrow[p], STEM_DEPTHS[p]) for p in (0, 1)}
        )
        channels = [stem, stem // beta_inv]
        for s, (count, width) in enumerate(zip(self.counts, STAGE_WIDTHS, strict=True), start=2):
            self.add_module(f"s{s - 1}_fuse", Lateral(channels[1], pathways))
            # the lateral connection is concatenated to what enters Slow's stage, not to what leaves it
            channels[0] += channels[1] * lateral_ratio
            stage = nn.ModuleDict()
            for p in (0, 1):
                for i in range(count):
                    stride = 2 if s > 2 and i == 0 else 1
                    stage[f"pathway{p}_res{i}"] = Block(
                        channels[p], width // narrow[p], depth=BLOCK_DEPTHS[p][s - 2], stride=stride
                    )
                    channels[p] = width // narrow[p] * EXPANSION
            self.add_module(f"s{s}", stage)
        self.reset_classifier(num_classes)

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        self.pathways.check_frames(x.shape[2])

    def forward_pathways(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T, H, W) -> the last maps of Slow, (B, 2048, T/4, H/32, W/32), and of Fast, (B, 256, T, H/32, W/32).

        Sizes for the defaults and ``fast_stride=1``; 2048x8x7x7 and 256x32x7x7 for 32x224x224.
        """
        self.pathways.check_frames(x.shape[2])
        slow, fast = self.pathways.split(x)
        slow, fast = self._part("s1.pathway0_stem", slow), self._part("s1.pathway1_stem", fast)
        for s, count in enumerate(self.counts, start=2):
            slow = torch.cat([slow, self._part(f"s{s - 1}_fuse", fast)], dim=1)
            for i in range(count):
                slow = self._part(f"s{s}.pathway0_res{i}", slow)
                fast = self._part(f"s{s}.pathway1_res{i}", fast)
        return slow, fast

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 2304, T/4, H/32, W/32): Slow's map and Fast's, averaged over every alpha frames.

        The released head averages each pathway over its own positions and concatenates; the average of this map is
        the same numbers.
        """
        slow, fast = self.forward_pathways(x)
        runs = torch.unflatten(fast, 2, (slow.shape[2], self.pathways.alpha))  # (B, C, T/alpha, alpha, H, W)
        return torch.cat([slow, runs.mean(dim=3)], dim=1)

    def checkpoint_blocks(self) -> list[str]:
        names = ["s1.pathway0_stem", "s1.pathway1_stem"]
        for s, count in enumerate(self.counts, start=2):
            names.append(f"s{s - 1}_fuse")
            names += [f"s{s}.pathway{p}_res{i}" for i in range(count) for p in (0, 1)]
        return names

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """PySlowFast's, pytorchvideo's and Caffe2's names; see :mod:`cliplift.models.conv3d.slowfast`."""
        state, notes = adapt_slowfast(state)
        stems = ("s1.pathway0_stem.conv.weight", "s1.pathway1_stem.conv.weight")
        state, more = flow_from_rgb(state, stems, in_channels=self.input_spec.channels)
        return state, notes + more

    def adapt_2d_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Raises ModelError: the pathways' widths, with the lateral channels, are no image network's."""
        raise ModelError(
            "SlowFast has no 2D counterpart: its stages take the lateral connections' channels as well, and it is "
            "published as trained from scratch. Load video weights with pretrained=PATH."
        )

    def _part(self, name: str, x: Tensor) -> Tensor:
        return cast(Tensor, self.get_submodule(name)(x))


# 8x8 on ResNet-50: 34,566,488 parameters at 400 classes, features of 2048 + 256
slowfast_r50_8x8 = variant("slowfast_r50_8x8", SlowFast, paper=PAPER, fixed={"depth": 50})
