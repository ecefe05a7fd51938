"""``import cliplift as cl``: what a notebook gets is what training and the commands have."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import cliplift as cl
from cliplift.configs.data import DataConfig
from cliplift.configs.runs import PredictRun
from cliplift.configs.sections import ConfigError
from cliplift.models import create_model, from_pretrained
from cliplift.models.protocol import ModelError
from cliplift.pipelines.engine.task import SavedModel, data_card, save_trained
from cliplift.pipelines.evaluation.predict import run_predict
from cliplift.pipelines.runs.predictions import read_features, read_predictions


@pytest.fixture(scope="module")
def model(finetuned: Path) -> cl.Model:
    return cl.load(finetuned)


@pytest.fixture(scope="module")
def video(place: Path) -> str:
    return str(min((place / "videos" / "labelled").rglob("*.mp4")))


def test_clips_of_shards_give_the_run_its_own_predictions(
    model: cl.Model, finetuned: Path, place: Path
) -> None:
    """The run's own evaluation, its loader and its stage in between, has written these probabilities and features."""
    written = read_predictions(finetuned / "predictions.parquet")
    clips = cl.clips(f"{place}/shards/actions", split="test", like=model)
    assert len(clips) == len(written.keys) == 20
    assert clips.classes == model.classes
    assert [clips.facts(n).key for n in range(20)] == list(written.keys)
    assert clips.labels.tolist() == written.labels.tolist()
    batch, labels = next(iter(DataLoader(clips, batch_size=20)))
    assert batch.shape == (20, 3, 8, 64, 64)
    assert batch.dtype == torch.float32
    assert labels.tolist() == written.labels.tolist()
    np.testing.assert_allclose(model(batch).softmax(dim=1).numpy(), written.probabilities, atol=1e-5)
    features = read_features(finetuned, rows=20)
    assert features is not None
    np.testing.assert_allclose(
        model.features(batch).numpy(), features.astype(np.float32), atol=2e-3, rtol=2e-3
    )


def test_predict_says_what_the_command_says(
    model: cl.Model, finetuned: Path, video: str, tmp_path: Path
) -> None:
    run_predict(PredictRun(run=str(finetuned), videos=(video,), output=str(tmp_path / "p.jsonl"), top=3))
    said = json.loads((tmp_path / "p.jsonl").read_text())["top"]
    found = model.predict(video)
    assert [name for name, _ in found.top(3)] == [each["class"] for each in said]
    assert [share for _, share in found.top(3)] == pytest.approx([c["probability"] for c in said], abs=1e-6)
    assert found.label == said[0]["class"]
    assert said[0]["class"] in repr(found)
    assert model.predict(Path(video), clips=2, crops=3).probabilities.sum() == pytest.approx(1, abs=1e-5)


def test_the_input_of_the_training_is_recorded_and_read_back(
    load: Callable[..., Any], tmp_path: Path
) -> None:
    run = load("finetune/demo", "unused", "data.crop_pixels=48", "data.resize_short_side_pixels=54",
               "data.sampling.stride=6", "data.sampling.frames=4")  # fmt: skip
    network = create_model("t3d_tiny", num_classes=2, in_frames=4)
    assert (network.input_spec.frame_stride, network.input_spec.crop_height) != (6, 48), (
        "else it shows nothing"
    )
    card = data_card(run, run.data)
    card["classes"] = ["a", "b"]
    save_trained(SavedModel(network=network, options={}, card=card), tmp_path / "e", run=run, step=7)
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    wanted = {"frames": 4, "frame_stride": 6, "crop_height": 48, "crop_width": 48}
    assert {key: config["input"][key] for key in wanted} == wanted
    assert config["extra"]["step"] == 7
    for spec in (from_pretrained(tmp_path / "e").input_spec, cl.load(tmp_path / "e").input_spec):
        assert {key: getattr(spec, key) for key in wanted} == wanted
        assert spec.mean == network.input_spec.mean
    for damage in (-3, "big", True, 1 << 40):
        config["input"]["crop_height"] = damage
        (tmp_path / "e" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match="input is damaged"):
            cl.load(tmp_path / "e")


def test_the_processor_takes_the_frames_and_normalises_as_training_did(model: cl.Model) -> None:
    """Frame n of the array has the level n, so the levels say which were taken: 8 of stride 2, in the middle."""
    frames = np.broadcast_to(np.arange(41, dtype=np.uint8)[:, None, None, None], (41, 70, 90, 3))
    seen = model.processor(frames)
    assert seen.shape == (1, 3, 8, 64, 64)
    mean, std = (
        torch.tensor(values).view(3, 1, 1, 1) for values in (cl.InputSpec().mean, cl.InputSpec().std)
    )
    levels = ((seen[0] * std + mean) * 255).mean(dim=(0, 2, 3))
    first = (41 - 15) // 2
    torch.testing.assert_close(levels, torch.arange(first, first + 16, 2).float(), atol=1e-3, rtol=0)
    assert model.processor.with_views(clips=2, crops=3)(frames).shape[0] == 6
    assert model.processor.views(frames).clips.dtype == torch.uint8
    for wrong in (frames[..., 0], frames.astype(np.float32), frames[:0]):
        with pytest.raises(ConfigError, match="uint8"):
            model.processor(wrong)
    tree = model.processor.data.model_dump()
    timed = DataConfig.model_validate(tree | {"sampling": tree["sampling"] | {"fps": 10.0}})
    with pytest.raises(ConfigError, match="give fps="):
        cl.Processor(timed, model.input_spec)(frames)
    assert cl.Processor(timed, model.input_spec)(frames, fps=20.0).shape[2] == 8


