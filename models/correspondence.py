"""The heads of 2D -> 3D supervision transfer. The paper's: do this clip and these frames show the same moment?

Paper: Diba et al., arXiv 1711.08200, section 3.2. The frozen 2D teacher's feature, averaged over the X frames, and
the 3D student's feature, 1024 each, are concatenated (2048) and classified: 512 -> 128 -> 2.

Not published, so chosen here and open to options: ReLU after 512 and 128, no dropout, a linear student projection
(the paper's "fc gives 1024-D"), and a trainable teacher projection only where the teacher's feature is not
1024 wide.

The other head predicts the teacher's features themselves, of one or several parts of the clip in order of time.

Shape letters: B clips, F frame sets, X frames per set, P pairs per clip, S parts of a clip, D width.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.layers import ReluLinear
from cliplift.models.protocol import ModelError, check_choices

Projection = Literal["auto", "linear", "none"]
MATCH, NO_MATCH = 1, 0  # which of the two logits says what


class CorrespondenceHead(nn.Module):
    """Matching logits for pairs of clip features and frame features.

    The first layer on a concatenation is the sum of one layer on each part, W [s; t] + b = W_s s + W_t t + b. So it
    runs once per clip and once per frame set, and the pairs (1 positive and k negatives per clip) only cost the
    gather and the two small layers after it.

    Args:
        student_dim: width of the clip features.
        teacher_dim: width of the frame features.
        embed_dim: width of both sides of the concatenation.
        hidden: widths of the two hidden layers.
        student_projection: "linear" (the paper's fc), "none", or "auto" (only where the width differs).
        teacher_projection: the same for the teacher's side.
        normalise: LayerNorm without weights on both sides before the concatenation, so that neither tower's scale
            decides; off in the paper.
        dropout: before the first, second and third layer; (0.65, 0.5, 0.35) is one public attempt's.

    Raises:
        ModelError: a width that does not fit "none", or a dropout outside [0, 1).
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        embed_dim: int = 1024,
        hidden: tuple[int, int] = (512, 128),
        student_projection: Projection = "linear",
        teacher_projection: Projection = "auto",
        normalise: bool = False,
        dropout: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> None:
        super().__init__()
        if any(not 0 <= p < 1 for p in dropout):
            raise ModelError(f"correspondence head: dropout={dropout} must be three numbers in [0, 1)")
        self.student_projection = _projection("student", student_projection, student_dim, embed_dim)
        self.teacher_projection = _projection("teacher", teacher_projection, teacher_dim, embed_dim)
        self.normalise = normalise
        self.embed_dim = embed_dim
        # fc1 of the paper, in two parts; initialised as one layer of 2 * embed_dim inputs
        self.fc1_student = ReluLinear(embed_dim, hidden[0], parts=2)
        self.fc1_teacher = ReluLinear(embed_dim, hidden[0], bias=False, parts=2)
        self.fc2 = ReluLinear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], 2)
        self.dropout_input, self.dropout_1, self.dropout_2 = (nn.Dropout(p) for p in dropout)

    def forward(self, clip_features: Tensor, frame_features: Tensor) -> Tensor:
        """Row i of one beside row i of the other: (B, D_s), (B, D_t) or (B, X, D_t) -> logits (B, 2)."""
        if clip_features.shape[0] != frame_features.shape[0]:
            raise ModelError(
                f"clips and frame sets must match by row, got {clip_features.shape[0]} and {frame_features.shape[0]}"
            )
        return self._classify(self._student(clip_features) + self._teacher(frame_features))

    def pair_logits(self, clip_features: Tensor, frame_features: Tensor, frame_index: Tensor) -> Tensor:
        """Every clip beside P chosen frame sets.

        Args:
            clip_features: (B, D_s).
            frame_features: (F, D_t), or (F, X, D_t) to be averaged over the X frames.
            frame_index: (B, P) integers in [0, F); by convention column 0 is the clip's own.

        Returns:
            Logits (B, P, 2), as :meth:`forward` gives for each pair.
        """
        if frame_index.ndim != 2 or frame_index.shape[0] != clip_features.shape[0]:
            raise ModelError(
                f"frame_index must be (B, P) with B={clip_features.shape[0]}, got {tuple(frame_index.shape)}"
            )
        teacher = self._teacher(frame_features)[frame_index]
        return self._classify(self._student(clip_features).unsqueeze(1) + teacher)

    def score_matrix(self, clip_features: Tensor, frame_features: Tensor, *, chunk: int = 64) -> Tensor:
        """(B, D_s), (F, D_t) -> (B, F) match scores (log-odds) of every pair, ``chunk`` clips at a time."""
        teacher = self._teacher(frame_features).unsqueeze(0)
        rows = []
        for student in torch.split(self._student(clip_features), chunk):
            logits = self._classify(student.unsqueeze(1) + teacher)
            rows.append(logits[..., MATCH] - logits[..., NO_MATCH])
        return torch.cat(rows)

    def _student(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.fc1_student(self._side(self.student_projection(features))))

    def _teacher(self, features: Tensor) -> Tensor:
        if features.ndim == 3:
            features = features.mean(dim=1)
        return cast(Tensor, self.fc1_teacher(self._side(self.teacher_projection(features))))

    def _side(self, features: Tensor) -> Tensor:
        if self.normalise:
            features = F.layer_norm(features, features.shape[-1:])
        return cast(Tensor, self.dropout_input(features))

    def _classify(self, hidden: Tensor) -> Tensor:
        x = self.dropout_1(F.relu(hidden))
        x = self.dropout_2(F.relu(self.fc2(x)))
        return cast(Tensor, self.fc3(x))


class FeaturePredictor(nn.Module):
    """The teacher's features of S parts of a clip, predicted from the student's.

    One linear layer: the student is to hold what the teacher knows, not a deep head that is thrown away.

    Args:
        student_dim: width D of the student's features.
        teacher_dim: width D_t of the teacher's.
        steps: S, parts of the clip in order of time.
        from_map: predict each part from the student's map at that time. Otherwise all parts are predicted from the
            clip's one feature, which must then hold what is seen when.
    """

    def __init__(self, student_dim: int, teacher_dim: int, *, steps: int, from_map: bool) -> None:
        super().__init__()
        self.steps, self.from_map = steps, from_map
        self.output = nn.Linear(student_dim, teacher_dim * (1 if from_map else steps))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D), or a map (B, D, T', H', W') with T' a multiple of S -> (B, S, D_t)."""
        if not self.from_map:
            return torch.unflatten(self.output(features), 1, (self.steps, -1))
        over_time = features.flatten(3).mean(dim=3)  # (B, D, T')
        parts = torch.unflatten(over_time, 2, (self.steps, -1)).mean(dim=3)
        return cast(Tensor, self.output(parts.transpose(1, 2)))


def _projection(side: str, kind: Projection, in_dim: int, out_dim: int) -> nn.Module:
    check_choices(Projection, **{f"{side}_projection": kind})
    if kind == "none" and in_dim != out_dim:
        raise ModelError(f"{side}_projection='none' needs {out_dim} features, this {side} has {in_dim}")
    if kind == "none" or (kind == "auto" and in_dim == out_dim):
        return nn.Identity()
    return nn.Linear(in_dim, out_dim)
