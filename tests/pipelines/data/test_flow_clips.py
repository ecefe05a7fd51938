"""Optical flow as an input: the clips of a flow stream are the stored flow, and mirroring turns motion round."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cliplift.configs.data import DataConfig
from cliplift.configs.runs import TransferRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import FlowConfig, ShardRun
from cliplift.models import create_model
from cliplift.models.protocol import InputSpec
from cliplift.pipelines.data.augment import DeviceAugment, mirror
from cliplift.pipelines.data.clip_plan import Box, cut
from cliplift.pipelines.data.source import ClipSource
from cliplift.pipelines.data.video_files import clips_of_video
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.evaluation.evaluate import classify_split
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos
from cliplift.sharding.video.flow import decode_flow, flow_fields, to_bytes

PIXELS = 64
HERE = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
FLOW_SPEC = InputSpec(frames=8, channels=2, mean=(0.5, 0.5), std=(0.5, 0.5))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small videos of two actions, their flow beside them."""
    pytest.importorskip("cv2", reason="the extra 'flow' (OpenCV) is not installed")
    folder = tmp_path_factory.mktemp("stored")
    write_demo_videos(
        folder / "v",
        seed=1,
        train_per_class=1,
        val_per_class=1,
        test_per_class=1,
        unlabelled=1,
        size_pixels=PIXELS,
    )
    for action in sorted((folder / "v" / "labelled").glob("*/*")):
        if action.name not in ("move_left", "move_right"):
            shutil.rmtree(action)
    tree = {
        "name": "tiny",
        "output": str(folder / "s"),
        "source": {"kind": "folder", "root": str(folder / "v" / "labelled"), "layout": "split/class"},
        "transcode": {"short_side_pixels": PIXELS},
        "flow": {},
        "workers": 2,
    }
    run_shard(ShardRun.model_validate(tree))
    return folder


def config(shards: Path, **changes: object) -> DataConfig:
    """Whole frames: the crop is as large as the stored video, so that nothing is resized."""
    tree = {
        "shards": str(shards / "s"),
        "modality": "flow",
        "sampling": {"frames": 8, "stride": 1},
        "crop_pixels": PIXELS,
        "resize_short_side_pixels": PIXELS,
        "augment": {"crop": "centre"},
    }
    return DataConfig.model_validate(tree | changes)


def test_the_clips_of_a_flow_stream_are_the_stored_flow(shards: Path) -> None:
    source = ClipSource(config(shards), split="train")
    for index in range(len(source)):
        batch = source.training_clips(index, 0)
        numbers = source.plan(index, 0).frames[0]
        expected = decode_flow(source.sets[0].read_flow(index), numbers.tolist())
        height, width = expected.shape[1:3]
        top, left = (height - PIXELS) // 2, (width - PIXELS) // 2
        inside = expected[:, top : top + PIXELS, left : left + PIXELS]
        assert batch.clips.shape == (1, 8, PIXELS, PIXELS, 2)
        # the loader's decoder is PyAV and decode_flow's decord: the same pixels on our shards
        assert np.array_equal(batch.clips[0].numpy(), inside)
    assert source.test_views(0).clips.shape == (1, 8, PIXELS, PIXELS, 2)


def test_a_cache_keeps_the_two_modalities_apart(shards: Path) -> None:
    channels = [
        ClipSource(config(shards, modality=m, cache_decoded_mib=64), split="train")
        .training_clips(0, 0)
        .clips.shape[-1]
        for m in ("rgb", "flow", "rgb", "flow")
    ]
    assert channels == [3, 2, 3, 2]


