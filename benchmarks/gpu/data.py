"""Rows about clips on their way to the step: augmentation on the device, and the loader."""

from __future__ import annotations

import contextlib
import time
import warnings
from functools import partial
from pathlib import Path
from types import ModuleType

from engine import random_batch
from measure import Numbers, Row, Setting, alternating
from waits import noted_waits, short_place

from cliplift.configs.data import AugmentConfig, DataConfig
from cliplift.pipelines.data.augment import DeviceAugment


def augmentation(setting: Setting) -> Numbers:
    """Milliseconds per batch of what happens to clips on the device, by recipe, and waits in it."""
    from cliplift.models.protocol import InputSpec

    spec = InputSpec(mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225))
    shape = (16, 16, 224, 224) if not setting.small else (2, 4, 16, 16)
    batch = random_batch(shape)
    recipes = {
        "flip": {"flip": True},
        "colour": {"flip": True, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4},
        "randaugment": {"flip": True, "rand_augment_ops": 2, "erase_probability": 0.25},
    }
    found: Numbers = {
        "copy_ms": alternating({"it": lambda: batch.to(setting.device)}, setting, budget_seconds=0.3)["it"]
    }
    for name, words in recipes.items():
        views = DeviceAugment(AugmentConfig.model_validate(words), spec, training=True)
        moved = batch.to(setting.device)
        found[f"{name}_ms"] = alternating({"it": partial(views, moved)}, setting, budget_seconds=0.5)["it"]
        if setting.device.type == "cuda":
            caught: list[warnings.WarningMessage] = []
            with noted_waits(caught):
                views(moved)
            found[f"{name}_waits"] = [f"{short_place(w.filename)}:{w.lineno}" for w in caught]
    return found | {"shape": shape}


def loading(setting: Setting) -> Numbers:
    """Clips per second of the loader against a bare decode loop, and the GPU's wait for data in a training loop."""
    import loading as benchmark

    from cliplift.sharding.demo.synthetic import write_demo_videos

    shards = setting.shards
    if shards is None:
        videos = setting.folder / "videos"
        write_demo_videos(videos, train_per_class=2, val_per_class=1, test_per_class=1, unlabelled=16)
        shards = Path(benchmark.shards_of(sorted(videos.rglob("*.mp4")), setting.folder, {}))
    found: Numbers = {}
    for workers in (1,) if setting.small else (1, 8, 16):
        data = benchmark.data_config(
            str(shards), decoder="pyav", processes=workers, crop_pixels=setting.size(224, 32)
        )
        found[f"{workers} workers"] = _loader_rate(benchmark, data, setting)
    return found


def _loader_rate(benchmark: ModuleType, data: DataConfig, setting: Setting) -> Numbers:
    seconds, rates = setting.size(3, 1), {}
    for name, clips in (
        ("loader", benchmark.ours(data)),
        ("bare", benchmark.decoding_alone(data, benchmark.bare_pyav)),
    ):
        with contextlib.closing(clips):
            next(clips), next(clips)
            begun, count = time.perf_counter(), 0
            while time.perf_counter() - begun < seconds:
                count += next(clips)
            rates[name] = count / (time.perf_counter() - begun)
    return {f"{name}_clips_per_second": rate for name, rate in rates.items()} | {
        "loader_over_bare": rates["loader"] / rates["bare"]
    }


AUGMENTATION = Row("augmentation", "no waits", augmentation)
LOADER = Row("loader", ">= .9 of bare decoding", loading, 90.0)
