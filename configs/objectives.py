"""What is learned without labels: the sections of pretraining's objectives."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cliplift.configs.sections import ConfigError, Section


class ForecastConfig(Section):
    """Pretraining without labels: which frames are predicted, and how the prediction is judged."""

    input_frames: int = Field(
        10, ge=1, description="frames of a clip that are read; the others are predicted"
    )
    loss: Literal["bce", "mse"] = Field(
        "bce", description="binary cross-entropy of the pixels in [0, 1], or their mean squared error"
    )


class MaskedConfig(Section):
    """Masked autoencoding of pixels: what is hidden from the encoder, and what the decoder gives back."""

    mask: Literal["tube", "random", "running_cell"] = Field(
        "tube",
        description="what the encoder does not see: tube, the same random places at all times (VideoMAE); random, "
        "tokens anywhere (Hiera: whole mask units, its only kind); running_cell, places of 2 x 2 cells in turn",
    )
    ratio: float = Field(0.9, gt=0, lt=1, description="share of the tokens that is hidden from the encoder")
    decoder_mask: Literal["random", "running_cell"] | None = Field(
        None,
        description="what the decoder leaves out (VideoMAE v2: running_cell); None decodes all that is hidden",
    )
    decoder_ratio: float = Field(
        0.5, gt=0, lt=1, description="share of all tokens that the decoder leaves out, with decoder_mask"
    )
    normalise_targets: bool = Field(
        True, description="predict each tubelet's pixels less their mean, over their standard deviation"
    )
    decoder_width: int | None = Field(
        None, ge=8, description="width of the decoder; None is half of the encoder's, and 512 for Hiera"
    )
    decoder_depth: int | None = Field(
        None, ge=1, description="blocks of the decoder; None is 4, and 8 for Hiera"
    )
    decoder_heads: int | None = Field(
        None,
        ge=1,
        description="attention heads of the decoder; None is one for every 64 of its width, and 16 for Hiera",
    )

    @model_validator(mode="after")
    def _cells_hide_something(self) -> MaskedConfig:
        for key, kind, ratio in (
            ("ratio", self.mask, self.ratio),
            ("decoder_ratio", self.decoder_mask, self.decoder_ratio),
        ):
            if kind == "running_cell":
                _check_cells(key, ratio)
        return self


def _check_cells(key: str, ratio: float) -> None:
    if int(4 * ratio) == 0:
        raise ConfigError(
            f"a running cell hides 1, 2 or 3 of its 4 tokens, and {ratio} of 4 is less than 1",
            key=key,
            value=ratio,
            hint="use 0.25, 0.5 or 0.75",
        )


class DistilConfig(Section):
    """Distillation of image teachers' features, token by token (Unmasked Teacher, Masked Video Distillation)."""

    tokens: Literal["visible", "hidden"] = Field(
        "visible",
        description="which tokens' features are learned: visible, those the encoder sees (Unmasked Teacher); hidden, "
        "the others, by a decoder for each teacher (Masked Video Distillation)",
    )
    mask: Literal["attention", "tube", "random", "running_cell"] = Field(
        "attention",
        description="what the encoder does not see: attention, in each frame of tokens, what the first teacher attends "
        "to least, by chance (Unmasked Teacher); tube, random and running_cell as masked.mask",
    )
    ratio: float = Field(0.8, gt=0, lt=1, description="share of the tokens that is hidden from the encoder")
    loss: Literal["cosine", "smooth_l1", "l2"] | None = Field(
        None,
        description="distance to the teachers' features: cosine, 2 - 2 cos; smooth_l1; l2, their mean squared "
        "difference; None is cosine for visible tokens and smooth_l1 for hidden ones",
    )
    normalise_targets: bool = Field(
        True, description="smooth_l1, l2: layer-norm each token's target without weights"
    )
    layers: int = Field(
        1,
        ge=1,
        description="visible: so many of the encoder's last blocks are aligned with as many maps of the teachers "
        "(Unmasked Teacher: 6; needs a teacher that gives them, such as image_vit_*)",
    )
    teacher_frames: Literal["first", "mean"] = Field(
        "first",
        description="what a teacher sees of a token's tubelet: its first frame, or all, their features averaged",
    )
    decoder_width: int | None = Field(
        None, ge=8, description="hidden: width of the decoders; None is the encoder's"
    )
    decoder_depth: int = Field(
        2, ge=1, description="hidden: blocks of each decoder (published: 2 for B, 4 for L, 8 for H)"
    )
    decoder_heads: int | None = Field(
        None, ge=1, description="hidden: attention heads of the decoders; None is as many as the encoder has"
    )

    @property
    def distance(self) -> Literal["cosine", "smooth_l1", "l2"]:
        """The loss that is meant."""
        return self.loss or ("cosine" if self.tokens == "visible" else "smooth_l1")

    @model_validator(mode="after")
    def _possible(self) -> DistilConfig:
        if self.mask == "running_cell":
            _check_cells("ratio", self.ratio)
        if self.tokens == "hidden" and self.layers > 1:
            raise ConfigError(
                "is of visible tokens: a decoder gives the last map alone",
                key="layers",
                value=self.layers,
                hint="use 1, or tokens: visible",
            )
        return self


