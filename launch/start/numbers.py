"""Numbers that fit these videos and this machine: frames, crops, batches, steps, workers. Each with its reason.

They are a first choice from sizes and counts, by rules that stand here; nothing is tried out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cliplift.launch.check.machine import Machine
from cliplift.launch.start.looks import Looks

WHOLE_SECONDS = 15.0  # up to here a clip is seen from its beginning to its end
WINDOW_SECONDS = 10.0  # longer videos are cut into pieces of this length
WINDOWED_SECONDS = 60.0
SPAN_SECONDS = 5.0  # of a longer clip, seen at a time
MAX_FPS = 30.0  # of stored clips: the shard build's default
# Crops tried from the largest, pixels: the teacher's 2D network, and networks over time, on a processor and on a GPU.
FRAME_CROPS = {False: (160, 128, 96, 64), True: (224, 192, 160, 128, 96, 64)}
CLIP_CROPS = {False: (80, 64, 48), True: (160, 128, 112, 80, 64, 48)}
LEAST_FRAMES = 4
MARGIN = 8 / 7  # of the short side around a crop, as data.resize_short_side_pixels has it
MICRO_BATCH_SHARE = 0.25  # of memory that activations may take
ACTIVATION_BYTES = 80e6  # of EfficientNet-Lite0 in fp32, forward and backward, a frame of 224 x 224 pixels
IMBALANCE = 3.0  # classes this many times as frequent as the rarest are drawn equally often
DARK = 0.2  # mean luma below which clips are brightened
SIDES = re.compile(r"(?<![a-z])(left|right|clockwise|counterclockwise|anticlockwise)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Chosen:
    """A value as YAML has it, and why."""

    yaml: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Everything the YAML files need. Crops are (crop, short side) in pixels; steps are optimizer steps."""

    window: Chosen | None
    sampling: Chosen
    frames: int
    test_clips: int
    frame_crop: tuple[int, int]
    clip_crop: tuple[int, int]
    crop_why: str
    stored_pixels: int
    batch: Chosen
    micro_batch: Chosen | None
    feeding: Chosen
    frame_steps: int
    clip_steps: int
    transfer_steps: int
    passes: float
    precision: Chosen
    flip: Chosen
    dark: Chosen | None
    balanced: Chosen | None
    clips: int


def choose_numbers(
    looks: Looks,
    machine: Machine,
    *,
    train_videos: int,
    videos: int,
    per_class: Sequence[int],
    classes: Sequence[str],
) -> Numbers:
    """The numbers for what was seen.

    Args:
        looks: at some of the videos.
        machine: that will train.
        train_videos, videos: how many are trained on, and in all.
        per_class: training videos of each class.
        classes: their names.
    """
    gpu = machine.gpu is not None
    seconds = looks.median("seconds", 5.0)
    window = _window(looks, seconds)
    clips_a_video = max(1.0, seconds / WINDOW_SECONDS) if window else 1.0
    clips = max(1, round(train_videos * clips_a_video))
    fps = min(looks.median("fps", 25.0), MAX_FPS)
    frames = _frames(looks, gpu=gpu)
    sampling, test_clips = _sampling(frames, WINDOW_SECONDS if window else seconds, fps)
    frame_crop = _crop(looks.short_side, FRAME_CROPS[gpu])
    clip_crop = _crop(looks.short_side, CLIP_CROPS[gpu])
    batch = _batch(clips, gpu=gpu)
    G = int(batch.yaml)
    stored = max(frame_crop[1], clip_crop[1])
    return Numbers(
        window=window,
        sampling=sampling,
        frames=frames,
        test_clips=test_clips,
        frame_crop=frame_crop,
        clip_crop=clip_crop,
        crop_why=f"the videos have a short side of {looks.short_side} pixels; this is what {_kind(gpu)} can afford",
        stored_pixels=max(16, min(looks.short_side or stored, 256 if gpu else stored)),
        batch=batch,
        micro_batch=_micro_batch(G, clip_crop[0], machine, frames=frames),
        feeding=_feeding(
            machine, clips=round(videos * clips_a_video), seconds=min(seconds, WINDOW_SECONDS if window else seconds),
            fps=fps, short_side=stored,
        ),
        frame_steps=_steps(clips, G, passes=20, least=60, most=2000 if gpu else 300),
        clip_steps=_steps(clips, G, passes=30 if gpu else 10, least=40, most=5000 if gpu else 150),
        transfer_steps=_steps(clips, G, passes=60 if gpu else 30, least=100, most=10_000 if gpu else 240),
        passes=G / clips,
        precision=_precision(machine),
        flip=_flip(classes),
        dark=_dark(looks),
        balanced=_balanced(per_class, classes),
        clips=clips,
    )  # fmt: skip


def _kind(gpu: bool) -> str:
    return "a GPU" if gpu else "a processor without a GPU"


