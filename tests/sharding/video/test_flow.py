"""Optical flow: known motion is found, bytes and pixels convert, and a clip's member decodes to the same motion."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import webdataset

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import FlowConfig, ShardRun, TranscodeConfig
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.build.verify import verify
from cliplift.sharding.demo.synthetic import write_demo_videos
from cliplift.sharding.manifest import BUILD_FILE
from cliplift.sharding.read.reader import ShardDataset, ShardReadError
from cliplift.sharding.video import flow as flow_module
from cliplift.sharding.video.decode import VideoDecodeError, probe
from cliplift.sharding.video.flow import (
    decode_flow,
    flow_fields,
    flow_member,
    require_flow,
    to_bytes,
    to_pixels,
)
from cliplift.sharding.video.transcode import encode_array

CONFIG = TranscodeConfig()


@pytest.fixture
def opencv() -> None:
    pytest.importorskip("cv2", reason="the extra 'flow' (OpenCV) is not installed")


def drifting(
    dx: int, dy: int, *, frames: int = 5, height: int = 48, width: int = 64
) -> npt.NDArray[np.uint8]:
    """(T, H, W): a smooth random texture that moves by whole pixels a frame, so the true flow is (dx, dy)."""
    noise = np.random.default_rng(0).normal(size=(height + 64, width + 64))
    for _ in range(3):  # blurred over 7 x 7 pixels
        noise = sum(np.roll(noise, s, axis=0) for s in range(-3, 4)) / 7
        noise = sum(np.roll(noise, s, axis=1) for s in range(-3, 4)) / 7
    noise = (noise - noise.min()) / (noise.max() - noise.min()) * 255
    rows = [
        noise[32 - t * dy : 32 - t * dy + height, 32 - t * dx : 32 - t * dx + width] for t in range(frames)
    ]
    return np.stack(rows).astype(np.uint8)


@pytest.mark.usefixtures("opencv")
@pytest.mark.parametrize(("dx", "dy"), [(2, 0), (0, -3), (-1, 2)])
def test_known_motion_is_found(dx: int, dy: int) -> None:
    """x to the right and y down. DIS is exact to a fraction of a pixel away from the borders."""
    fields = list(flow_fields(drifting(dx, dy), FlowConfig()))
    assert len(fields) == 5
    for field in fields:
        assert field.shape == (48, 64, 2)
        middle = np.median(field[8:-8, 8:-8], axis=(0, 1))
        np.testing.assert_allclose(middle, (dx, dy), atol=0.1)
    assert np.array_equal(fields[-1], fields[-2]), "the last frame repeats the flow before it"


@pytest.mark.usefixtures("opencv")
def test_what_stands_still_does_not_move() -> None:
    still = np.repeat(drifting(0, 0, frames=1), 3, axis=0)
    assert all(np.abs(field).max() < 0.05 for field in flow_fields(still, FlowConfig()))
    (alone,) = flow_fields(still[:1], FlowConfig())
    assert alone.shape == (48, 64, 2)
    assert not alone.any()
    assert list(flow_fields([], FlowConfig())) == []


def test_bytes_and_pixels() -> None:
    """TSN's rule: -20 to 20 pixels onto 0 to 255, longer motion cut."""
    pixels = np.array([-30.0, -20.0, -10.0, 0.0, 10.0, 20.0, 30.0], np.float32)
    assert to_bytes(pixels, 20.0).tolist() == [0, 0, 64, 128, 191, 255, 255]
    many = np.linspace(-20, 20, 1001, dtype=np.float32)
    half_step = 20 / 127.5 / 2
    assert np.abs(to_pixels(to_bytes(many, 20.0), 20.0) - many).max() <= half_step + 1e-5


@pytest.mark.usefixtures("opencv")
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_the_member_of_a_clip_holds_its_flow(decoder: str) -> None:
    grey = drifting(3, -2, frames=8)
    clip = encode_array(np.repeat(grey[..., None], 3, axis=3), fps=Fraction(25), config=CONFIG)
    member = flow_member(clip, FlowConfig(), CONFIG)
    facts = probe(member)
    assert (facts.width, facts.height) == (64, 96)
    planes = decode_flow(member, range(8), decoder=decoder)
    assert planes.shape == (8, 48, 64, 2)
    assert planes.dtype == np.uint8
    middle = np.median(to_pixels(planes, 20.0)[:, 8:-8, 8:-8], axis=(1, 2))
    # 0.16 pixels a byte; the clip and the flow are both compressed, and limited range has 219 steps for 255
    np.testing.assert_allclose(middle, np.broadcast_to((3.0, -2.0), (8, 2)), atol=0.5)
    picked = decode_flow(member, [6, 1], decoder=decoder)
    assert np.array_equal(picked, planes[[6, 1]])


@pytest.mark.usefixtures("opencv")
def test_the_same_clip_gives_the_same_bytes() -> None:
    clip = encode_array(np.repeat(drifting(1, 1)[..., None], 3, axis=3), fps=Fraction(25), config=CONFIG)
    assert flow_member(clip, FlowConfig(), CONFIG) == flow_member(clip, FlowConfig(), CONFIG)


@pytest.mark.usefixtures("opencv")
def test_a_clip_that_is_none_is_refused() -> None:
    with pytest.raises(VideoDecodeError):
        flow_member(b"not a video", FlowConfig(), CONFIG)


def test_missing_opencv_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(flow_module, "import_module", absent)
    with pytest.raises(ConfigError, match=r"needs OpenCV; pip install 'cliplift\[flow\]'"):
        require_flow(FlowConfig())


