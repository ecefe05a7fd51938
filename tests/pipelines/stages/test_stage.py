"""The stages end to end on real mp4 files: train, evaluate, predict, export."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS, EvaluateRun, ExplainRun, ExportRun, PredictRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.models import from_pretrained
from cliplift.pipelines.evaluation.evaluate import run_evaluate
from cliplift.pipelines.evaluation.explain import run_explain
from cliplift.pipelines.evaluation.export import run_export
from cliplift.pipelines.evaluation.predict import run_predict
from cliplift.pipelines.repeats import run_all
from cliplift.pipelines.stages.run import dry_run, run_stage
from cliplift.pipelines.stages.transfer import TransferStage
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.video.decode import decode_frames


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_transfer_reports_matching_against_its_prior(transferred: Path) -> None:
    result = json.loads((transferred / "result.json").read_text())
    metrics = result["metrics"]
    assert metrics["matching_prior"] == 0.5
    assert 0 <= metrics["matching_accuracy"] <= 1
    held_out = ShardDataset(str(transferred.parent / "shards" / "unlabelled"), split="val")
    assert metrics["held_out_clips"] == len(held_out) >= 4
    assert {"train/loss", "train/lr", "train/grad_norm", "speed/clips_per_second"} <= rows(transferred)[
        0
    ].keys()
    run = load_run(transferred / "config.yaml", RUNS).run
    assert run.stage == "transfer"
    assert json.loads((transferred / "run.json").read_text())["command"] == [
        "cliplift",
        "transfer",
        "transfer/demo",
    ]


def test_only_the_student_is_saved_and_it_loads(transferred: Path) -> None:
    model = from_pretrained(transferred / "weights")
    features = model(torch.zeros(1, 3, 8, 64, 64))
    assert features.shape == (1, model.feature_dim)
    assert not any("teacher" in name for name in model.state_dict())


def test_finetuning_starts_from_the_transferred_backbone(load: Callable[..., Any], transferred: Path) -> None:
    """With a learning rate that changes nothing, the saved backbone is the transfer run's, the head is not."""
    run = load("finetune/demo", "frozen", "schedule.steps=1", f"initialise_from={transferred}",
               "optim.lr=1e-30", "optim.weight_decay=0")  # fmt: skip
    after = from_pretrained(run_stage(run, command=[]).folder / "weights").state_dict()
    before = from_pretrained(transferred / "weights").state_dict()
    for name, value in before.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(after[name], value), name
    assert len(after) > len(before)


def test_pretrain_learns_something_and_hands_over_its_backbone(load: Callable[..., Any]) -> None:
    run = load("pretrain/demo", "pretrain", "schedule.steps=6", "evaluation.every_steps=null",
               "engine.zero_stage=2", "data.augment.mixup_alpha=0.2")  # fmt: skip
    result = run_stage(run, command=["cliplift", "pretrain", "pretrain/demo"])
    assert result.finished
    assert {"accuracy", "accuracy_low", "top5_accuracy", "chance"} <= dict(result.metrics).keys()
    onwards = load("finetune/demo", "onwards", "schedule.steps=1", f"initialise_from={result.folder}")
    assert run_stage(onwards, command=[]).finished


def test_finetune_tests_once_and_keeps_every_prediction(finetuned: Path) -> None:
    result = json.loads((finetuned / "result.json").read_text())
    table = pq.read_table(finetuned / "predictions.parquet").to_pydict()
    assert len(table["key"]) == 20 == result["metrics"]["samples"]
    right = np.mean(np.array(table["label"]) == np.array(table["predicted"]))
    assert result["metrics"]["accuracy"] == pytest.approx(right)
    probabilities = np.array(table["probabilities"])
    assert probabilities.shape == (20, 10)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert [row["step"] for row in rows(finetuned) if "eval/accuracy" in row] == [3, 6]