def test_features_of_a_run_without_a_classifier(transferred: Path, video: str) -> None:
    encoder = cl.load(transferred)
    assert encoder.classes == ()
    assert "features" in repr(encoder)
    assert encoder.features(video).shape == (encoder.network.feature_dim,)
    with pytest.raises(ConfigError, match="no classifier: it is a transfer model; use its features"):
        encoder.predict(video)


def test_feature_maps_have_every_scale_once(model: cl.Model) -> None:
    clips = torch.zeros(2, 3, 8, 64, 64)
    maps = model.feature_maps(clips)
    sizes = [tuple(found.shape[2:]) for found in maps.values()]
    assert len(set(sizes)) == len(sizes) >= 2
    assert sizes == sorted(sizes, reverse=True)
    blocks = model.network.checkpoint_blocks()
    assert [name for name in blocks if name in maps] == list(maps)
    assert blocks[-1] in maps


def test_explanations_are_seen_and_saved(model: cl.Model, video: str, tmp_path: Path) -> None:
    from cliplift.sharding.video.decode import probe

    chosen = model.classes[3]
    found = model.explain(video, class_name=chosen)
    assert found.class_name == chosen
    assert found.frames.shape == (8, 64, 64, 3)
    assert found.heat.shape == (8, 64, 64)
    assert found.probability == pytest.approx(model.predict(video).probabilities[3], abs=1e-5)
    saved = probe(found.save(tmp_path / "e.mp4"))
    assert (saved.width, saved.height) == (128, 64)
    assert "data:video/mp4;base64," in found._repr_html_()
    with pytest.raises(ConfigError, match="none of the model's 10 classes"):
        model.explain(video, class_name="juggling")


def test_training_clips_follow_seed_and_epoch_in_any_process(place: Path) -> None:
    options: dict[str, Any] = {"split": "train", "frames": 2, "crop": 32, "training": True, "seed": 5}
    clips = cl.clips(f"{place}/shards/actions", **options)
    loader = DataLoader(clips, batch_size=4, num_workers=2, persistent_workers=True)
    passes = []
    for epoch in (0, 1):
        clips.set_epoch(epoch)
        passes.append(next(iter(loader)).clip)
        here = torch.stack([clips[number].clip for number in range(4)])
        assert torch.equal(passes[-1], here)
    assert not torch.equal(*passes)
    sent: cl.ClipDataset = pickle.loads(pickle.dumps(clips))
    assert torch.equal(sent[3].clip, clips[3].clip)
    assert torch.equal(clips[-1].clip, clips[len(clips) - 1].clip)
    with pytest.raises(IndexError):
        clips[len(clips)]


def test_batches_are_those_of_training_on_any_number_of_ranks(place: Path) -> None:
    clips = cl.clips(f"{place}/shards/actions", frames=2, crop=16, training=True, seed=1)
    alone = list(clips.batches(batch=4, epoch=2))
    assert len(alone) == len(clips) // 4
    ranks = [list(clips.batches(batch=4, epoch=2, rank=rank, world_size=2)) for rank in range(2)]
    together = [torch.cat([each[step].clip for each in ranks]) for step in range(len(alone))]

    def sums(batches: list[torch.Tensor]) -> list[list[float]]:
        return [sorted(batch.double().sum(dim=(1, 2, 3, 4)).tolist()) for batch in batches]

    assert sums(together) == sums([batch.clip for batch in alone])
    with pytest.raises(ConfigError, match="cannot be dealt to rank 0 of 3"):
        next(clips.batches(batch=4, world_size=3))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"frames": 0}, "cliplift.clips: sampling.frames: 0 should be greater than or equal to 1"),
        ({"crop_pixel": 64}, "did you mean 'crop_pixels'"),
        ({"split": "tset"}, "no split 'tset'"),
        ({"sampling": 3}, "is a mapping"),
    ],
)
def test_a_wrong_word_is_one_sentence(place: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cl.clips(f"{place}/shards/actions", **options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_model_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no weights"):
        cl.load(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"runs": ["runs/x/seed0", "runs/x/seed1"]}))
    with pytest.raises(ConfigError, match=r"holds 2 runs; load one of them, such as 'runs/x/seed0'"):
        cl.load(tmp_path)
