"""Objectives whose target are the teacher's features themselves, standardised: regression, and telling a clip from all
others by a bank.

The teacher is frozen, so what it says of every clip of the data is known before training: a clip can be told from all
of them (InfoNCE with N - 1 negatives, N clips of the data) at the price of a product with a matrix of N rows. No
rank needs another's clips: each loss is a function of its clip, the kept features and (seed, step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cliplift.configs.supervision import CorrespondenceConfig
from cliplift.models.correspondence import FeaturePredictor
from cliplift.models.protocol import VideoNetwork
from cliplift.pipelines.engine.task import OF_CLIP
from cliplift.pipelines.stages.starting_weights import KeepsBatchNorm
from cliplift.pipelines.stages.teacher import ROWS_AT_ONCE, unit_parts


class FeatureTransfer(KeepsBatchNorm):
    """Student and predictor of the teacher's features: what is trained.

    ``forward(inputs)`` takes clips (B, C, T, H, W) and their standardised features ``targets`` (B, S, D); for the
    bank also the bank (N, S D), the clips' rows ``own`` in it (B,), ``clip_videos`` (B,), ``bank_videos`` (N,) and
    ``orders`` (K, S), the orders of parts that are negatives. Returns the loss and metrics of the batch, and the losses
    (B,) of its clips, whose mean over a global batch does not depend on how that is divided.
    """

    def __init__(
        self,
        student: VideoNetwork,
        predictor: FeaturePredictor,
        config: CorrespondenceConfig,
        *,
        widths: Sequence[int],
    ) -> None:
        """``widths`` are those of the teachers' features, which stand side by side in D and count the same."""
        super().__init__()
        self.student, self.predictor, self.config = student, predictor, config
        self.widths = tuple(widths)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        predicted = self.predict(inputs["clips"]).float()
        targets = inputs["targets"].float()
        pairs = list(zip(self._by_teacher(predicted), self._by_teacher(targets), strict=True))
        cosines = [F.cosine_similarity(guess, right, dim=-1) for guess, right in pairs]
        cosine = torch.stack(cosines).mean(dim=(0, 2))  # (B,)
        found = {"feature_cosine": cosine.detach().mean()}
        if self.config.objective == "bank":
            losses, right = self._from_bank(predicted, targets, inputs)
            found["matching_accuracy"] = right.float().mean()
        elif self.config.regression_loss == "cosine":
            losses = 1 - cosine
        else:
            apart = [F.smooth_l1_loss(*pair, reduction="none").mean(dim=(1, 2)) for pair in pairs]
            losses = torch.stack(apart).mean(dim=0)
        return found | {"loss": losses.mean(), f"loss{OF_CLIP}": losses.detach()}

    def predict(self, clips: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the teacher's standardised features (B, S, D), as the student guesses them."""
        seen = self.student.forward_features(clips) if self.predictor.from_map else self.student(clips)
        predicted: Tensor = self.predictor(seen)
        return predicted

    def _by_teacher(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, S, D) -> each teacher's part of the width."""
        return torch.split(features, list(self.widths), dim=-1)

    def clip_rows(self, clips: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, S D), what :meth:`scores` compares clips by."""
        return unit_parts(self.predict(clips).float(), self.widths)

    def scores(self, clips: Tensor, frames: Tensor) -> Tensor:
        """Rows (N, S D) of clips and of frames' standardised features -> (N, N), above 0 means "belongs"."""
        similarity = clips @ self._frame_rows(frames).T
        # There is no threshold: centred on the mean over all pairs.
        return similarity - similarity.mean()

    def mean_cosine(self, clips: Tensor, frames: Tensor) -> float:
        """Of the guesses for N clips with what the teacher says of them; rows as in :meth:`scores`."""
        return float((clips * self._frame_rows(frames)).sum(dim=1).mean())

    def _frame_rows(self, frames: Tensor) -> Tensor:
        return unit_parts(torch.unflatten(frames, 1, (self.predictor.steps, -1)), self.widths)

    def _from_bank(
        self, predicted: Tensor, targets: Tensor, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The clips' losses (B,), and whether each is nearest to its own features, bool (B,)."""
        with torch.autocast(predicted.device.type, enabled=False):
            queries, own = (unit_parts(x, self.widths) for x in (predicted, targets))
            temperature = self.config.temperature
            positive = (queries * own).sum(dim=1) / temperature
            negatives, highest = against_bank(
                queries,
                inputs["bank"],
                own=inputs["own"],
                clip_videos=inputs["clip_videos"],
                bank_videos=inputs["bank_videos"],
                same_video=self.config.same_video_negatives > 0,
                temperature=temperature,
            )
            parts = torch.unflatten(own, 1, (self.predictor.steps, -1))
            reordered = parts[:, inputs["orders"]].flatten(2)  # (B, K, S D)
            hard = torch.einsum("be,bke->bk", queries, reordered) / temperature
            all_of_them = torch.cat([positive[:, None], negatives[:, None], hard], dim=1)
            losses = all_of_them.logsumexp(dim=1) - positive
            highest = torch.cat([highest[:, None], hard.detach()], dim=1).amax(dim=1)
            return losses, positive.detach() > highest


def against_bank(
    queries: Tensor,
    bank: Tensor,
    *,
    own: Tensor,
    clip_videos: Tensor,
    bank_videos: Tensor,
    same_video: bool,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """log of the summed exp(similarity / temperature) with every row that is a negative, and the highest of them.

    A clip's own row is none; other rows of its video are where ``same_video`` says so. The bank is passed over once a
    step, a fixed number of rows at a time, and the gradient is found on the way: memory does not grow with N.

    Args:
        queries: (B, E) unit rows.
        bank: (N, E) unit rows, fp16.
        own: int64 (B,) row of each clip.
        clip_videos, bank_videos: int64 (B,) and (N,), equal for clips of one video.

    Returns:
        (B,) with gradient, and (B,) without.
    """

    def excluded(start: int, stop: int) -> Tensor:
        """bool (B, rows), the rows [start, stop) of the bank that are no negatives of a clip."""
        number = torch.arange(start, stop, device=queries.device)
        none = number[None, :] == own[:, None]
        return none if same_video else none | (bank_videos[None, start:stop] == clip_videos[:, None])

    found: tuple[Tensor, Tensor] = _AgainstBank.apply(queries, bank, excluded, temperature)  # type: ignore[no-untyped-call]
    return found


class _AgainstBank(torch.autograd.Function):
    """The running softmax of Milakov and Gimelshein (arXiv 1805.02867), with the mean row it weighs."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, bank: Tensor, excluded: Callable[[int, int], Tensor], temperature: float
    ) -> tuple[Tensor, Tensor]:
        B = len(queries)
        highest = queries.new_full((B,), -math.inf)
        total, mean_row = queries.new_zeros(B), torch.zeros_like(queries)
        for start in range(0, len(bank), ROWS_AT_ONCE):
            rows = bank[start : start + ROWS_AT_ONCE].to(queries.dtype)
            logits = queries @ rows.T / temperature
            logits = logits.masked_fill_(excluded(start, start + len(rows)), -math.inf)
            higher = torch.maximum(highest, logits.amax(dim=1))
            shift = higher.masked_fill(higher.isinf(), 0.0)  # nothing but excluded rows so far
            weights, fade = (logits - shift[:, None]).exp(), (highest - shift).exp()
            total = total * fade + weights.sum(dim=1)
            mean_row = mean_row * fade[:, None] + weights @ rows
            highest = higher
        ctx.save_for_backward(
            mean_row / (total[:, None].clamp_min(torch.finfo(total.dtype).tiny) * temperature)
        )
        ctx.mark_non_differentiable(highest)
        return highest.masked_fill(highest.isinf(), 0.0) + total.log(), highest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (by_query,) = ctx.saved_tensors
        return gradient[:, None] * by_query, None, None, None


def other_orders(steps: int, count: int, *, seed: int, step: int) -> Tensor:
    """``count`` different orders of ``steps`` parts, none of them the right one, backwards first: int64 (count, steps).

    The others are drawn; a function of (seed, step), the same on every rank. There are ``steps``! - 1 of them.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    right = tuple(range(steps))
    chosen: dict[tuple[int, ...], None] = {}
    if count:
        chosen[right[::-1]] = None
    while len(chosen) < count:
        drawn = tuple(torch.randperm(steps, generator=generator).tolist())
        if drawn != right:
            chosen[drawn] = None
    return torch.tensor(list(chosen), dtype=torch.int64).reshape(count, steps)
