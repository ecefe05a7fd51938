"""Has the encoder collapsed? What features say of that, and an alarm.

A net that predicts its own features can lower its loss by giving every clip the same ones. Two numbers see it:

* ``feature_std``: standard deviation over rows, averaged over values. Rows are layer-normed, so that one row's own
  values have a variance of 1: near 1 where rows have nothing in common, 0 where all are equal. The same as the standard
  deviation of vectors of unit length times the root of their width, which SimSiam watches (arXiv 2011.10566, 4.1).
* ``effective_rank``: of the centred rows, exp(entropy of their singular values' shares): RankMe (2210.02885) after Roy
  and Vetterli. 1 where all differences point the same way; at most the smaller of rows less one and width.

While training, where no singular value may make the host wait, :func:`participation_ratio` stands for the latter:
(sum of eigenvalues of the covariance)^2 over the sum of their squares.

Shape letters: R rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

SAMPLED = 64  # tokens of a clip that are looked at while training
WHAT_TO_DO = (
    "go back to a checkpoint from before, raise latent.teacher_momentum, lower optim.lr or lengthen "
    "schedule.warmup_share; more clips or stronger augmentation also help"
)


def feature_std(rows: Tensor) -> Tensor:
    """(R, D) -> (): the standard deviation over rows, averaged over values."""
    return rows.std(dim=0, unbiased=False).mean()


def participation_ratio(rows: Tensor) -> Tensor:
    """(R, D) -> (): in how many directions the rows vary, from sums alone; 0 where they do not vary.

    With the covariance C: trace(C)^2 / trace(C^2). C itself, D x D, is made where that is smaller than R x R.
    """
    centred = rows - rows.mean(dim=0)
    products = centred.T @ centred if rows.shape[1] < rows.shape[0] else centred @ centred.T
    return products.trace().square() / products.square().sum().clamp_min(torch.finfo(rows.dtype).tiny)


def effective_rank(rows: Tensor) -> float:
    """(R, D) in fp64 on the host -> exp of the entropy of the singular values' shares; 0 where rows do not vary."""
    values = torch.linalg.svdvals(rows - rows.mean(dim=0))
    total = float(values.sum())
    if total <= 1e-9 * max(float(rows.abs().max()), 1e-300) * rows.numel() ** 0.5:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def sampled_tokens(features: Tensor) -> Tensor:
    """Evenly spread tokens of each clip, side by side: (B, N, D) -> (R, D), at most 64 of each."""
    step = max(1, features.shape[1] // SAMPLED)
    return features[:, ::step].flatten(0, 1)


@dataclass
class CollapseAlarm:
    """Speaks when features begin to look collapsed, and is then silent until they do not.

    Args:
        std: ``feature_std`` below this is a collapse.
        rank_share: so is an ``effective_rank`` below this share of the highest so far, or a ``participation_ratio``
            below this share of its highest: partial collapse. A resumed run begins to watch anew.
    """

    std: float
    rank_share: float
    _highest: dict[str, float] = field(default_factory=dict)
    _sounding: set[str] = field(default_factory=set)

    def look(self, numbers: Mapping[str, float | None]) -> str | None:
        """What there is to say of logged numbers, named ``train/...`` or ``eval/...``; None for nothing new."""
        wrong = [reason for reason in map(self._wrong, numbers, numbers.values()) if reason is not None]
        return f"the features may have collapsed: {'; '.join(wrong)}. {WHAT_TO_DO}" if wrong else None

    def _wrong(self, name: str, value: float | None) -> str | None:
        kind = name.rpartition("/")[2]
        if value is None or kind not in ("feature_std", "effective_rank", "participation_ratio"):
            return None
        if kind == "feature_std":
            reason, bad = f"below {self.std:g}", not value >= self.std
        else:
            highest = self._highest[name] = max(self._highest.get(name, 0.0), value)
            reason, bad = f"{highest:.4g} before", not value >= self.rank_share * highest
        began = bad and name not in self._sounding
        (self._sounding.add if bad else self._sounding.discard)(name)
        return f"{name} is {value:.4g}, {reason}" if began else None
