"""Scores of clips whose content is known: how far they move, how bright, sharp and bordered they are, their cuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from cliplift.sharding.scores.measures import SCORES, Seen, score_clip
from cliplift.sharding.scores.pictures import Picture, decode_pictures
from cliplift.sharding.scores.stored import SCORE_NAMES
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames, open_container

Stored = Callable[[Sequence[NDArray[np.uint8]]], bytes]


def seen(*lumas: NDArray[np.uint8], gap: int = 1, full_range: bool = False) -> Seen:
    run = tuple(Picture(number * gap, luma, full_range) for number, luma in enumerate(lumas))
    return Seen((run,))


def moving(textured: NDArray[np.float64], frames: int, pixels: float) -> list[NDArray[np.uint8]]:
    """A window of 128 pixels that moves over the texture."""
    columns = np.arange(128)
    return [
        np.stack([np.interp(columns + t * pixels, np.arange(400), row) for row in textured])
        .round()
        .astype(np.uint8)
        for t in range(frames)
    ]


def test_names_are_those_that_readers_know() -> None:
    assert (*SCORES, "duplicate", "cluster", "near_duplicate") == SCORE_NAMES
    assert all(score.meaning.endswith(".") for score in SCORES.values())


@pytest.mark.parametrize("pixels", [0.5, 1.0, 2.0])
def test_motion_is_the_displacement_in_shares_of_height_plus_width(
    textured: NDArray[np.float64], pixels: float
) -> None:
    pictures = moving(textured, 2, pixels)
    # The direction of the gradient is random, and the estimate takes its mean: 30 % for a texture of few features.
    assert SCORES["motion"].measure(seen(*pictures)) == pytest.approx(pixels / (96 + 128), rel=0.3)
    over_two = SCORES["motion"].measure(seen(*pictures, gap=2))
    assert over_two == pytest.approx(SCORES["motion"].measure(seen(*pictures)) / 2), "motion is of one frame"


def test_noise_of_coding_and_flat_pictures_do_not_move(textured: NDArray[np.float64]) -> None:
    still = textured[:, :128].round().astype(np.uint8)
    draw = np.random.default_rng(1)
    noisy = np.clip(still + draw.choice([-1, 0, 1], size=still.shape), 0, 255).astype(np.uint8)
    flat = np.full_like(still, 90)
    for first, second in ((still, still), (flat, flat), (flat, flat + 9), (still, still + 9)):
        assert SCORES["motion"].measure(seen(first, second)) == 0
    assert SCORES["motion"].measure(seen(still)) == 0, "one picture does not move"
    large_still, large_noisy = np.tile(still, (3, 2)), np.tile(noisy, (3, 2))  # averaged over 4 x 4 pixels
    assert SCORES["motion"].measure(seen(large_still, large_noisy)) < 0.00098


def test_patch_motion_is_that_of_the_region_that_moves_least(textured: NDArray[np.float64]) -> None:
    pictures = [np.tile(picture, (2, 2)) for picture in moving(textured, 2, 2.0)]
    whole = seen(*pictures)
    inset = [pictures[0].copy(), pictures[0].copy()]
    inset[1][64:128, 64:192] = pictures[1][64:128, 64:192]
    assert SCORES["patch_motion"].measure(whole) > 0.2 * SCORES["motion"].measure(whole)
    assert SCORES["patch_motion"].measure(seen(*inset)) == 0
    assert SCORES["motion"].measure(seen(*inset)) > 0


def test_brightness_is_the_share_of_white_in_either_range() -> None:
    for level, full, expected in ((16, False, 0.0), (235, False, 1.0), (0, True, 0.0), (51, True, 0.2)):
        picture = np.full((40, 60), level, dtype=np.uint8)
        assert SCORES["brightness"].measure(seen(picture, full_range=full)) == pytest.approx(expected)


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    luma = np.random.default_rng(0).integers(0, 256, size=(20, 30)).astype(np.uint8)
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    answers = [
        float((luma[r : r + 3, c : c + 3].astype(float) * kernel).sum()) for r in range(18) for c in range(28)
    ]
    assert SCORES["sharpness"].measure(seen(luma)) == pytest.approx(np.var(answers))


def test_borders_are_the_dark_rows_and_columns_of_every_picture(textured: NDArray[np.float64]) -> None:
    boxed = np.full((96, 128), 17, dtype=np.uint8)
    boxed[12:84, 16:128] = textured[12:84, 16:128]
    assert SCORES["borders"].measure(seen(boxed)) == pytest.approx(1 - 72 * 112 / (96 * 128))
    dark = np.full((96, 128), 16, dtype=np.uint8)
    assert SCORES["borders"].measure(seen(dark)) == 1
    assert SCORES["borders"].measure(seen(textured[:, :128].astype(np.uint8))) == 0
    # What is dark in one picture alone, such as a fade, is no border.
    assert SCORES["borders"].measure(seen(dark, dark, textured[:, :128].astype(np.uint8))) == 0
    titled = boxed.copy()
    titled[4:8, 30:60] = 235  # subtitles in the bar
    assert SCORES["borders"].measure(seen(titled)) < SCORES["borders"].measure(seen(boxed))


def test_sampled_pictures_are_those_of_a_decode_of_everything(
    textured: NDArray[np.float64], stored_clip: Stored
) -> None:
    for frames in (1, 5, 40, 150):
        data = stored_clip(moving(textured, frames, 1.5))
        shown: list[Picture] = []
        sampled, again = decode_pictures(data), decode_pictures(data, every=shown.append)
        assert [p.number for p in shown] == list(range(frames))
        for one, other in zip(sampled, again, strict=True):
            assert [p.number for p in one] == [p.number for p in other]
            assert all(np.array_equal(p.luma, shown[p.number].luma) for p in one)
        numbers = [p.number for run in sampled for p in run]
        assert len(set(numbers)) == len(numbers) == min(frames, {1: 1, 5: 5, 16: 16, 40: 15, 150: 16}[frames])
        groups = -(-frames // 16)
        assert [run[0].number % 16 for run in sampled] == [0] * min(8, groups), (
            "a run begins with a key frame"
        )
        gray = decode_frames(data, numbers, decoder="pyav").mean(axis=-1)
        stored = np.stack([p.luma for run in sampled for p in run])
        assert np.abs((stored - 16.0) / 219 - gray / 255).max() < 0.01, "without colour, RGB is luma"


def test_a_clip_with_open_groups_gives_the_same_pictures(
    textured: NDArray[np.float64], stored_clip: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first packets of a group give other pictures than they should, all are decoded."""
    data = stored_clip(moving(textured, 40, 1.5))
    expected = decode_pictures(data)
    from cliplift.sharding.scores import pictures

    monkeypatch.setattr(pictures, "_decoded", lambda packets: iter(()))
    found = decode_pictures(data)
    assert [[p.number for p in run] for run in found] == [[p.number for p in run] for run in expected]
    assert all(
        np.array_equal(a.luma, b.luma)
        for x, y in zip(found, expected, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_shots_are_counted_at_the_cuts(textured: NDArray[np.float64], stored_clip: Stored) -> None:
    one, other = moving(textured, 20, 2.0), [255 - p for p in moving(textured, 20, 2.0)]
    assert score_clip(stored_clip(one), ["shots"]) == {"shots": 1.0}
    assert score_clip(stored_clip([*one, *other, *one[:10]]), ["shots"]) == {"shots": 3.0}


def test_a_score_does_not_depend_on_what_else_is_asked_for(
    textured: NDArray[np.float64], stored_clip: Stored
) -> None:
    data = stored_clip(moving(textured, 40, 1.0))
    together = score_clip(data, list(SCORES))
    assert together == {name: score_clip(data, [name])[name] for name in SCORES}
    assert 0.5 / 224 < together["motion"] < 1.5 / 224


def test_what_does_not_decode_has_no_scores(textured: NDArray[np.float64], stored_clip: Stored) -> None:
    data = stored_clip(moving(textured, 20, 1.0))
    for damaged in (b"", b"no video", data[:300], data[: len(data) // 3]):
        with pytest.raises(VideoDecodeError):
            score_clip(damaged, ["motion"])
    with open_container(data) as container:
        assert container.streams.video[0].frames == 20