def _window(looks: Looks, seconds: float) -> Chosen | None:
    if seconds <= WINDOWED_SECONDS and looks.longest_seconds <= 300:
        return None
    return Chosen(
        f"{{kind: windows, length_seconds: {WINDOW_SECONDS:g}}}",
        f"videos of {seconds:.0f} s (the longest {looks.longest_seconds:.0f} s) are cut into pieces, each with "
        "its video's label",
    )


def _frames(looks: Looks, *, gpu: bool) -> int:
    """Frames of a clip: no more than short videos have, and enough for a network over time."""
    frames = 16 if gpu else 8
    return min(frames, max(LEAST_FRAMES, looks.fewest_frames)) if looks.fewest_frames else frames


def _sampling(frames: int, seconds: float, fps: float) -> tuple[Chosen, int]:
    """Frames and the step between them; and how many clips are averaged in a test."""
    if seconds <= WHOLE_SECONDS:
        part = seconds / frames
        why = f"a video of {seconds:.1f} s is seen whole: a frame from each of {frames} equal parts, {part:.2f} s"
        return Chosen(f"{{frames: {frames}, mode: segments}}", why), 1
    stride = max(1, round(SPAN_SECONDS * fps / frames))
    why = (
        f"every {stride}th frame of {fps:.3g} a second: {frames} of them span {frames * stride / fps:.1f} s of "
        f"{seconds:.0f} s; three such clips are averaged in a test"
    )
    return Chosen(f"{{frames: {frames}, stride: {stride}}}", why), 3


def _crop(short_side: int, sizes: Sequence[int]) -> tuple[int, int]:
    """The largest crop that a frame holds with its margin, and that short side; of small frames the frame itself."""
    for size in sizes:
        if short_side == 0 or round(size * MARGIN) <= short_side:
            return size, round(size * MARGIN)
    side = max(16, short_side // 16 * 16)
    return side, max(side, short_side)


def _batch(clips: int, *, gpu: bool) -> Chosen:
    wanted = 32 if gpu else 16
    G = wanted
    while G > 2 and clips < G * 2:
        G //= 2
    G = min(G, clips)
    return Chosen(str(G), f"{clips} training clips: {max(1, clips // G)} steps a pass")


def _micro_batch(G: int, crop: int, machine: Machine, *, frames: int) -> Chosen | None:
    """Smaller forward passes, where a whole batch would take too much memory."""
    bytes_a_clip = ACTIVATION_BYTES * frames * (crop / 224) ** 2
    room = MICRO_BATCH_SHARE * machine.memory_per_rank
    fits = [n for n in range(1, G + 1) if G % n == 0 and n * bytes_a_clip <= room]
    if fits and fits[-1] == G:
        return None
    return Chosen(
        str(fits[-1] if fits else 1),
        f"of {machine.memory_per_rank / 2**30:.0f} GiB a quarter for activations",
    )


def _feeding(machine: Machine, *, clips: int, seconds: float, fps: float, short_side: int) -> Chosen:
    """Decoded clips in memory where they fit, else decoding processes."""
    mib = clips * seconds * fps * short_side**2 * 1.6 * 3 / 2**20
    if mib <= machine.memory_per_rank / 2**20 / 4 and machine.gpu is None:
        return Chosen(
            f"cache_decoded_mib: {max(64, round(1.5 * mib))}",
            f"about {mib:.0f} MiB decoded: every clip is decoded once and kept",
        )
    workers = max(1, min(8, machine.cores_per_node - 1))
    return Chosen(
        f"workers: {workers}", f"{machine.cores_per_node} cores: {workers} decode while the network computes"
    )


def _steps(clips: int, G: int, *, passes: int, least: int, most: int) -> int:
    steps = min(most, max(least, passes * clips // G))
    return steps if steps < 100 else steps // 10 * 10


def _precision(machine: Machine) -> Chosen:
    if machine.gpu is None:
        return Chosen("fp32", "without a GPU")
    return Chosen("autocast_bf16", f"on the {machine.gpu}")


def _flip(classes: Sequence[str]) -> Chosen:
    sided = [name for name in classes if SIDES.search(name.replace("_", " "))]
    if sided:
        return Chosen("false", f"a mirrored {sided[0]!r} would be another class")
    return Chosen("true", "false, if left and right are different classes")


def _dark(looks: Looks) -> Chosen | None:
    brightness = looks.median("brightness", 0.45)
    if brightness >= DARK:
        return None
    return Chosen("true", f"dark videos: a mean luma of {brightness:.2f} of 1")


def _balanced(per_class: Sequence[int], classes: Sequence[str]) -> Chosen | None:
    if len(classes) < 2 or not min(per_class, default=0) or max(per_class) < IMBALANCE * min(per_class):
        return None
    most, least = (classes[list(per_class).index(f(per_class))] for f in (max, min))
    return Chosen(
        "true", f"{most} has {max(per_class)} training videos and {least} {min(per_class)}: all as often"
    )
