"""On the made clips the heat lies on the moving shapes: a network is trained, its maps held against their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.models import from_pretrained
from cliplift.models.protocol import IMAGENET_MEAN, IMAGENET_STD
from cliplift.pipelines.evaluation.grad_cam import grad_cam
from cliplift.pipelines.stages.run import run_stage
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.motions import CLASSES, camera_shake, draw_shape, seen_by_camera, shape_path
from cliplift.sharding.demo.shapes import LOOKS, background, textured_shape
from cliplift.sharding.demo.synthetic import render_clip, write_demo_videos

SIZE, FPS = 80, 30


def shape_pixels(clip: dict[str, Any]) -> npt.NDArray[np.bool_]:
    """(T, H, W): the pixels the shapes of a clip cover, found by drawing it once more without its light."""
    look = LOOKS[clip["split"]]
    rng = np.random.default_rng([clip["seed"], look.seed, CLASSES.index(clip["action"]), clip["number"]])
    shake = camera_shake(rng, clip["num_frames"])
    frames = seen_by_camera(background(rng, look, clip["size_pixels"]), shake)
    empty = frames.copy()
    for _ in range(rng.integers(2, 4)):
        sprite = textured_shape(rng, look)
        path = shape_path(rng, clip["action"], num_frames=clip["num_frames"], fps=clip["fps"])
        draw_shape(frames, sprite, path, shake)
    return (np.abs(frames.astype(float) - empty).max(axis=-1)) > 0.02 * float(np.ptp(empty))


def heat_on_shapes(
    weights: Path, *, clips: int, seed: int, layer: str | None = None
) -> npt.NDArray[np.float64]:
    """(N, 2): share of the heat on the shapes, and share of the pixels they cover, of test clips with any heat."""
    model: Any = from_pretrained(weights)
    model.eval()
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    inside, covered = [], []
    for number in range(clips):
        clip = {"split": "test", "action": CLASSES[number % len(CLASSES)], "number": number, "seed": seed,
                "size_pixels": SIZE, "fps": FPS, "num_frames": 16}  # fmt: skip
        frames = torch.from_numpy(render_clip(**clip)[::2].copy()).permute(3, 0, 1, 2).float() / 255
        frames = F.interpolate(frames, size=(64, 64), mode="bilinear", antialias=True)
        mask = torch.from_numpy(shape_pixels(clip)[::2]).float()
        mask = F.interpolate(mask[None], size=(64, 64), mode="area")[0]
        heat = grad_cam(
            model, ((frames - mean) / std)[None], classes=torch.tensor([number % len(CLASSES)]), layer=layer
        ).heat[0]
        if heat.sum() > 0:
            inside.append(float((heat * mask).sum() / heat.sum()))
            covered.append(float(mask.mean()))
    assert len(inside) >= clips // 2
    return np.array([inside, covered]).T


@pytest.mark.slow
def test_the_map_follows_the_moving_shapes(tmp_path: Path) -> None:
    configs = Path(__file__).parents[3] / "configs"
    write_demo_videos(
        tmp_path / "videos", seed=0, train_per_class=40, val_per_class=2, test_per_class=2, unlabelled=2,
        size_pixels=SIZE, workers=2,
    )  # fmt: skip
    words = [f"source.root={tmp_path}/videos/labelled", f"output={tmp_path}/shards", "workers=2"]
    run_shard(load_run(configs / "shard/demo_actions.yaml", RUNS, words).run)
    words = [
        f"data.shards={tmp_path}/shards",
        f"output={tmp_path}/run",
        "schedule.steps=250",
        "track.wandb=disabled",
    ]
    run_stage(load_run(configs / "finetune/demo_scratch.yaml", RUNS, words).run, command=[])
    # The last map has 2 x 2 cells; the one after the first dense block 8 x 8.
    for layer in (None, "features.transition1"):
        found = heat_on_shapes(tmp_path / "run/weights", clips=200, seed=0, layer=layer)
        more = found[:, 0] - found[:, 1]
        sigmas = more.mean() / (more.std(ddof=1) / np.sqrt(len(more)))
        heat, covered = found.mean(axis=0)
        print(f"{layer}: {heat:.3f} of the heat, {covered:.3f} of the pixels, {sigmas:.1f} standard errors")
        assert sigmas > 3
    assert heat > 1.4 * covered, "the finer map lies on the shapes to be seen by eye"
