"""Objectives on the teacher's features: losses and gradients against the plain formula, and what they may depend on."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.configs.supervision import CorrespondenceConfig
from cliplift.models import create_model
from cliplift.models.correspondence import FeaturePredictor
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.stages import feature_targets
from cliplift.pipelines.stages.feature_targets import FeatureTransfer, against_bank, other_orders
from cliplift.pipelines.stages.teacher import Standardisation, bank_of, cosines, ridge, unit_parts

ONE = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


class Numbers(nn.Module):
    """A student whose feature is its input's mean over time and space, and whose map is the input."""

    def forward_features(self, clips: Tensor) -> Tensor:
        return clips

    def forward(self, clips: Tensor) -> Tensor:
        return clips.flatten(2).mean(dim=2)


def module(*, steps: int = 1, from_map: bool = False, **options: object) -> FeatureTransfer:
    torch.manual_seed(0)
    config = CorrespondenceConfig.model_validate(
        {"time_steps": steps, "predict_from": "map" if from_map else "features", **options}
    )
    predictor = FeaturePredictor(5, 7, steps=steps, from_map=from_map)
    return FeatureTransfer(Numbers(), predictor, config, widths=[7]).double()  # type: ignore[arg-type]


def clips_and_targets(*, steps: int, clips: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(clips, 5, 4, 2, 2, generator=generator, dtype=torch.float64),
        torch.randn(clips, steps, 7, generator=generator, dtype=torch.float64),
    )


def test_each_part_is_predicted_from_the_map_at_its_time() -> None:
    """With two parts of four times, part 1 is a linear map of the mean over times 2 and 3, written out."""
    net = module(steps=2, from_map=True, objective="regression")
    clips, _ = clips_and_targets(steps=2)
    weight, bias = net.predictor.output.weight, net.predictor.output.bias
    for part, times in ((0, (0, 1)), (1, (2, 3))):
        seen = sum(clips[:, :, t].mean(dim=(2, 3)) for t in times) / 2
        torch.testing.assert_close(net.predict(clips)[:, part], seen @ weight.T + bias)


def test_from_the_feature_every_part_has_weights_of_its_own() -> None:
    net = module(steps=2, objective="regression")
    clips, _ = clips_and_targets(steps=2)
    both = clips.mean(dim=(2, 3, 4)) @ net.predictor.output.weight.T + net.predictor.output.bias
    torch.testing.assert_close(net.predict(clips), torch.stack([both[:, :7], both[:, 7:]], dim=1))


@pytest.mark.parametrize("loss", ["cosine", "smooth_l1"])
def test_regression_as_written_out(loss: str) -> None:
    net = module(steps=2, objective="regression", regression_loss=loss)
    clips, targets = clips_and_targets(steps=2)
    found = net({"clips": clips, "targets": targets})
    guessed, wanted = net.predict(clips).flatten(0, 1).tolist(), targets.flatten(0, 1).tolist()
    losses = []
    for guess, want in zip(guessed, wanted, strict=True):
        if loss == "cosine":
            product = sum(g * w for g, w in zip(guess, want, strict=True))
            losses.append(1 - product / math.hypot(*guess) / math.hypot(*want))
        else:
            apart = [abs(g - w) for g, w in zip(guess, want, strict=True)]
            losses.append(sum(0.5 * d * d if d < 1 else d - 0.5 for d in apart) / 7)
    assert found["loss"].item() == pytest.approx(sum(losses) / len(losses), abs=1e-6)  # computed in fp32


def _after_clips() -> torch.Generator:
    """What the bank's rows are drawn from."""
    return torch.Generator().manual_seed(2)


def bank_inputs(*, steps: int, orders: int = 0, rows: int = 30) -> dict[str, Tensor]:
    clips, _ = clips_and_targets(steps=steps)
    standardised = torch.randn(rows, steps, 7, generator=_after_clips())
    own = torch.tensor([3, 0, 29, 11, 12, 4])
    videos = torch.arange(rows) // 3
    return {
        "clips": clips,
        "targets": standardised[own],
        "bank": unit_parts(standardised, [7]).half(),
        "bank_videos": videos,
        "own": own,
        "clip_videos": videos[own],
        "orders": other_orders(steps, orders, seed=0, step=5),
    }