def test_mirrored_flow_is_the_flow_of_the_mirrored_video() -> None:
    """What the published code left out: the x component changes sign. Checked against OpenCV on mirrored frames."""
    pytest.importorskip("cv2", reason="the extra 'flow' (OpenCV) is not installed")
    rng = np.random.default_rng(0)
    texture = rng.normal(size=(80, 120))
    for axis in (0, 1):
        texture = sum(np.roll(texture, s, axis=axis) for s in range(-4, 5)) / 9
    texture = ((texture - texture.min()) / (texture.max() - texture.min()) * 255).astype(np.uint8)
    frames = np.stack([texture[10 + t : 58 + t, 20 - 2 * t : 84 - 2 * t] for t in range(4)])  # 2 right, 1 up
    stored, turned = (
        np.stack([to_bytes(field, 20.0) for field in flow_fields(video, FlowConfig())])
        for video in (frames, np.ascontiguousarray(frames[:, :, ::-1]))
    )
    inner = (slice(None), slice(8, -8), slice(8, -8))
    square = Box(0, 8, 48, 48, flip=True)
    on_host = cut(stored, square, pixels=48).numpy()
    # a byte is 0.16 pixels; DIS itself is not exactly symmetric
    assert np.abs(on_host[inner].astype(int) - turned[:, :, 8:56][inner].astype(int)).mean() < 1
    assert np.median(turned[inner][..., 0]) < 128 < np.median(stored[inner][..., 0])
    x = torch.from_numpy(stored).permute(3, 0, 1, 2).unsqueeze(0).float() / 255
    expected = torch.from_numpy(turned).permute(3, 0, 1, 2).unsqueeze(0).float() / 255
    difference = (mirror(x) - expected)[..., 8:-8, 8:-8].abs().mean()
    assert difference < 1 / 255
    assert (x.flip(-1) - expected)[:, 0, :, 8:-8, 8:-8].abs().mean() > 10 / 255, "plain mirroring is wrong"
    torch.testing.assert_close(mirror(mirror(x)), x)


def test_mirroring_on_the_device_and_twice_in_the_crop() -> None:
    rgb = torch.rand(1, 3, 2, 4, 4)
    assert torch.equal(mirror(rgb), rgb.flip(-1)), "colours only change places"
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 2)).astype(np.uint8)
    once = cut(frames, Box(0, 0, 6, 6, flip=True), pixels=6).numpy()
    assert np.array_equal(once[..., 0], 255 - frames[:, :, ::-1, 0])
    assert np.array_equal(once[..., 1], frames[:, :, ::-1, 1])


def test_a_two_channel_network_is_evaluated_on_flow(shards: Path) -> None:
    torch.manual_seed(0)
    network = create_model("r2plus1d_18", num_classes=2, in_channels=2, in_frames=8).eval()
    found = classify_split(network, config(shards), split="test", batch=2, topology=HERE)
    assert found.probabilities.shape == (2, 2)
    assert np.isfinite(found.probabilities).all()


def test_the_planes_are_normalised_around_no_motion(shards: Path) -> None:
    batch = ClipSource(config(shards), split="test").test_views(0)
    x = DeviceAugment(config(shards).augment, FLOW_SPEC, training=False)(batch)
    assert x.shape == (1, 2, 8, PIXELS, PIXELS)
    assert x.median().abs() < 0.02, "most of a picture stands still"


def test_a_video_file_is_seen_as_flow(shards: Path) -> None:
    video = next((shards / "v" / "labelled" / "test" / "move_left").glob("*.mp4"))
    batch = clips_of_video(video, config(shards))
    assert batch.clips.shape == (1, 8, PIXELS, PIXELS, 2)
    moving = batch.clips[..., 0][(batch.clips[..., 0].int() - 128).abs() > 6].float()
    assert moving.numel() > 50
    assert moving.mean() < 128, "what moves left has a negative x"


def test_shards_without_flow_are_refused(shards: Path, tmp_path: Path) -> None:
    tree = {
        "name": "plain",
        "output": str(tmp_path / "s"),
        "source": {"kind": "folder", "root": str(shards / "v" / "labelled"), "layout": "split/class"},
        "workers": 2,
    }
    run_shard(ShardRun.model_validate(tree))
    with pytest.raises(ConfigError, match=r"holds no optical flow; build the shards with `flow: \{\}`"):
        ClipSource(config(tmp_path), split="train")


@pytest.mark.parametrize(
    "augment", [{"brightness": 0.4}, {"rand_augment_ops": 2}, {"normalize_brightness": True}]
)
def test_colour_augmentation_is_refused(augment: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="changes colours, and flow has none"):
        DataConfig.model_validate({"shards": "s", "modality": "flow", "augment": augment})


def test_transfer_needs_frames() -> None:
    with pytest.raises(ValueError, match=r"data\.modality: has no frames for the teacher"):
        TransferRun.model_validate(
            {
                "name": "n",
                "output": "o",
                "schedule": {"steps": 1},
                "data": {"shards": "s", "modality": "flow"},
                "model": {"name": "t3d_tiny"},
                "engine": {"global_batch": 8},
            }
        )
