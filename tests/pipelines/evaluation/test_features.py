"""Features kept while evaluating, and their map in the report."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from cliplift.configs.sections import ConfigError
from cliplift.models import create_model
from cliplift.pipelines.evaluation.features import ClassifierInputs, plane
from cliplift.pipelines.report.charts import scatter
from cliplift.pipelines.runs.predictions import FEATURES, read_features


def test_features_are_the_classifiers_input() -> None:
    torch.manual_seed(0)
    model = create_model("t3d_tiny", num_classes=3).eval()
    clips = torch.randn(4, 3, 8, 64, 64)
    inputs = ClassifierInputs(model)
    with torch.no_grad():
        model(clips)
        found = inputs.take(4)
        model(clips)
        assert inputs.take(5) is None, "a row for every clip, or nothing"
        inputs.close()
        model(clips)
        assert inputs.take(4) is None
        model.reset_classifier(0)  # type: ignore[operator]
        expected = model(clips)
    assert found is not None
    assert torch.allclose(found, expected, atol=1e-5)


def test_clusters_stay_together_in_the_plane() -> None:
    """Nearest neighbours in the plane are of the same cluster, and the map is the same every time."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 25)
    features = rng.normal(size=(4, 32))[labels] * 6 + rng.normal(size=(100, 32))
    points = plane(features)
    distances = ((points[:, None] - points[None]) ** 2).sum(-1) + np.eye(100) * 1e9
    assert (labels[distances.argmin(axis=1)] == labels).mean() == 1.0
    assert np.array_equal(points, plane(features))
    svg = scatter(points, labels.tolist(), ["a<b", "b", "c", "d"], title="t")
    assert svg.count("<circle") == 100
    assert "a&lt;b" in svg


def test_features_of_another_evaluation_are_not_shown(tmp_path: Path) -> None:
    np.save(tmp_path / FEATURES, np.zeros((6, 3), np.float16))
    assert read_features(tmp_path, rows=6) is not None
    assert read_features(tmp_path, rows=7) is None
    assert read_features(tmp_path / "none", rows=6) is None


def claims(shape: tuple[int, ...], *, dtype: str = "<f2") -> bytes:
    """A file whose header claims this shape, with a few bytes behind it."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + b"\0" * 64


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an array",
        claims((10**12, 1280)),
        claims((4, 4))[:60],
        claims((32,)),
        claims((4, 4), dtype="<i4"),
    ],
    ids=["empty", "text", "claims terabytes", "cut", "one axis", "integers"],
)
def test_damaged_features_are_named_and_take_no_memory(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FEATURES).write_bytes(content)
    with pytest.raises(ConfigError, match=r"features\.npy"):
        read_features(tmp_path, rows=6)