@pytest.mark.parametrize(("steps", "orders", "same_video"), [(1, 0, 0), (2, 1, 0), (3, 4, 1)])
def test_the_bank_is_infonce_over_all_clips(
    steps: int, orders: int, same_video: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, accuracy and gradient against a softmax over every row at once; the bank is read seven rows at a time."""
    monkeypatch.setattr(feature_targets, "ROWS_AT_ONCE", 7)
    net = module(
        steps=steps,
        objective="bank",
        temperature=0.2,
        order_negatives=orders,
        same_video_negatives=same_video,
    ).float()
    inputs = bank_inputs(steps=steps, orders=orders)
    inputs["clips"] = inputs["clips"].float()
    found = net(inputs)
    found["loss"].backward()
    gradient = net.predictor.output.weight.grad.clone()
    net.zero_grad()

    guessed = F.normalize(net.predict(inputs["clips"]), dim=-1)
    losses, right = [], 0
    for i, own in enumerate(inputs["own"].tolist()):
        parts = F.normalize(inputs["targets"][i], dim=-1)
        positive = (guessed[i] * parts).sum(dim=-1).mean() / 0.2
        kept = [row for row in range(30) if row != own and (same_video or row // 3 != own // 3)]
        rows = inputs["bank"][kept].float().reshape(len(kept), steps, 7) * steps**0.5  # parts of length 1
        scores = [(guessed[i] * row).sum(dim=-1).mean() / 0.2 for row in rows]
        scores += [(guessed[i] * parts[order]).sum(dim=-1).mean() / 0.2 for order in inputs["orders"]]
        losses.append(torch.stack([positive, *scores]).logsumexp(dim=0) - positive)
        right += bool(positive > max(scores))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    assert found["matching_accuracy"].item() == pytest.approx(right / 6)
    torch.testing.assert_close(gradient, net.predictor.output.weight.grad, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_the_bank_is_the_derivative() -> None:
    inputs = bank_inputs(steps=1)
    queries = F.normalize(torch.randn(6, 7, dtype=torch.float64), dim=1).requires_grad_()

    def negatives(rows: Tensor) -> Tensor:
        return against_bank(
            rows, inputs["bank"], own=inputs["own"], clip_videos=inputs["clip_videos"],
            bank_videos=inputs["bank_videos"], same_video=False, temperature=0.3,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(negatives, (queries,))


def test_a_clip_without_a_negative_has_no_loss_and_no_gradient() -> None:
    """One video alone: nothing is to be told apart, and nothing becomes NaN."""
    net = module(steps=1, objective="bank").float()
    inputs = bank_inputs(steps=1)
    inputs["clips"] = inputs["clips"].float()
    inputs["bank_videos"] = torch.zeros(30, dtype=torch.int64)
    inputs["clip_videos"] = torch.zeros(6, dtype=torch.int64)
    loss = net(inputs)["loss"]
    loss.backward()
    assert loss.item() == 0
    assert net.predictor.output.weight.grad.abs().max() < 1e-6


@pytest.mark.parametrize("objective", ["bank", "regression"])
def test_a_clips_loss_does_not_depend_on_the_rank_it_is_on(objective: str) -> None:
    """The mean over two ranks, or over two micro-batches, is the loss of the whole batch: to the last bit of fp64."""
    net = module(steps=2, objective=objective, order_negatives=1 if objective == "bank" else 0)
    inputs = bank_inputs(steps=2, orders=1)
    whole = net(inputs)["loss"]
    by_clip = {"clips", "targets", "own", "clip_videos"}
    parts = [
        net({name: x[half] if name in by_clip else x for name, x in inputs.items()})["loss"]
        for half in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole, rtol=1e-6, atol=1e-7)


def test_other_orders_are_different_and_wrong() -> None:
    every = {tuple(order) for order in itertools.permutations(range(3))} - {(0, 1, 2)}
    assert {tuple(o) for o in other_orders(3, 5, seed=1, step=0).tolist()} == every
    first, *_ = other_orders(4, 6, seed=1, step=0).tolist()
    assert first == [3, 2, 1, 0], "backwards first"
    assert not torch.equal(other_orders(6, 4, seed=1, step=0), other_orders(6, 4, seed=1, step=1))
    assert torch.equal(other_orders(6, 4, seed=1, step=3), other_orders(6, 4, seed=1, step=3))
    assert other_orders(1, 0, seed=0, step=0).shape == (0, 1)


def test_standardised_features_have_mean_0_and_deviation_1(tmp_path: Path) -> None:
    """Against numpy-like formulas in double precision; a channel that is constant stays 0 instead of becoming noise."""
    table = (torch.randn(500, 2 * 7, generator=torch.Generator().manual_seed(0)) * 3 + 5).half()
    table.view(500, 2, 7)[:, :, 4] = 2.5
    standard = Standardisation.of(table, steps=2, folder=tmp_path, identity="a", topology=ONE)
    rows = standard(table, steps=2).double()
    live = [0, 1, 2, 3, 5, 6]
    assert rows.mean(dim=(0, 1)).abs().max() < 1e-6
    assert (rows[..., live].square().mean(dim=(0, 1)) - 1).abs().max() < 1e-5
    assert rows[..., 4].abs().max() == 0
    kept = Standardisation.of(torch.zeros(1, 14).half(), steps=2, folder=tmp_path, identity="a", topology=ONE)
    assert torch.equal(kept.mean, standard.mean), "a restart reads what was kept"
    bank = bank_of(table, standard, steps=2, widths=[7], folder=tmp_path, identity="a", topology=ONE)
    assert bank.dtype == torch.half
    lengths = bank.double().view(500, 2, 7).norm(dim=2)
    assert (lengths - 0.5**0.5).abs().max() < 1e-3
    other = Standardisation.of(table * 2, steps=2, folder=tmp_path, identity="b", topology=ONE)
    torch.testing.assert_close(other.mean, 2 * standard.mean, rtol=1e-3, atol=1e-3)


def test_cosines_over_time_as_written_out(tmp_path: Path) -> None:
    """Makhoul's DCT-II, orthonormal, term by term; each coefficient has a mean and deviation of its own."""
    steps = 4
    table = torch.randn(300, steps * 7, generator=torch.Generator().manual_seed(3)).half()
    parts = table.double().view(300, steps, 7)
    expected = torch.zeros_like(parts)
    for k, t in itertools.product(range(steps), range(steps)):
        scale = math.sqrt((1 if k == 0 else 2) / steps)
        expected[:, k] += scale * math.cos(math.pi * (2 * t + 1) * k / (2 * steps)) * parts[:, t]
    basis = cosines(steps)
    torch.testing.assert_close(basis @ basis.T, torch.eye(steps, dtype=torch.float64))
    standard = Standardisation.of(
        table, steps=steps, folder=tmp_path, identity="a", topology=ONE, basis=basis
    )
    rows = standard(table, steps=steps).double()
    spread = (expected - expected.mean(dim=0)) / expected.std(dim=0, unbiased=False)
    torch.testing.assert_close(rows, spread, atol=1e-5, rtol=1e-4)


def test_what_stays_the_same_has_no_coefficient_but_the_first() -> None:
    still = torch.ones(4, 1, dtype=torch.float64)
    torch.testing.assert_close(cosines(4) @ still, torch.tensor([[2.0], [0], [0], [0]], dtype=torch.float64))


@pytest.mark.parametrize("objective", ["regression", "bank"])
def test_the_loss_is_the_mean_of_the_clips_own(objective: str) -> None:
    """A clip's loss is that of the clip alone; the mean in double precision does not depend on the division."""
    net = module(steps=2, objective=objective, order_negatives=int(objective == "bank")).float()
    inputs = bank_inputs(steps=2, orders=1)
    inputs["clips"] = inputs["clips"].float()
    whole = net(inputs)
    assert whole["loss"].item() == pytest.approx(whole["loss_of_clip"].mean().item(), rel=1e-6)
    shared = {"bank", "bank_videos", "orders"}
    for i in range(6):
        one = {name: x if name in shared else x[i : i + 1] for name, x in inputs.items()}
        torch.testing.assert_close(net(one)["loss"], whole["loss_of_clip"][i])


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "regression"},
        {"objective": "regression", "regression_loss": "smooth_l1"},
        {"objective": "bank", "temperature": 1.0},
    ],
)
def test_two_teachers_count_the_same_whatever_their_widths(options: dict[str, object]) -> None:
    """Of 2 and 5 channels: the loss is the mean of both alone; for the bank, similarities are."""
    net = module(steps=2, **options).float()
    net.widths = (2, 5)
    inputs = bank_inputs(steps=2)
    inputs["clips"] = inputs["clips"].float()
    guessed = net.predict(inputs["clips"])
    split = [(guessed[..., a:b], inputs["targets"][..., a:b]) for a, b in ((0, 2), (2, 7))]
    if options["objective"] == "bank":
        standardised = torch.randn(30, 2, 7, generator=_after_clips())
        inputs["bank"] = unit_parts(standardised, (2, 5)).half()
        of_rows = [standardised[..., a:b] for a, b in ((0, 2), (2, 7))]
        similarity = sum(
            torch.einsum("bsd,nsd->bn", F.normalize(g, dim=-1), F.normalize(rows, dim=-1)) / 4
            for (g, _), rows in zip(split, of_rows, strict=True)
        )
        positive = sum(F.cosine_similarity(g, t, dim=-1).mean(dim=1) / 2 for g, t in split)
        other = inputs["bank_videos"][None] != inputs["clip_videos"][:, None]
        total = (similarity.exp() * other).sum(dim=1) + positive.exp()
        expected = (total.log() - positive).mean()
    elif options.get("regression_loss") == "smooth_l1":
        expected = sum(F.smooth_l1_loss(g, t) for g, t in split) / 2
    else:
        expected = 1 - sum(F.cosine_similarity(g, t, dim=-1).mean() for g, t in split) / 2
    torch.testing.assert_close(net(inputs)["loss"], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"objective": "bank", "order_negatives": 1}, {"objective": "regression"}],
    ids=["bank", "regression"],
)
def test_a_clips_loss_is_the_same_to_the_last_bit_whichever_clips_stand_beside_it(
    options: dict[str, object],
) -> None:
    """Eight clips in two passes of four: as one process takes them, and as two ranks do, every other clip each."""
    torch.manual_seed(0)
    student = create_model("video_vit_tiny_8", num_classes=0, in_frames=8)
    predictor = FeaturePredictor(student.feature_dim, 64, steps=4, from_map=False)
    config = CorrespondenceConfig.model_validate({"time_steps": 4, **options})
    net = FeatureTransfer(student, predictor, config, widths=(24, 40))
    clips, features, rows = torch.randn(8, 3, 8, 32, 32), torch.randn(20, 4, 64), torch.arange(20)
    shared = {
        "bank": unit_parts(features, (24, 40)).half(),
        "bank_videos": rows,
        "orders": other_orders(4, config.order_negatives, seed=0, step=0),
    }

    def losses(*passes: list[int]) -> Tensor:
        found = torch.zeros(8)
        for which in passes:
            own = torch.tensor(which)
            inputs = {"clips": clips[own], "targets": features[own], "own": own, "clip_videos": own, **shared}
            found[own] = net(inputs)["loss_of_clip"]
        return found

    one = losses([0, 1, 2, 3], [4, 5, 6, 7])
    assert torch.equal(one, losses([0, 2, 4, 6], [1, 3, 5, 7]))
    assert len(one.unique()) == 8


