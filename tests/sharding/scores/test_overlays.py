"""Overlaid text: drawn over real clips against the same clips without, and what is counted of simple pictures."""

from __future__ import annotations

import hashlib
import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.scores.measures import SCORES, Seen, score_clip
from cliplift.sharding.scores.pictures import Picture
from cliplift.sharding.video.encode import encode

# The thresholds of the score were chosen on the first forty of these clips, and on none of the others.
CHOSEN_ON, TESTED = 40, 30
STYLES = ("subtitle", "box", "logo", "slide", "outlined")
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "seven",
    "lazy",
    "wizards",
    "who",
    "vex",
    "my",
    "sphinx",
)

Planes = NDArray[np.uint8]  # (3 H / 2, W) luma, then both chroma planes


def drawn(
    style: str, *, width: int, height: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Levels and opacity (H, W) of a text, in sizes that broadcasters and slides have."""
    image = Image.new("LA", (width, height), (0, 0))
    draw, rng = ImageDraw.Draw(image), np.random.default_rng(seed)

    def line(words: int) -> str:
        return " ".join(rng.choice(WORDS, words))

    def font(share: float) -> ImageFont.FreeTypeFont:
        found = ImageFont.load_default(height * share)
        assert isinstance(found, ImageFont.FreeTypeFont)
        return found

    if style in ("subtitle", "outlined"):
        ink, edge = (255, 0) if style == "subtitle" else (0, 255)
        for row in (0.88, 0.955):
            draw.text(
                (width / 2, height * row), line(4), font=font(1 / 14), fill=(ink, 255), anchor="mm",
                stroke_width=max(1, height // 160), stroke_fill=(edge, 255),
            )  # fmt: skip
    elif style == "box":
        draw.rectangle((0, height * 0.78, width, height * 0.93), fill=(30, 200))
        draw.text((width * 0.05, height * 0.855), line(4), font=font(1 / 15), fill=(235, 255), anchor="lm")
    elif style == "logo":
        draw.text((width * 0.96, height * 0.05), "NEWS 24", font=font(1 / 12), fill=(255, 255), anchor="ra")
    else:
        draw.rectangle((0, 0, width, height), fill=(245, 255))
        draw.text((width * 0.08, height * 0.1), line(3), font=font(1 / 11), fill=(20, 255))
        for row in range(5):
            draw.text((width * 0.1, height * (0.3 + 0.12 * row)), line(5), font=font(1 / 18), fill=(20, 255))
    found = np.asarray(image).astype(np.float32)
    return found[..., 0], found[..., 1] / 255


def laid_over(planes: Planes, levels: NDArray[np.float32], opacity: NDArray[np.float32]) -> Planes:
    """A picture with a text of no colour over it."""
    H, W = levels.shape
    found = planes.astype(np.float32)
    found[:H] = found[:H] * (1 - opacity) + (16 + levels * 219 / 255) * opacity
    shared = opacity.reshape(H // 2, 2, W // 2, 2).mean(axis=(1, 3))
    chroma = found[H:].reshape(2, H // 2, W // 2)
    found[H:] = (chroma * (1 - shared) + 128 * shared).reshape(H // 2, W)
    return found.round().astype(np.uint8)


def stored(pictures: list[Planes]) -> bytes:
    frames = []
    for number, planes in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, 25)
        frames.append(frame)
    return encode(frames, fps=Fraction(25), config=TranscodeConfig(preset="veryfast"))


def beginning(video: Path, *, frames: int = 33, lines: int = 240) -> list[Planes]:
    """The first pictures of a video, of at most so many lines, and of sides that four divides."""
    with av.open(str(video)) as container:
        first = next(container.decode(video=0))
        factor = min(1.0, lines / min(first.height, first.width))
        height, width = (int(side * factor) // 4 * 4 for side in (first.height, first.width))
        container.seek(0)
        return [
            frame.reformat(width, height, format="yuv420p").to_ndarray()
            for frame in itertools.islice(container.decode(video=0), frames)
        ]


def mixed_clips(shared_data: Path) -> list[Path]:
    """The unlabelled clips in an order that says nothing of them."""
    files = [
        file.relative_to(shared_data).as_posix()
        for folder in ("unlabeled", "unlabeled_more", "clips")
        for file in (shared_data / folder).iterdir()
        if file.suffix in (".mp4", ".avi", ".webm", ".mpg")
    ]
    return [
        shared_data / file
        for file in sorted(files, key=lambda name: hashlib.sha256(f"text{name}".encode()).hexdigest())
    ]


@pytest.mark.slow
def test_clips_with_text_score_above_the_same_clips_without(shared_data: Path) -> None:
    plain, with_text = [], []
    for number, video in enumerate(mixed_clips(shared_data)[CHOSEN_ON : CHOSEN_ON + TESTED]):
        pictures = beginning(video)
        height, width = pictures[0].shape[0] * 2 // 3, pictures[0].shape[1]
        text = drawn(STYLES[number % len(STYLES)], width=width, height=height, seed=number)
        for found, clip in ((plain, pictures), (with_text, [laid_over(p, *text) for p in pictures])):
            found.append(score_clip(stored(clip), ["text"])["text"])
    assert len(plain) == TESTED
    a, b = np.array(with_text), np.array(plain)
    area = (a[:, None] > b).mean() + 0.5 * (a[:, None] == b).mean()
    print(f"area under the curve {area:.3f}; with text {np.sort(a).round(3)}; without {np.sort(b).round(3)}")
    assert area >= 0.85
    assert (a > b).mean() >= 0.8


def seen(*lumas: NDArray[np.uint8]) -> Seen:
    return Seen((tuple(Picture(number, luma, False) for number, luma in enumerate(lumas)),))


def lettered(width: int, height: int) -> NDArray[np.uint8]:
    levels, opacity = drawn("subtitle", width=width, height=height, seed=1)
    return (90 * (1 - opacity) + levels * opacity).astype(np.uint8)


def test_text_that_stays_counts_and_what_moves_does_not() -> None:
    page = lettered(320, 240)
    covered = SCORES["text"].measure(seen(page, page))
    assert 0.03 < covered < 0.17, "two lines of an eleventh of the height each, and not all of their length"
    assert SCORES["text"].measure(seen(page)) == covered
    assert SCORES["text"].measure(seen(page, np.roll(page, 40, axis=0))) < 0.2 * covered
    assert SCORES["text"].measure(seen(255 - page, 255 - page)) == pytest.approx(covered, abs=0.01)


def test_what_is_no_text_counts_nothing(textured: NDArray[np.float64]) -> None:
    smooth = np.tile(textured, (3, 1))[:240, :320].astype(np.uint8)
    even = np.full((240, 320), 200, dtype=np.uint8)
    bars = np.tile(np.where(np.arange(320) % 80 < 40, 20, 230).astype(np.uint8), (240, 1))
    fence = np.tile(np.where(np.arange(320) % 10 < 3, 20, 230).astype(np.uint8), (240, 1))
    for picture in (smooth, even, bars, fence, even[:6, :9]):
        assert SCORES["text"].measure(seen(picture, picture)) == 0


def test_large_pictures_count_as_small_ones_do() -> None:
    page = lettered(320, 240)
    large = np.kron(page, np.ones((3, 3), dtype=np.uint8))
    assert SCORES["text"].measure(seen(large, large)) == SCORES["text"].measure(seen(page, page))