def test_evaluating_the_run_again_gives_the_same_numbers(place: Path, finetuned: Path) -> None:
    run = EvaluateRun(run=str(finetuned), output=str(place / "evaluated"), batch=7)
    metrics = run_evaluate(run, command=[])
    before = json.loads((finetuned / "result.json").read_text())["metrics"]
    assert metrics["accuracy"] == before["accuracy"]
    a, b = (pq.read_table(f / "predictions.parquet").to_pydict() for f in (finetuned, place / "evaluated"))
    assert a["key"] == b["key"]
    assert np.allclose(np.array(a["probabilities"]), np.array(b["probabilities"]), atol=1e-5)
    # Both the run itself and its evaluation say what is known of test clips in all that the weights were trained on.
    for folder in (finetuned, Path(run.output)):
        said = json.loads((folder / "result.json").read_text())["leaks"]
        assert [one["status"] for one in said] == ["same", "unchecked"]
        assert (
            f"cliplift dedupe {place}/shards/unlabelled --against {place}/shards/actions" in said[1]["text"]
        )


def test_export_and_predict_agree_with_the_evaluation(
    place: Path, finetuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file gets the probabilities that the evaluation gives it once it has been packed into a shard."""
    export = run_export(ExportRun(run=str(finetuned), output=str(place / "export")))
    assert {p.name for p in export.iterdir()} >= {"model.safetensors", "config.json", "README.md", "run.yaml"}
    dataset = ShardDataset(str(place / "shards" / "actions"), split="test")
    clip, label = place / "file" / "clip.mp4", dataset.facts(3).label
    clip.parent.mkdir()
    clip.write_bytes(dataset.read(3))
    out = place / "predictions.jsonl"
    failed = run_predict(PredictRun(run=str(export), videos=(str(clip),), output=str(out), top=10))
    assert failed == 0
    (record,) = map(json.loads, out.read_text().splitlines())
    assert abs(sum(c["probability"] for c in record["top"]) - 1) < 1e-4
    assert str(clip) in capsys.readouterr().out
    # The file is encoded once more before it is seen. So is it on its way into a shard, with the same settings.
    assert label is not None
    (clip.parent / "list.csv").write_text(f"path,label\nclip.mp4,{dataset.classes[label]}\n")
    source = {"kind": "csv", "file": str(clip.parent / "list.csv"), "classes": dataset.classes}
    run_shard(
        ShardRun.model_validate(
            {"name": "file", "output": str(place / "shards/file"), "source": source, "workers": 1,
             "splits": {"shares": {"test": 1.0}}}
        )
    )  # fmt: skip
    run = load_run(finetuned / "config.yaml", RUNS).run
    data = run.data.model_copy(update={"shards": (str(place / "shards/file"),), "decoder": "pyav"})
    again = EvaluateRun(
        run=str(export),
        output=str(place / "file/evaluated"),
        data=data,
        views=PredictRun(run="", videos=()).views,
    )
    run_evaluate(again, command=[])
    (expected,) = pq.read_table(place / "file/evaluated/predictions.parquet").to_pydict()["probabilities"]
    found = {c["class"]: c["probability"] for c in record["top"]}
    assert [found[name] for name in dataset.classes] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01, "the clip must tell the classes apart a little"


def test_a_model_without_a_classifier_predicts_nothing(transferred: Path, place: Path) -> None:
    with pytest.raises(ConfigError, match="no classifier") as caught:
        run_predict(PredictRun(run=str(transferred), videos=(str(place / "clip.mp4"),)))
    assert caught.value.key == "run"


def test_predict_counts_what_it_cannot_read(
    place: Path, finetuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = place / "broken.mp4"
    broken.write_bytes(b"not a video")
    assert run_predict(PredictRun(run=str(finetuned), videos=(str(broken), str(place / "gone.mp4")))) == 2
    assert "broken.mp4: cannot be read" in capsys.readouterr().err


def test_predict_slides_over_a_long_video(
    place: Path, finetuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two clips of different classes one after the other: the windows say when which was seen."""
    import av

    dataset = ShardDataset(str(place / "shards" / "actions"), split="test")
    long, out = place / "long.mp4", place / "windows.jsonl"
    seconds = 0.0
    with av.open(str(long), "w") as target:
        stream = target.add_stream("libx264", rate=30)
        stream.width, stream.height = 64, 64
        for i in (0, 5, 10, 15):
            stored = place / "part.mp4"
            stored.write_bytes(dataset.read(i))
            with av.open(str(stored)) as source:
                for frame in source.decode(video=0):
                    seconds += 1 / 30
                    for packet in stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"))):
                        target.mux(packet)
        for packet in stream.encode():
            target.mux(packet)
    run = PredictRun(
        run=str(finetuned),
        videos=(str(long),),
        output=str(out),
        top=10,
        window_seconds=1.0,
        window_stride_seconds=0.5,
    )
    assert run_predict(run) == 0
    (record,) = map(json.loads, out.read_text().splitlines())
    windows = record["windows"]
    starts = [w["start_seconds"] for w in windows]
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert windows[-1]["end_seconds"] == pytest.approx(seconds, abs=0.05)
    assert all(b - a <= 0.5 + 1e-6 for a, b in itertools.pairwise(starts)), "no gap"
    mean: dict[str, float] = {}
    for window in windows:
        for guess in window["top"]:
            mean[guess["class"]] = mean.get(guess["class"], 0.0) + guess["probability"] / len(windows)
    assert {g["class"]: g["probability"] for g in record["top"]} == pytest.approx(mean, abs=1e-5)
    assert " s to " in capsys.readouterr().out


def test_explain_writes_an_overlay_of_every_view(place: Path, finetuned: Path) -> None:
    dataset = ShardDataset(str(place / "shards" / "actions"), split="test")
    clip = place / "explained.mp4"
    clip.write_bytes(dataset.read(1))
    run = ExplainRun(
        run=str(finetuned), videos=(str(clip),), output=str(place / "maps"), views={"clips": 2},  # type: ignore[arg-type]
        class_name=dataset.classes[0],
    )  # fmt: skip
    assert run_explain(run) == 0
    record = json.loads((place / "maps/explained.json").read_text())
    assert record["method"] == "grad_cam"
    (video,) = record["videos"]
    assert [v["class"] for v in video["views"]] == [dataset.classes[0]] * 2
    for view in video["views"]:
        data = (place / "maps" / view["file"]).read_bytes()
        frames = decode_frames(data, range(8), decoder="pyav")
        assert frames.shape == (8, 64, 128, 3), "the clip and its overlay side by side"
        assert np.abs(frames[:, :, :64].astype(int) - frames[:, :, 64:]).mean() > 5
    with pytest.raises(ConfigError, match="does not apply") as caught:
        run_explain(run.model_copy(update={"method": "rollout"}))
    assert caught.value.key == "method"
    with pytest.raises(ConfigError, match="none of the model") as caught:
        run_explain(run.model_copy(update={"class_name": "juggle"}))
    assert caught.value.key == "class_name"


def test_seeds_are_run_one_after_the_other_and_summed_up(
    load: Callable[..., Any], place: Path, transferred: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load("finetune/demo", "repeats", "schedule.steps=2", "seeds=[0,3]",
        f"initialise_from={transferred}", "data.val_split=held_out", "data.val_share=0.2", "data.label_share=0.5",
    )  # fmt: skip
    result = run_all(run, command=["cliplift", "finetune", "finetune/demo"])
    singles = [json.loads((place / f"repeats/seed{s}/result.json").read_text())["metrics"] for s in (0, 3)]
    values = [m["accuracy"] for m in singles]
    assert result.metrics["accuracy"] == pytest.approx(np.mean(values))
    assert result.metrics["accuracy_sd"] == pytest.approx(np.std(values, ddof=1))
    whole = ShardDataset(str(place / "shards/actions"), split="train")
    assert 0 < singles[0]["val_samples"] < 0.5 * len(whole), "validation is carved from train"
    assert "over 2 runs" in capsys.readouterr().out
    again = run_all(run, command=[])
    assert again.metrics == result.metrics
    assert capsys.readouterr().out.count("already finished") == 2
    with pytest.raises(ConfigError, match="single split") as caught:
        run_all(run.model_copy(update={"folds": "all"}), command=[])
    assert caught.value.key == "folds"


def test_a_probe_judges_the_features_at_every_evaluation(load: Callable[..., Any], place: Path) -> None:
    run = load("transfer/demo", "probed", "schedule.steps=2", "engine.global_batch=8",
        "correspondence.negatives_per_clip=2", "data.clips_per_sample=2", "correspondence.same_video_negatives=1",
        f"probe.shards={place}/shards/actions", "probe.test_split=test", "probe.neighbours=5",
    )  # fmt: skip
    metrics = run_stage(run, command=["cliplift", "transfer", "transfer/demo"]).metrics
    assert metrics["probe_chance"] == pytest.approx(0.1)
    assert 0 <= metrics["probe_knn_accuracy"] <= 1
    assert 0.1 < metrics["probe_linear_accuracy"] <= 1, "pixels of the shapes' places alone say something"
    logged = [row for row in rows(place / "probed") if "eval/probe_knn_accuracy" in row]
    assert logged[-1]["eval/probe_knn_accuracy"] == metrics["probe_knn_accuracy"]


def test_teacher_features_are_computed_once(
    load: Callable[..., Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["schedule.steps=3", "engine.global_batch=8", "correspondence.negatives_per_clip=2",
             "teacher.cache_features=true"]  # fmt: skip
    run = load("transfer/demo", "cached", *words)
    assert run_stage(run, command=[]).finished
    (table,) = load_file(place / "cached/teacher_features.safetensors").values()
    train = ShardDataset(str(place / "shards" / "unlabelled"), split="train")
    assert table.shape == (len(train), 1280)
    assert len(table.unique(dim=0)) == len(train)
    seen: list[int] = []
    features = TransferStage._teacher_features

    def counted(self: TransferStage, clips: torch.Tensor) -> torch.Tensor:
        seen.append(len(clips))
        return features(self, clips)

    monkeypatch.setattr(TransferStage, "_teacher_features", counted)
    longer = run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"resume": "never"})})
    run_stage(longer, command=[])
    held_out = ShardDataset(str(place / "shards" / "unlabelled"), split="val")
    assert sum(seen) == len(held_out), "the kept table serves training; only the evaluation asks the teacher"


