"""The networks of Shi et al. by name: clip classifiers or, with ``forecaster``, forecasters of the frames to come.

Paper: Shi et al., NeurIPS 2015, arXiv 1506.04214, Table 1 (Moving-MNIST) and section 4.2 (radar maps). "(5x5)-3x3-64"
is input-to-state kernel 5, state-to-state kernel 3, 64 state channels. The parameter counts below are the paper's: with
the forecaster, without a classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from cliplift.models.convrnn.conv_lstm import ConvLSTM, MapPeephole, per_layer
from cliplift.models.convrnn.fc_lstm import FCLSTM, Peephole
from cliplift.models.convrnn.forecaster import EncoderForecaster
from cliplift.models.convrnn.recurrence import layer_widths
from cliplift.models.registry import ModelError, register_model


@register_model(paper="arXiv 1506.04214", default_classes=101)
def convlstm(
    *,
    num_classes: int = 101,
    in_frames: int = 10,
    hidden: int | Sequence[int] = (64, 64),
    input_kernel: int | Sequence[int] = 3,
    hidden_kernel: int | Sequence[int] = 3,
    peephole: MapPeephole = "channel",
    patch: int = 4,
    side: int = 64,
    gray: bool = True,
    forecaster: bool = False,
    dropout: float = 0.0,
) -> EncoderForecaster:
    """ConvLSTM on patches of pixels: a clip classifier, or with ``forecaster`` the network of ``forecast``.

    Args:
        hidden: N of each encoder layer, from the input up.
        input_kernel, hidden_kernel, peephole: see :class:`ConvLSTM`; one kernel a layer, or one for all.
        patch: P; frames of any multiple of it are taken, for "position" peepholes of ``side`` pixels only.
        side: H and W the model is meant for.
        gray: turn colour clips to luma, as the published counts have it.
        forecaster: build the forecaster too.
        dropout: before the classifier.
    """
    widths = layer_widths(hidden)
    channels = _patch_channels(patch, side, gray)
    options: dict[str, Any] = {"peephole": peephole, "map_size": (side // patch, side // patch)}
    kernels = per_layer("input_kernel", input_kernel, len(widths))
    hidden_kernels = per_layer("hidden_kernel", hidden_kernel, len(widths))
    encoder = ConvLSTM(channels, widths, input_kernel=kernels, hidden_kernel=hidden_kernels, **options)
    upside_down = ConvLSTM(
        0, widths[::-1], input_kernel=kernels[::-1], hidden_kernel=hidden_kernels[::-1], **options
    )
    return EncoderForecaster(
        encoder,
        forecaster=upside_down if forecaster else None,
        output=nn.Conv2d(sum(widths), channels, 1) if forecaster else None,
        patch=patch,
        gray=gray,
        num_classes=num_classes,
        in_frames=in_frames,
        side=side,
        dropout=dropout,
    )


@register_model(paper="arXiv 1506.04214", default_classes=101)
def fclstm(
    *,
    num_classes: int = 101,
    in_frames: int = 10,
    hidden: int | Sequence[int] = (2048, 2048),
    peephole: Peephole = "diagonal",
    patch: int = 4,
    side: int = 64,
    gray: bool = True,
    forecaster: bool = False,
    dropout: float = 0.0,
) -> EncoderForecaster:
    """FC-LSTM on whole frames of ``side`` pixels, the ConvLSTM's rival: FC-LSTM-2048-2048 of Table 1.

    Options as :func:`convlstm`.
    """
    widths = layer_widths(hidden)
    channels = _patch_channels(patch, side, gray)
    pixels = channels * (side // patch) ** 2
    return EncoderForecaster(
        FCLSTM(pixels, widths, peephole=peephole),
        forecaster=FCLSTM(0, widths[::-1], peephole=peephole) if forecaster else None,
        output=nn.Linear(widths[0], pixels) if forecaster else None,
        patch=patch,
        gray=gray,
        num_classes=num_classes,
        in_frames=in_frames,
        side=side,
        dropout=dropout,
    )


@register_model(paper="arXiv 1506.04214, Table 1", default_classes=101)
def convlstm_5x5_256(
    *,
    num_classes: int = 101,
    in_frames: int = 10,
    gray: bool = True,
    forecaster: bool = False,
    dropout: float = 0.0,
) -> EncoderForecaster:
    """(5x5)-5x5-256: 13,524,496 parameters."""
    return convlstm(
        num_classes=num_classes,
        in_frames=in_frames,
        gray=gray,
        forecaster=forecaster,
        dropout=dropout,
        hidden=(256,),
        input_kernel=5,
        hidden_kernel=5,
    )


@register_model(paper="arXiv 1506.04214, Table 1", default_classes=101)
def convlstm_5x5_128_128(
    *,
    num_classes: int = 101,
    in_frames: int = 10,
    gray: bool = True,
    forecaster: bool = False,
    dropout: float = 0.0,
) -> EncoderForecaster:
    """(5x5)-5x5-128-5x5-128: 10,042,896 parameters."""
    return convlstm(
        num_classes=num_classes,
        in_frames=in_frames,
        gray=gray,
        forecaster=forecaster,
        dropout=dropout,
        hidden=(128, 128),
        input_kernel=5,
        hidden_kernel=5,
    )


@register_model(paper="arXiv 1506.04214, Table 1", default_classes=101)
def convlstm_5x5_128_64_64(
    *,
    num_classes: int = 101,
    in_frames: int = 10,
    gray: bool = True,
    forecaster: bool = False,
    dropout: float = 0.0,
) -> EncoderForecaster:
    """(5x5)-5x5-128-5x5-64-5x5-64: 7,585,296 parameters, the best of the table."""
    return convlstm(
        num_classes=num_classes,
        in_frames=in_frames,
        gray=gray,
        forecaster=forecaster,
        dropout=dropout,
        hidden=(128, 64, 64),
        input_kernel=5,
        hidden_kernel=5,
    )


@register_model(paper="arXiv 1506.04214, Table 1", default_classes=101)
def convlstm_1x1_128_128(
    *,
    num_classes: int = 101,
    in_frames: int = 10,
    gray: bool = True,
    forecaster: bool = False,
    dropout: float = 0.0,
) -> EncoderForecaster:
    """(9x9)-1x1-128-1x1-128: 11,550,224 parameters; no position ever hears of another."""
    return convlstm(
        num_classes=num_classes,
        in_frames=in_frames,
        gray=gray,
        forecaster=forecaster,
        dropout=dropout,
        hidden=(128, 128),
        input_kernel=9,
        hidden_kernel=1,
    )


@register_model(paper="arXiv 1506.04214, Table 1", default_classes=101)
def convlstm_1x1_128_64_64(
    *,
    num_classes: int = 101,
    in_frames: int = 10,
    gray: bool = True,
    forecaster: bool = False,
    dropout: float = 0.0,
) -> EncoderForecaster:
    """(9x9)-1x1-128-1x1-64-1x1-64: 8,830,480 parameters."""
    return convlstm(
        num_classes=num_classes,
        in_frames=in_frames,
        gray=gray,
        forecaster=forecaster,
        dropout=dropout,
        hidden=(128, 64, 64),
        input_kernel=9,
        hidden_kernel=1,
    )


@register_model(paper="arXiv 1506.04214, section 4.2", default_classes=101)
def convlstm_radar_64_64(
    *,
    num_classes: int = 101,
    in_frames: int = 5,
    gray: bool = True,
    forecaster: bool = False,
    dropout: float = 0.0,
) -> EncoderForecaster:
    """(3x3)-3x3-64-3x3-64 on 100x100 maps in 2x2 patches, 5 frames read."""
    return convlstm(
        num_classes=num_classes,
        in_frames=in_frames,
        gray=gray,
        forecaster=forecaster,
        dropout=dropout,
        hidden=(64, 64),
        patch=2,
        side=100,
    )


def _patch_channels(patch: int, side: int, gray: bool) -> int:
    if patch < 1 or side < patch or side % patch:
        raise ModelError(
            f"side={side} cannot be cut into patches of patch={patch} pixels: use a multiple of it"
        )
    return (1 if gray else 3) * patch * patch
