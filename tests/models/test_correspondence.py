"""The matching head: its formula on an explicit concatenation, all pairings of one pass, and that it can learn."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cliplift.models import ModelError
from cliplift.models.correspondence import MATCH, NO_MATCH, CorrespondenceHead


def reference_logits(head: CorrespondenceHead, clip: Tensor, frames: Tensor) -> Tensor:
    """arXiv 1711.08200, section 3.2, for one pair: concatenate, then three layers."""
    both = torch.cat([head.student_projection(clip), head.teacher_projection(frames)])
    fc1 = torch.cat([head.fc1_student.weight, head.fc1_teacher.weight], dim=1)
    hidden = (fc1 @ both + head.fc1_student.bias).clamp(min=0)
    hidden = (head.fc2.weight @ hidden + head.fc2.bias).clamp(min=0)
    return head.fc3.weight @ hidden + head.fc3.bias


def test_sizes_are_the_papers() -> None:
    head = CorrespondenceHead(896, 1024)
    assert head.fc1_student.in_features + head.fc1_teacher.in_features == 2048
    assert (head.fc1_student.out_features, head.fc2.out_features, head.fc3.out_features) == (512, 128, 2)
    assert isinstance(head.student_projection, torch.nn.Linear), "the student's fc to 1024"
    assert isinstance(head.teacher_projection, torch.nn.Identity), "a teacher of 1024 needs no projection"
    assert isinstance(CorrespondenceHead(896, 1664).teacher_projection, torch.nn.Linear)
    fc1 = torch.cat([head.fc1_student.weight, head.fc1_teacher.weight], dim=1)
    assert fc1.std().item() == pytest.approx((2 / 2048) ** 0.5, rel=0.02), "Kaiming for 2048 inputs"


def test_all_pairings_are_the_concatenation() -> None:
    torch.manual_seed(0)
    head = CorrespondenceHead(6, 10, embed_dim=8, hidden=(16, 12)).double()
    clips, frames = torch.randn(3, 6).double(), torch.randn(5, 10).double()
    index = torch.tensor([[0, 1, 4], [1, 3, 3], [2, 0, 1]])
    expected = torch.stack(
        [torch.stack([reference_logits(head, clips[i], frames[j]) for j in index[i]]) for i in range(3)]
    )
    torch.testing.assert_close(head.pair_logits(clips, frames, index), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(head(clips, frames[:3]), expected[:, 0], rtol=1e-10, atol=1e-10)
    every = torch.arange(5).expand(3, 5)
    logits = head.pair_logits(clips, frames, every)
    scores = logits[..., MATCH] - logits[..., NO_MATCH]
    for chunk in (1, 2, 64):
        torch.testing.assert_close(head.score_matrix(clips, frames, chunk=chunk), scores)


def test_the_frames_of_a_clip_are_averaged() -> None:
    torch.manual_seed(0)
    head = CorrespondenceHead(6, 10, embed_dim=8)
    clips, frames = torch.randn(3, 6), torch.randn(3, 32, 10)
    torch.testing.assert_close(head(clips, frames), head(clips, frames.mean(1)))


def test_normalised_features_do_not_depend_on_a_towers_scale() -> None:
    torch.manual_seed(0)
    head = CorrespondenceHead(8, 8, embed_dim=8, student_projection="none", normalise=True)
    clips, frames = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(head(clips * 50, frames), head(clips, frames), rtol=1e-3, atol=1e-4)
    plain = CorrespondenceHead(8, 8, embed_dim=8, student_projection="none")
    assert not torch.allclose(plain(clips * 50, frames), plain(clips, frames), atol=0.1)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    head = CorrespondenceHead(8, 8, embed_dim=8, dropout=(0.65, 0.5, 0.35))
    clips, frames = torch.randn(3, 8), torch.randn(3, 8)
    assert not torch.equal(head.train()(clips, frames), head(clips, frames))
    assert torch.equal(head.eval()(clips, frames), head(clips, frames))


def test_it_learns_which_rows_belong_together() -> None:
    """Features that share a hidden code; negatives are the next row's. Chance is 50 %, loss 0.693."""
    torch.manual_seed(0)
    code = torch.randn(64, 4)
    clips = code @ torch.randn(4, 24)
    frames = code @ torch.randn(4, 32)
    head = CorrespondenceHead(24, 32, embed_dim=32)
    index = torch.stack([torch.arange(64), torch.arange(64).roll(-1)], 1)
    labels = torch.tensor([MATCH, NO_MATCH]).expand(64, 2)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    losses = []
    for _ in range(80):
        loss = F.cross_entropy(head.pair_logits(clips, frames, index).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert losses[-1] < 0.1
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_widths_and_pairings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ModelError, match="student_projection='none' needs 1024 features, this student has 896"
    ):
        CorrespondenceHead(896, 1024, student_projection="none")
    with pytest.raises(ModelError, match="teacher_projection='mlp'"):
        CorrespondenceHead(896, 1024, teacher_projection="mlp")
    with pytest.raises(ModelError, match="dropout"):
        CorrespondenceHead(8, 8, dropout=(0.0, 1.0, 0.0))
    head = CorrespondenceHead(8, 8, embed_dim=8)
    with pytest.raises(ModelError, match="match by row, got 3 and 4"):
        head(torch.randn(3, 8), torch.randn(4, 8))
    with pytest.raises(ModelError, match=r"\(B, P\) with B=3"):
        head.pair_logits(torch.randn(3, 8), torch.randn(4, 8), torch.zeros(3, dtype=torch.long))