def test_a_finished_run_is_not_repeated(
    place: Path, repository: Path, finetuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finetuned / "result.json").stat().st_mtime_ns
    run_stage(load_run(finetuned / "config.yaml", RUNS).run, command=[])
    assert "already finished" in capsys.readouterr().out
    assert (finetuned / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data.split=nothing"], "data.split"),
        (["data.val_split=nothing"], "data.val_split"),
        (["engine.global_batch=4000"], "engine.global_batch"),
        (["model.name=efficientnet_lite0"], "model.name"),
        (["teacher.name=t3d_tiny"], "teacher.name"),
        (["model.options={colour: 3}"], "model"),
    ],
)
def test_impossible_runs_name_the_key(load: Callable[..., Any], words: list[str], key: str) -> None:
    run = load("transfer/demo", "impossible", *words)
    with pytest.raises(ConfigError) as caught:
        run_stage(run, command=[])
    assert caught.value.key.startswith(key)


def test_a_missing_test_split_is_told_before_the_training(load: Callable[..., Any], place: Path) -> None:
    run = load("finetune/demo_scratch", "no-test", "test_split=nothing")
    with pytest.raises(ConfigError, match="no split 'nothing' to evaluate") as caught:
        run_stage(run, command=[])
    assert caught.value.key == "test_split"
    assert not (place / "no-test/metrics.jsonl").exists()


def test_unlabelled_shards_cannot_be_classified(load: Callable[..., Any], place: Path) -> None:
    run = load(
        "finetune/demo",
        "impossible",
        f"data.shards={place}/shards/unlabelled",
        "initialise_from=null",
    )
    with pytest.raises(ConfigError, match="no class names"):
        run_stage(run, command=[])


def test_dry_run_derives_the_deepspeed_section(load: Callable[..., Any]) -> None:
    run = load("transfer/demo", "dry", "engine.micro_batch=8", "engine.zero_stage=2",
               "engine.deepspeed={zero_optimization: {overlap_comm: true}}")  # fmt: skip
    derived = json.loads(dry_run(run).split("process:\n")[1])
    assert derived["train_micro_batch_size_per_gpu"] == 8
    assert derived["gradient_accumulation_steps"] == 4
    assert derived["zero_optimization"]["stage"] == 2
    assert derived["zero_optimization"]["overlap_comm"] is True
