"""The networks of Shi et al. by name: clip classifiers or, with ``forecaster``, forecasters of the frames to come.

Paper: Shi et al., NeurIPS 2015, arXiv 1506.04214, Table 1 (Moving-MNIST) and section 4.2 (radar maps). "(5x5)-3x3-64"
is input-to-state kernel 5, state-to-state kernel 3, 64 state channels. The parameter counts below are the paper's: with
the forecaster, without a classifier.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cliplift.models.convrnn.conv_lstm import ConvLSTM, MapPeephole
from cliplift.models.convrnn.fc_lstm import FCLSTM, Peephole
from cliplift.models.convrnn.forecaster import EncoderForecaster
from cliplift.models.convrnn.recurrence import layer_widths, per_layer
from cliplift.models.protocol import ModelError
from cliplift.models.registry import register_model, variant

PAPER = "arXiv 1506.04214"


@register_model(paper=PAPER, default_classes=101)
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
        input_kernel, hidden_kernel, peephole: see :class:`ConvLSTM`; one kernel per layer, or one for all.
        patch: P; frames of any multiple of it are taken, for "position" peepholes of ``side`` pixels only.
        side: H and W the model is meant for.
        gray: turn colour clips to luma, as the published counts have it.
        forecaster: build the forecaster too.
        dropout: before the classifier.
    """
    widths = layer_widths(hidden)
    channels = _patch_channels(patch, side, gray)
    kernels = per_layer("input_kernel", input_kernel, len(widths))
    hidden_kernels = per_layer("hidden_kernel", hidden_kernel, len(widths))
    # the forecaster is the encoder upside down, and its first layer has no input
    encoder, upside_down = (
        ConvLSTM(
            inputs,
            widths[::order],
            input_kernel=kernels[::order],
            hidden_kernel=hidden_kernels[::order],
            peephole=peephole,
            map_size=(side // patch, side // patch),
        )
        for inputs, order in ((channels, 1), (0, -1))
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


@register_model(paper=PAPER, default_classes=101)
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


def _patch_channels(patch: int, side: int, gray: bool) -> int:
    if patch < 1 or side < patch or side % patch:
        raise ModelError(
            f"side={side} cannot be cut into patches of patch={patch} pixels: use a multiple of it"
        )
    return (1 if gray else 3) * patch * patch


def _table_1(name: str, hidden: tuple[int, ...], *, input_kernel: int, hidden_kernel: int) -> None:
    """A network on Moving-MNIST: 64x64 pixels in patches of 4x4."""
    kernels = {"input_kernel": input_kernel, "hidden_kernel": hidden_kernel}
    fixed = {"hidden": hidden, "peephole": "channel", "patch": 4, "side": 64, **kernels}
    variant(name, convlstm, paper=f"{PAPER}, Table 1", fixed=fixed)


_table_1("convlstm_5x5_256", (256,), input_kernel=5, hidden_kernel=5)  # 13,524,496 parameters
_table_1("convlstm_5x5_128_128", (128, 128), input_kernel=5, hidden_kernel=5)  # 10,042,896
_table_1(
    "convlstm_5x5_128_64_64", (128, 64, 64), input_kernel=5, hidden_kernel=5
)  # 7,585,296, the best of the table
# state-to-state kernel 1: positions never exchange information
_table_1("convlstm_1x1_128_128", (128, 128), input_kernel=9, hidden_kernel=1)  # 11,550,224
_table_1("convlstm_1x1_128_64_64", (128, 64, 64), input_kernel=9, hidden_kernel=1)  # 8,830,480
# Radar: (3x3)-3x3-64-3x3-64 on 100x100 maps in patches of 2x2, 5 frames read
_RADAR = {
    "hidden": (64, 64),
    "input_kernel": 3,
    "hidden_kernel": 3,
    "peephole": "channel",
    "patch": 2,
    "side": 100,
}
variant("convlstm_radar_64_64", convlstm, paper=f"{PAPER}, section 4.2", fixed=_RADAR, in_frames=5)