@pytest.mark.usefixtures("opencv")
def test_tvl1_is_found_or_said_to_be_missing() -> None:
    import cv2

    options = FlowConfig(method="tvl1")
    if hasattr(cv2, "optflow"):
        field = next(flow_fields(drifting(2, 0, frames=2), options))
        np.testing.assert_allclose(np.median(field[8:-8, 8:-8], axis=(0, 1)), (2, 0), atol=0.2)
    else:
        with pytest.raises(ConfigError, match="has no TV-L1; install opencv-contrib-python-headless"):
            require_flow(options)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match="bound_pixels"):
        FlowConfig(bound_pixels=0)
    with pytest.raises(ValueError, match="method"):
        FlowConfig(method="farneback")  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset except the record of how long the build took."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != BUILD_FILE)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardRun, ShardRun]:
    """The same small videos built with flow and without."""
    pytest.importorskip("cv2", reason="the extra 'flow' (OpenCV) is not installed")
    folder = tmp_path_factory.mktemp("stored")
    write_demo_videos(
        folder / "v",
        seed=1,
        train_per_class=1,
        val_per_class=1,
        test_per_class=1,
        unlabelled=1,
        size_pixels=64,
    )
    for action in sorted((folder / "v" / "labelled").glob("*/*")):
        if action.name not in ("move_left", "rotate"):
            shutil.rmtree(action)
    tree = {
        "name": "tiny",
        "source": {"kind": "folder", "root": str(folder / "v" / "labelled"), "layout": "split/class"},
        "shards": {"videos_per_shard": 8},
        "workers": 2,
    }
    with_flow = ShardRun.model_validate(tree | {"output": str(folder / "with"), "flow": {}})
    without = ShardRun.model_validate(tree | {"output": str(folder / "without")})
    for run in (with_flow, without):
        run_shard(run)
    return with_flow, without


def assert_same_motion(stored: bytes, computed: bytes) -> None:
    """To a byte on average: another process may encode the same pictures into other bytes."""
    a, b = (decode_flow(data, range(8)).astype(int) for data in (stored, computed))
    assert np.abs(a - b).mean() < 1
    assert np.abs(a - 128).max() > 10, "nothing moves"


@pytest.mark.slow
def test_a_build_stores_the_flow_of_every_clip(runs: tuple[ShardRun, ShardRun]) -> None:
    dataset = ShardDataset(runs[0].output)
    assert dataset.has_flow
    for i in range(len(dataset)):
        clip, member, shape = dataset.read(i), dataset.read_flow(i), dataset.shape(i)
        planes = decode_flow(member, range(shape.num_frames))
        assert planes.shape == (shape.num_frames, shape.height, shape.width, 2)
        assert_same_motion(member, flow_member(clip, FlowConfig(), runs[0].transcode))
    assert verify(runs[0].output, decode="none").ok


@pytest.mark.slow
def test_stock_webdataset_sees_the_member(runs: tuple[ShardRun, ShardRun]) -> None:
    dataset = ShardDataset(runs[0].output)
    flows = {
        sample["__key__"]: sample["flow.mp4"]
        for shard in dataset.shards
        for sample in webdataset.WebDataset(f"{runs[0].output}/{shard.file}", shardshuffle=False)
    }
    assert flows == {dataset.key(i): dataset.read_flow(i) for i in range(len(dataset))}


@pytest.mark.slow
def test_a_damaged_member_is_named(runs: tuple[ShardRun, ShardRun], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs[0].output, copy)
    dataset = ShardDataset(str(copy))
    tar = copy / dataset.shards[0].file
    data = bytearray(tar.read_bytes())
    data[data.index(dataset.read_flow(0)) + 40] ^= 0xFF
    tar.write_bytes(data)
    with pytest.raises(ShardReadError, match=r"\.flow\.mp4.*crc32 differs"):
        dataset.read_flow(0)
    assert dataset.read(0), "the clip itself is whole"
    details = [p.detail for p in verify(str(copy), decode="none").problems]
    assert any(".flow.mp4: crc32 differs" in detail for detail in details)


@pytest.mark.slow
def test_without_flow_nothing_changes(runs: tuple[ShardRun, ShardRun]) -> None:
    """No new key or column in the files of a dataset that has no flow, so older builds stay what they are."""
    dataset = ShardDataset(runs[1].output)
    assert not dataset.has_flow
    with pytest.raises(ShardReadError, match="has no such member"):
        dataset.read_flow(0)
    for name, data in contents(Path(runs[1].output)).items():
        if Path(name).name != "catalog.json":  # which says of every dataset whether its rows hold flow
            assert b"flow" not in data, name
    clips = [{o.key(i): o.read(i) for i in range(len(o))} for o in (ShardDataset(runs[0].output), dataset)]
    assert clips[0] == clips[1], "the clips do not depend on the flow beside them"


@pytest.mark.slow
def test_flow_survives_the_removal_of_duplicates(runs: tuple[ShardRun, ShardRun], tmp_path: Path) -> None:
    source = Path(runs[0].source.root)
    twin = tmp_path / "v"
    shutil.copytree(source, twin)
    first = next(p for p in sorted(twin.rglob("*.mp4")) if "train" in p.parts)
    shutil.copy(first, first.with_name("copy_of_it.mp4"))
    run = ShardRun.model_validate(
        runs[0].model_dump(mode="json")
        | {
            "source": {"kind": "folder", "root": str(twin), "layout": "split/class"},
            "output": str(tmp_path / "s"),
            "duplicates": "remove_exact",
        }
    )
    run_shard(run)
    dataset = ShardDataset(run.output)
    assert len(dataset) == len(ShardDataset(runs[0].output))
    assert verify(run.output, decode="none").ok
    for i in range(0, len(dataset), 2):
        assert_same_motion(dataset.read_flow(i), flow_member(dataset.read(i), FlowConfig(), run.transcode))
