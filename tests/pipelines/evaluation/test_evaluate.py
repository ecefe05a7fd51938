"""Evaluation does not depend on how the samples are batched or dealt, and averages what the config says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cliplift.configs.data import DataConfig
from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.models import create_model
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.evaluation.evaluate import classification_metrics, classify_split
from cliplift.pipelines.evaluation.fuse import read_stream
from cliplift.pipelines.evaluation.predict import classify
from cliplift.pipelines.runs.predictions import Predictions
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos

HERE = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> DataConfig:
    folder = tmp_path_factory.mktemp("evaluate")
    write_demo_videos(
        folder / "v",
        seed=3,
        train_per_class=1,
        val_per_class=1,
        test_per_class=1,
        unlabelled=1,
        size_pixels=64,
    )
    words = [f"source.root={folder}/v/labelled", f"output={folder}/s", "workers=2"]
    run_shard(load_run(repository / "configs" / "shard" / "demo_actions.yaml", RUNS, words).run)
    tree = {
        "shards": f"{folder}/s",
        "sampling": {"frames": 8, "stride": 1},
        "crop_pixels": 32,
        "cache_decoded_mib": 64,
    }
    return DataConfig.model_validate(tree | {"views": {"clips": 2, "crops": 3}})


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("t3d_tiny", num_classes=10, in_frames=8).eval()


def test_any_batch_size_gives_the_same(data: DataConfig, network: torch.nn.Module) -> None:
    found = [classify_split(network, data, split="test", batch=b, topology=HERE) for b in (1, 6, 18, 100)]
    for other in found[1:]:
        assert other.keys == found[0].keys
        assert np.allclose(other.probabilities, found[0].probabilities, atol=1e-6)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_views_are_averaged_as_configured(data: DataConfig, network: torch.nn.Module, average: str) -> None:
    changed = data.model_copy(update={"views": data.views.model_copy(update={"average": average})})
    found = classify_split(network, changed, split="test", batch=12, topology=HERE)
    views = DeviceAugment(data.augment, network.input_spec, training=False)
    with torch.no_grad():
        for batch in EvalLoader(changed, split="test", batch=6, rank=0, world_size=1):
            logits = network(views(batch))
            assert len(logits) == 6
            mean = logits.softmax(1).mean(0) if average == "probabilities" else logits.mean(0).softmax(0)
            row = found.sample_index.tolist().index(int(batch.sample_index[0]))
            assert np.allclose(found.probabilities[row], mean.numpy(), atol=1e-5)


def test_several_labels_have_probabilities_of_their_own(data: DataConfig, network: torch.nn.Module) -> None:
    """As in the evaluation of such a network: a softmax would let one label take from another."""
    found = classify_split(network, data, split="test", batch=12, topology=HERE, multi_label=True)
    batch = next(iter(EvalLoader(data, split="test", batch=6, rank=0, world_size=1)))
    classified = classify(network, batch, data, multi_label=True)
    row = found.sample_index.tolist().index(int(batch.sample_index[0]))
    assert np.allclose(classified, found.probabilities[row], atol=1e-5)
    assert classified.sum() > 2
    assert classify(network, batch, data, multi_label=False).sum() == pytest.approx(1)


def test_the_network_is_left_as_it_was(data: DataConfig, network: torch.nn.Module) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    classify_split(network, data, split="test", batch=100, topology=HERE)
    assert network.training
    network.eval()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_metrics_of_made_predictions() -> None:
    probabilities = np.eye(6, dtype=np.float32)[[0, 1, 2, 2, 4, 0]]
    predictions = Predictions(
        keys=tuple("abcdef"),
        video_ids=tuple("abcdef"),
        shard_urls=("x",) * 6,
        sample_index=np.arange(6),
        labels=np.array([0, 1, 2, 3, 4, 5]),
        targets=None,
        probabilities=probabilities,
        classes=tuple("ABCDEF"),
    )
    metrics = classification_metrics(predictions)
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["mean_class_accuracy"] == pytest.approx(4 / 6)
    assert metrics["chance"] == pytest.approx(1 / 6)
    assert metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"]
    assert metrics["calibration_error"] == pytest.approx(2 / 6)
    assert "top5_accuracy" in metrics


def test_averaged_logits_are_written_beside_the_probabilities(
    data: DataConfig, network: torch.nn.Module, tmp_path: Path
) -> None:
    """Fusing streams by their logits needs them: softmax has lost a constant. Averaged probabilities have none."""
    for average in ("logits", "probabilities"):
        views = data.views.model_copy(update={"average": average})
        found = classify_split(
            network, data.model_copy(update={"views": views}), split="test", batch=6, topology=HERE
        )
        found.write(tmp_path / average / "predictions.parquet")
    stream = read_stream(str(tmp_path / "logits"))
    assert stream.rows.logits is not None
    np.testing.assert_allclose(
        torch.tensor(stream.rows.logits).softmax(dim=1).numpy(), stream.rows.probabilities, atol=1e-6
    )
    assert read_stream(str(tmp_path / "probabilities")).rows.logits is None