class LatentConfig(Section):
    """Latent prediction (V-JEPA 2, 2.1): the features a teacher gives hidden blocks, from the tokens that are left."""

    masks: Literal["per_clip", "shortest_of_batch"] = Field(
        "per_clip",
        description="tokens used of those the blocks leave and hide: per_clip, as many of every clip, chosen by chance "
        "from all of it; shortest_of_batch, the released code's rule: blocks of one size a step, all lists cut to the "
        "shortest of the micro-batch, which loses the end of clips and makes losses depend on the micro-batch",
    )
    teacher_momentum: float = Field(
        0.99925,
        ge=0,
        le=1,
        description="share of itself that the teacher keeps at each step; the rest is the student",
    )
    final_teacher_momentum: float | None = Field(
        None,
        ge=0,
        le=1,
        description="momentum goes linearly to this over a run schedule.stretch times as long (V-JEPA 1: 1); "
        "None is constant",
    )
    keep_predictor: bool = Field(
        False,
        description="initialise_from is the folder of a run of latent prediction, or a checkpoint of it, and encoder, "
        "predictor and teacher go on from there, with clips of any size (V-JEPA 2's cool-down); else its teacher alone "
        "is taken, and the predictor is a new one",
    )
    predictor_width: int = Field(384, ge=8, description="width of the predictor")
    predictor_depth: int = Field(12, ge=1, description="blocks of the predictor (2.1 g and G: 24)")
    predictor_heads: int = Field(12, ge=1, description="attention heads of the predictor")
    dense: bool = Field(
        False,
        description="2.1's loss: all four levels of a vjepa21_* encoder, of the hidden tokens and of the context",
    )
    context_weight: float = Field(
        0.5, ge=0, description="weight of the context's part of the loss, with dense"
    )
    context_ramp_steps: tuple[int, int] | None = Field(
        None,
        description="optimizer steps between which that weight rises linearly from 0 (published: 15000 to 30000); None "
        "is constant (cool-down)",
    )
    context_near_first: bool = Field(
        True,
        description="weight the context's tokens by 1 / sqrt(distance to the nearest hidden token), in tokens",
    )

    alarm_std: float = Field(
        0.05,
        ge=0,
        le=1,
        description="standard deviation of layer-normed features below which the alarm sounds: collapse",
    )
    alarm_rank_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="the alarm sounds too when their effective rank falls below this share of its highest; 0 is off",
    )

    @model_validator(mode="after")
    def _ramp_rises(self) -> LatentConfig:
        ramp = self.context_ramp_steps
        if ramp is not None and not 0 <= ramp[0] < ramp[1]:
            raise ConfigError(
                "must ascend, from 0 or later",
                key="context_ramp_steps",
                value=list(ramp),
                hint="use [15000, 30000]",
            )
        return self
