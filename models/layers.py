"""What the convolutional nets share: the pooled classifier, temporal "same" padding, initialised layers.

Shape letters: B clips, C channels, T frames, H W pixels, D width, K classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.protocol import InputSpec, ModelError, PoolsMap, VideoNetwork

# Every layer initialises itself inside its constructor (reset_parameters), not in a pass over the finished model:
# under ``deepspeed.zero.Init`` the weights are partitioned away as soon as a constructor returns.


class Conv2d(nn.Conv2d):
    """Kaiming-normal weights for ReLU, by fan-out, and zero bias, as in torchvision's and the video nets."""

    def reset_parameters(self) -> None:
        _kaiming(self)


class Conv3d(nn.Conv3d):
    """:class:`Conv2d` with time."""

    def reset_parameters(self) -> None:
        _kaiming(self)


def _kaiming(layer: nn.Conv2d | nn.Conv3d) -> None:
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class ReluLinear(nn.Linear):
    """Linear before a ReLU: Kaiming-uniform weights, zero bias.

    ``parts``: the layer is one of that many whose outputs are added, so its fan-in is that many times its inputs.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, parts: int = 1) -> None:
        self.parts = parts  # read by reset_parameters, which the constructor calls
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        bound = math.sqrt(6 / (self.in_features * self.parts))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LinearHead(nn.Linear):
    """(B, D) -> (B, K): weights N(0, 0.01), zero bias, so that every class starts equal."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


# The same network in 2D and 3D: rank -> layer
CONVOLUTIONS: Mapping[int, Callable[..., nn.Conv2d | nn.Conv3d]] = {2: Conv2d, 3: Conv3d}
BATCH_NORMS: Mapping[int, Callable[[int], nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOLS: Mapping[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


class PooledClassifier(VideoNetwork):
    """A trunk (:meth:`forward_features`), global average pooling over all positions, dropout, a linear head.

    Global pooling instead of the papers' fixed windows: for the published input both are the same sum, and any
    other size still gives one row per clip. Subclasses build their trunk, then call ``reset_classifier``.
    """

    head_name = "classifier"  # where the head's weights stand in the state dict
    input_dims = 5  # (B, C, T, H, W); 4 for image models

    def __init__(
        self, *, feature_dim: int, num_classes: int, input_spec: InputSpec, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ModelError(f"dropout={dropout} must be in [0, 1)")
        self.feature_dim = feature_dim
        self.num_classes = num_classes
        self.input_spec = input_spec
        self.head_dropout = nn.Dropout(dropout)

    def forward_pooled(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D): the feature map averaged over time and space, or as ``pool_map`` says."""
        self.check_input(x)
        maps = self.forward_features(x)
        return self.pool_map(maps) if isinstance(self, PoolsMap) else maps.flatten(2).mean(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, K) logits, or (B, D) features when ``num_classes == 0``."""
        return cast(Tensor, self.get_submodule(self.head_name)(self.head_dropout(self.forward_pooled(x))))

    def check_input(self, x: Tensor) -> None:
        """Raises ModelError unless ``x`` has the rank and the channels this model was built for."""
        if x.ndim != self.input_dims or x.shape[1] != self.input_spec.channels:
            wanted = "(B, C, T, H, W)" if self.input_dims == 5 else "(B, C, H, W)"
            raise ModelError(
                f"{type(self).__name__} takes {wanted} with C={self.input_spec.channels}, got {tuple(x.shape)}"
            )

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one; 0 removes it."""
        if num_classes < 0:
            raise ModelError(f"num_classes={num_classes} must be 0 (features) or more")
        self.num_classes = num_classes
        reference = next(self.parameters(), torch.empty(0))
        head = LinearHead(self.feature_dim, num_classes) if num_classes else nn.Identity()
        setattr(self, self.head_name, head.to(device=reference.device, dtype=reference.dtype))


class DropPath(nn.Module):
    """Drop a residual for whole clips with probability ``rate``; the others are scaled by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.empty(x.shape[0], 1, 1, dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * keep.div_(1 - self.rate)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every part gets its own mode back (a frozen BatchNorm stays in eval)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def same_pads(size: int, kernel: int, stride: int = 1) -> tuple[int, int]:
    """(front, behind) padding for ceil(size / stride) positions, the odd one behind: TensorFlow's "SAME".

    At stride 1 the length is kept, whatever it is; the T3D paper's depths 4 and 6 need this rule and name none.
    """
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SameConv3d(Conv3d):
    """A stride-1 convolution that keeps T, H and W, for odd and even kernels.

    The symmetric part of the padding is left to the convolution; only the extra rows of even kernels are padded
    (and copied) beforehand.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], *, bias: bool = False
    ) -> None:
        pads = [same_pads(1, k) for k in kernel]
        front = (pads[0][0], pads[1][0], pads[2][0])
        super().__init__(in_channels, out_channels, kernel, padding=front, bias=bias)
        # F.pad counts from the last dimension: (W front, W behind, H front, H behind, T front, T behind)
        extra = [n for front, behind in reversed(pads) for n in (0, behind - front)]
        self.extra_padding: tuple[int, ...] | None = tuple(extra) if any(extra) else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H, W)."""
        return super().forward(x if self.extra_padding is None else F.pad(x, self.extra_padding))


def halve(x: Tensor) -> Tensor:
    """Average pooling of 2 along every axis, stride 2; an axis that has already shrunk to 1 stays 1.

    (B, C, T, H, W) -> (B, C, max(T//2, 1), max(H//2, 1), max(W//2, 1)); (B, C, H, W) likewise.
    The public DenseNet3D dies at the third transition for 16 frames, because AvgPool3d(2) refuses T = 1; from there
    on only space is left to pool.

    Not ``avg_pool3d``, which has no bfloat16 on the CPU and gives up the channels-last layout: space by
    ``avg_pool2d`` on a view, then time by the mean of neighbours.
    """
    window = [min(2, size) for size in x.shape[-2:]]
    if x.ndim == 4:
        return F.avg_pool2d(x, window, stride=window)
    frames = x.shape[2]
    if frames == 1:
        return halve(x.squeeze(2)).unsqueeze(2)
    if x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous():
        rows = F.avg_pool2d(x.transpose(1, 2).flatten(0, 1), window, stride=window)  # (B T, C, H, W)
        x = torch.unflatten(rows, 0, (-1, frames)).transpose(1, 2)
    else:
        rows = F.avg_pool2d(x.flatten(1, 2), window, stride=window)  # (B, C T, H, W)
        x = torch.unflatten(rows, 1, (-1, frames))
    even = frames // 2 * 2
    return (x[:, :, 0:even:2] + x[:, :, 1:even:2]) * 0.5
