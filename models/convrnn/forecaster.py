"""The encoder-forecaster: read J frames, write down the states, unroll them into K frames to come.

Paper: Shi et al., NeurIPS 2015, arXiv 1506.04214, section 3.2 and Tables 1 and 2. An encoder stack reads the frames;
its last states start the forecaster, the same stack upside down: its first layer takes over the encoder's top layer,
gets no input at all (no W_x), and the layers above it read the one below. Every predicted frame is a 1x1 convolution
of the hidden states of *all* forecaster layers (of the last one alone in the FC-LSTM form). Nothing predicted is fed
back. This reading gives all six parameter counts of Table 1 exactly.

Frames are cut into patches, 4x4 pixels as channels for Moving-MNIST (64x64x1 -> 16x16x16), 2x2 for the radar maps.
The paper's frames have one channel: colour clips are turned to luma unless ``gray`` is off.

As a classifier the encoder's last top state, averaged over the map, goes into a linear layer; the forecaster is then
not built.

Shape letters: B clips, C channels, T frames, J read, K predicted (or classes), H W pixels, P patch, N state channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.convrnn.recurrence import RecurrentStack, StackState
from cliplift.models.layers import PooledClassifier
from cliplift.models.protocol import InputSpec, ModelError, check_choices
from cliplift.models.streams import luma

ForecastLoss = Literal["bce", "mse"]
FORECASTER = ("forecaster.", "output.")  # what a classifier has no use for, in the state dict


class EncoderForecaster(PooledClassifier):
    """Encoder, forecaster and what lies between pixels and their inputs. ``variants`` builds it."""

    forecaster: RecurrentStack | None
    output: nn.Module | None

    def __init__(
        self,
        encoder: RecurrentStack,
        *,
        forecaster: RecurrentStack | None,
        output: nn.Module | None,
        patch: int,
        gray: bool,
        num_classes: int,
        in_frames: int,
        side: int,
        dropout: float,
    ) -> None:
        # Pixels stay in [0, 1]: they are what is predicted, and the binary cross-entropy wants them there.
        spec = InputSpec(
            frames=in_frames, crop_height=side, crop_width=side, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
        )
        super().__init__(
            feature_dim=encoder.out_channels, num_classes=num_classes, input_spec=spec, dropout=dropout
        )
        self.encoder, self.forecaster, self.output = encoder, forecaster, output
        self.patch, self.gray = patch, gray
        self.reset_classifier(num_classes)

    @property
    def on_maps(self) -> bool:
        """Whether the states are maps (ConvLSTM) or vectors (FC-LSTM)."""
        return self.encoder.position_axes == 2

    def check_input(self, x: Tensor) -> None:
        """Raises ModelError unless ``x`` is (B, C, T, H, W) that can be cut into whole patches."""
        if not (self.gray and x.ndim == 5 and x.shape[1] == 1):
            super().check_input(x)
        if x.shape[-2] % self.patch or x.shape[-1] % self.patch:
            raise ModelError(
                f"frames of {x.shape[-2]}x{x.shape[-1]} pixels cannot be cut into patches of {self.patch}: use "
                f"multiples of it, or another patch"
            )
        spec = self.input_spec
        if not self.on_maps and tuple(x.shape[-2:]) != (spec.crop_height, spec.crop_width):
            raise ModelError(
                f"FC-LSTM was built for frames of {spec.crop_height}x{spec.crop_width} pixels, got "
                f"{x.shape[-2]}x{x.shape[-1]}; set its option side, or use a ConvLSTM"
            )

    def pixels(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> what is read and predicted: (B, 1, T, H, W) luma, or the clip itself."""
        return luma(x) if self.gray and x.shape[1] == 3 else x

    def encode(self, x: Tensor) -> tuple[Tensor, StackState]:
        """(B, C, T, H, W) -> the top layer's states (B, N, T, H/P, W/P) or (B, T, N), and every layer's last."""
        self.check_input(x)
        patches = to_patches(self.pixels(x), self.patch)
        if not self.on_maps:
            patches = patches.transpose(1, 2).flatten(2)
        states, last = self.encoder(patches)
        return states, last

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the top layer's hidden states (B, N, T, H/P, W/P), or (B, N, T, 1, 1) of vectors."""
        states, _ = self.encode(x)
        return states if self.on_maps else states.transpose(1, 2)[..., None, None]

    def forward_pooled(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, N): the last step's, averaged over the map."""
        return self.forward_features(x)[:, :, -1].mean(dim=(2, 3))

    def forecast_logits(self, x: Tensor, frames: int) -> Tensor:
        """The K = ``frames`` frames that follow the clip, before the sigmoid: (B, C, J, H, W) -> (B, C', K, H, W).

        Raises:
            ModelError: the model was built as a classifier, or frames < 1.
        """
        if self.forecaster is None or self.output is None:
            raise ModelError("this model was built without a forecaster: give it the option forecaster=True")
        if frames < 1:
            raise ModelError(f"frames={frames} to predict must be 1 or more")
        _, last = self.encode(x)
        top = last[-1][0]
        nothing = top.new_empty(frames, top.shape[0], 0, *top.shape[2:])  # the first layer has no W_x
        outputs, _ = self.forecaster.run(nothing, last[::-1], real=None)
        if self.on_maps:
            patches = self.output(torch.cat(outputs, dim=2).flatten(0, 1))  # (K B, C P P, H/P, W/P)
            sequence = patches.view(frames, -1, *patches.shape[1:])
        else:
            H, W = (size // self.patch for size in x.shape[-2:])
            sequence = self.output(outputs[-1]).view(frames, len(x), -1, H, W)
        return from_patches(sequence.permute(1, 2, 0, 3, 4), self.patch)

    def forecast(self, x: Tensor, frames: int) -> Tensor:
        """:meth:`forecast_logits` as pixel values in [0, 1]."""
        return self.forecast_logits(x, frames).sigmoid()

    def forecast_loss(self, clips: Tensor, *, input_frames: int, loss: ForecastLoss = "bce") -> Tensor:
        """Read the first J frames of (B, C, T, H, W) in [0, 1], predict the others, and compare.

        "bce" is the paper's, binary cross-entropy (here the mean over pixels, there the sum over a sequence); "mse" the
        mean squared error of the pixel values.

        Raises:
            ModelError: ``input_frames`` leaves nothing to read or to predict.
        """
        T = clips.shape[2]
        if not 0 < input_frames < T:
            raise ModelError(
                f"input_frames={input_frames} of clips of {T} frames: read at least 1 and leave 1 to predict"
            )
        logits = self.forecast_logits(clips[:, :, :input_frames], T - input_frames)
        return forecast_error(logits, self.pixels(clips[:, :, input_frames:]), loss=loss).mean()

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """A classifier takes the encoder of a trained forecaster."""
        if self.forecaster is not None:
            return state, []
        kept = {key: value for key, value in state.items() if not key.startswith(FORECASTER)}
        left = len(state) - len(kept)
        return kept, [f"left out the forecaster's {left} tensors"] if left else []

    def checkpoint_blocks(self) -> list[str]:
        blocks = [f"encoder.layers.{i}" for i in range(len(self.encoder.layers))]
        if self.forecaster is not None:
            blocks += [f"forecaster.layers.{i}" for i in range(len(self.forecaster.layers))]
        return blocks


def forecast_error(logits: Tensor, target: Tensor, *, loss: ForecastLoss) -> Tensor:
    """(B, C, K, H, W) logits and pixels in [0, 1] -> (B,), every clip's mean over its pixels."""
    check_choices(ForecastLoss, loss=loss)
    if loss == "bce":
        error = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    else:
        error = (logits.float().sigmoid() - target.float()).square()
    return error.flatten(1).mean(dim=1)


def to_patches(x: Tensor, patch: int) -> Tensor:
    """(B, C, T, H, W) -> (B, C P P, T, H/P, W/P): P x P pixels become channels."""
    B, C, T, H, W = x.shape
    cut = x.reshape(B, C, T, H // patch, patch, W // patch, patch).permute(0, 1, 4, 6, 2, 3, 5)
    return cut.reshape(B, C * patch * patch, T, H // patch, W // patch)


def from_patches(x: Tensor, patch: int) -> Tensor:
    """The inverse of :func:`to_patches`."""
    B, D, T, H, W = x.shape
    C = D // (patch * patch)
    cut = x.reshape(B, C, patch, patch, T, H, W).permute(0, 1, 4, 5, 2, 6, 3)
    return cut.reshape(B, C, T, H * patch, W * patch)
