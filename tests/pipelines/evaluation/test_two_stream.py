"""Fusing streams: hand-made predictions, the published formulas worked by hand, and every way files may not match."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS, FuseRun
from cliplift.configs.sections import ConfigError
from cliplift.launch.cli import main
from cliplift.pipelines.evaluation.fuse import fuse, fused_logits, fused_probabilities, read_stream, run_fuse
from cliplift.pipelines.runs.predictions import read_predictions

KEYS = ("a", "b", "c", "d")
LABELS = (0, 1, 2, 0)
# RGB is right about a and b, flow about b, c and d; together they are right about all but c
RGB = [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.3, 0.4, 0.3]]
FLOW = [[0.4, 0.5, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.6, 0.2, 0.2]]


def write(
    folder: Path,
    probabilities: Sequence[Sequence[float]],
    *,
    keys: Sequence[str] = KEYS,
    labels: Sequence[int] = LABELS,
    logits: Sequence[Sequence[float]] | None = None,
    classes: Sequence[str] = ("run", "jump", "sit"),
) -> str:
    """An evaluation's folder, written column by column and not with the code under test."""
    folder.mkdir(parents=True)
    columns = {
        "key": pa.array(keys, pa.string()),
        "video_id": pa.array([f"video-{k}" for k in keys], pa.string()),
        "shard_url": pa.array(["s/0.tar"] * len(keys), pa.string()),
        "sample_index": pa.array(range(len(keys)), pa.int64()),
        "label": pa.array(labels, pa.int32()),
        "predicted": pa.array([int(np.argmax(p)) for p in probabilities], pa.int32()),
        "probabilities": pa.array(probabilities, pa.list_(pa.float32())),
    }
    if logits is not None:
        columns["logits"] = pa.array(logits, pa.list_(pa.float32()))
    pq.write_table(pa.table(columns), folder / "predictions.parquet")
    (folder / "result.json").write_text(json.dumps({"classes": list(classes)}))
    return str(folder)


def test_probabilities_are_averaged_with_weights() -> None:
    """(1 * 0.6 + 3 * 0.4) / 4 = 0.45, and so on; rows keep adding up to 1."""
    fused = fused_probabilities([np.array(RGB), np.array(FLOW)], (1.0, 3.0))
    np.testing.assert_allclose(fused[0], [0.45, 0.45, 0.1], atol=1e-12)
    np.testing.assert_allclose(fused.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_array_equal(fused_probabilities([np.array(RGB), np.array(FLOW)], (1.0, 0.0)), RGB)


def test_logits_are_brought_to_length_one_first() -> None:
    """(3, 4) has length 5 and (0, -2) length 2: 0.6 and 0.8 + 2 * (-1). A loud stream does not outvote a quiet one."""
    rgb, flow = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[0.0, -2.0], [5.0, 0.0]])
    np.testing.assert_allclose(fused_logits([rgb, flow], (1.0, 2.0)), [[0.6, -1.2], [2.0, 0.0]], atol=1e-12)
    np.testing.assert_allclose(
        fused_logits([1000 * rgb, flow], (1.0, 2.0)), fused_logits([rgb, flow], (1.0, 2.0)), atol=1e-12
    )


def test_two_streams_are_better_than_each(tmp_path: Path) -> None:
    runs = (write(tmp_path / "rgb", RGB), write(tmp_path / "flow", FLOW))
    run = FuseRun(runs=runs, output=str(tmp_path / "fused"))
    metrics = run_fuse(run, command=["cliplift", "fuse"])
    # means: a .5 .4, b .15 .65, c .15 .55 .3, d .45 .3
    assert metrics["accuracy"] == 0.75
    assert (metrics["stream_1_accuracy"], metrics["stream_2_accuracy"]) == (0.5, 0.75)
    assert metrics["samples"] == 4
    rows = read_predictions(tmp_path / "fused" / "predictions.parquet")
    assert rows.predicted.tolist() == [0, 1, 1, 0]
    np.testing.assert_allclose(rows.probabilities[2], [0.15, 0.55, 0.3], atol=1e-6)
    result = json.loads((tmp_path / "fused" / "result.json").read_text())
    assert result["classes"] == ["run", "jump", "sit"]
    assert result["fused"] == [f"{folder}/predictions.parquet" for folder in runs]
    assert result["weights"] == [1.0, 1.0]
    assert load_run(tmp_path / "fused" / "config.yaml", RUNS).run == run