@pytest.mark.parametrize(("rows", "width"), [(40, 6), (5, 9)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_ridge_is_least_squares_with_rows_for_the_penalty(rows: int, width: int, scale: float) -> None:
    """numpy's lstsq on the centred rows, with one more row for each weight; with fewer rows than weights too.

    The penalty is in units of the features' variance, so features a hundred times larger give the same guesses.
    """
    rng = np.random.default_rng(0)
    x, t = rng.normal(3, 1, (rows, width)), rng.normal(-1, 2, (rows, 4))
    weight, bias = ridge(
        zip(torch.from_numpy(scale * x).split(7), torch.from_numpy(t).split(7), strict=True), penalty=0.3
    )
    centred, variance = x - x.mean(axis=0), x.var(axis=0).mean()
    stacked = np.concatenate([centred, np.sqrt(0.3 * variance * rows) * np.eye(width)])
    wanted = np.concatenate([t - t.mean(axis=0), np.zeros((width, 4))])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
    np.testing.assert_allclose(weight.numpy() * scale, expected.T, rtol=1e-8, atol=1e-10)
    guesses = scale * x @ weight.numpy().T + bias.numpy()
    np.testing.assert_allclose(guesses, centred @ expected + t.mean(axis=0), rtol=1e-8, atol=1e-9)


def test_ridge_on_features_that_say_nothing_predicts_the_mean() -> None:
    targets = torch.arange(6.0).view(3, 2)
    weight, bias = ridge([(torch.ones(3, 4), targets)], penalty=1.0)
    assert torch.equal(weight, torch.zeros(2, 4, dtype=torch.float64))
    torch.testing.assert_close(bias, targets.double().mean(dim=0))


def test_spread_is_the_mean_and_the_deviation_over_the_parts(tmp_path: Path) -> None:
    """Both of numpy, each channel of each standardised by itself."""
    table = torch.randn(6, 4 * 3, generator=torch.Generator().manual_seed(0)).half()
    standard = Standardisation.of(
        table, steps=4, folder=tmp_path, identity="spread", topology=ONE, spread=True
    )
    parts = table.double().numpy().reshape(6, 4, 3)
    both = np.stack([parts.mean(axis=1), parts.std(axis=1)], axis=1)
    expected = (both - both.mean(axis=0)) / both.std(axis=0)
    np.testing.assert_allclose(standard(table, steps=4).numpy(), expected, rtol=1e-4, atol=1e-5)