def test_rows_are_matched_by_key_not_by_place(tmp_path: Path) -> None:
    rgb = read_stream(write(tmp_path / "rgb", RGB))
    turned = write(tmp_path / "flow", FLOW[::-1], keys=KEYS[::-1], labels=LABELS[::-1])
    fused = fuse([rgb, read_stream(turned)], method="probabilities", weights=(1.0, 1.0))
    assert fused.keys == KEYS
    assert fused.labels.tolist() == list(LABELS)
    np.testing.assert_allclose(fused.probabilities, (np.array(RGB) + np.array(FLOW)) / 2, atol=1e-6)


def test_the_published_fusion_of_logits(tmp_path: Path) -> None:
    """arXiv 2008.01232's evaluation: each stream's logits over their norm, added, and the largest wins."""
    rgb = [[4.0, 3.0, 0.0], [0.0, 5.0, 0.0], [3.0, 3.1, 0.0], [0.0, 1.0, 0.0]]
    flow = [[6.0, 8.0, 0.0], [0.0, 9.0, 1.0], [0.0, 0.0, 2.0], [7.0, 0.0, 0.0]]
    folders = [write(tmp_path / name, RGB, logits=logits) for name, logits in (("rgb", rgb), ("flow", flow))]
    expected = np.zeros((4, 3))
    for stream in (rgb, flow):
        for row, scores in enumerate(stream):
            expected[row] += np.array(scores) / sum(s * s for s in scores) ** 0.5
    fused = fuse([read_stream(f) for f in folders], method="l2_logits", weights=(1.0, 1.0))
    np.testing.assert_allclose(
        np.log(fused.probabilities) - np.log(fused.probabilities[:, :1]),
        expected - expected[:, :1],
        atol=1e-5,
    )
    run = FuseRun(runs=tuple(folders), output=str(tmp_path / "fused"), method="l2_logits")
    assert "calibration_error" not in run_fuse(run, command=["cliplift"])


def test_logits_are_needed_for_the_fusion_of_logits(tmp_path: Path) -> None:
    streams = [read_stream(write(tmp_path / "rgb", RGB)), read_stream(write(tmp_path / "flow", FLOW))]
    with pytest.raises(ConfigError, match=r"needs logits.*views\.average=logits"):
        fuse(streams, method="l2_logits", weights=(1.0, 1.0))


def test_an_evaluation_below_its_run_is_found(tmp_path: Path) -> None:
    write(tmp_path / "run" / "evaluate", RGB)
    assert read_stream(str(tmp_path / "run")).rows.keys == KEYS
    assert read_stream(str(tmp_path / "run" / "evaluate" / "predictions.parquet")).rows.classes == (
        "run",
        "jump",
        "sit",
    )
    with pytest.raises(ConfigError, match=r"holds no predictions\.parquet; run `cliplift evaluate`"):
        read_stream(str(tmp_path))


def test_unlabelled_samples_are_fused_and_only_counted(tmp_path: Path) -> None:
    runs = tuple(write(tmp_path / name, p, labels=(-1,) * 4) for name, p in (("rgb", RGB), ("flow", FLOW)))
    run = FuseRun(runs=runs, output=str(tmp_path / "fused"))
    assert run_fuse(run, command=["cliplift"]) == {"samples": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": ("a", "b", "c", "e")}, "different samples: 1 missing, 1 more .first 'd'"),
        ({"keys": ("a", "b", "c", "c")}, "has 1 samples twice .first 'c'"),
        ({"labels": (0, 1, 1, 0)}, "labels 'c' 1, and .* 2"),
        ({"classes": ("run", "sit", "jump")}, "has other classes"),
        ({"logits": [[1.0, 2.0]] * 4}, "has 8 logits for 12 probabilities"),
    ],
)
def test_streams_of_other_samples_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    rgb, flow = write(tmp_path / "rgb", RGB), write(tmp_path / "flow", FLOW, **changes)
    with pytest.raises(ConfigError, match=message):
        fuse([read_stream(rgb), read_stream(flow)], method="probabilities", weights=(1.0, 1.0))


def test_more_classes_are_refused(tmp_path: Path) -> None:
    rgb, flow = write(tmp_path / "rgb", RGB), write(tmp_path / "flow", [[0.25] * 4] * 4)
    with pytest.raises(ConfigError, match=r"other classes \(4\)"):
        fuse([read_stream(rgb), read_stream(flow)], method="probabilities", weights=(1.0, 1.0))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (0.0, 0.0)])
def test_impossible_weights_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"weights: .* must be 2 numbers"):
        FuseRun(runs=("a", "b"), output="c", weights=weights)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rgb, flow = write(tmp_path / "rgb", RGB), write(tmp_path / "flow", FLOW)
    assert main(["fuse", rgb, flow, "weights=[1,1.5]", f"output={tmp_path / 'out'}"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "out" / "predictions.parquet").is_file()
    assert main(["fuse", rgb]) == 2
    assert "runs" in capsys.readouterr().err
