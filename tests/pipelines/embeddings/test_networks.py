"""Frozen networks by word, and clips embedded one by one: the same whatever stands beside them."""

from __future__ import annotations

import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import TranscodeConfig
from cliplift.models import create_model
from cliplift.models.factory import save_pretrained
from cliplift.models.protocol import ModelError
from cliplift.pipelines.embeddings.embed import NetworkEmbedder
from cliplift.pipelines.embeddings.networks import frozen_network, is_embedding, weights_sha256
from cliplift.sharding.scoring.embed import ClipPlace
from cliplift.sharding.scoring.run import ScoreError
from cliplift.sharding.video.transcode import encode_array

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small 3D classifier with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("export")
    return save_pretrained(create_model("t3d_tiny", num_classes=3), folder / "net", name="t3d_tiny")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[ClipPlace]:
    """Three clips, one after the other in a file, and bytes that are no video."""
    folder = tmp_path_factory.mktemp("clips")
    found, data = [], b""
    for number, frames in enumerate((40, 7, 25)):
        pictures = np.random.default_rng(number).integers(0, 255, (frames, 6, 8, 3)).repeat(8, 1).repeat(8, 2)
        clip = encode_array(
            pictures.astype(np.uint8), fps=Fraction(25), config=TranscodeConfig(preset="ultrafast")
        )
        found.append(
            ClipPlace(str(folder), "tar", len(data), len(clip), zlib.crc32(clip), frames, 25.0, 48, 64)
        )
        data += clip
    found.append(ClipPlace(str(folder), "tar", len(data), 4, zlib.crc32(b"none"), 10, 25.0, 48, 64))
    (folder / "tar").write_bytes(data + b"none")
    return found


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_clip_has_the_same_vector_alone_and_among_others_and_from_any_worker(
    export: Path, places: list[ClipPlace], workers: int
) -> None:
    frozen = frozen_network(f"embedding:{export}")
    embedder = NetworkEmbedder(frozen, device=CPU, workers=0)
    alone = [next(iter(embedder.embed([place]))) for place in places]
    together = list(NetworkEmbedder(frozen, device=CPU, workers=workers).embed(places))
    for a, b in zip(alone, together, strict=True):
        assert (a.values is None) == (b.values is None)
        assert a.values is None or np.array_equal(a.values, b.values)
        assert np.array_equal(a.sketch, b.sketch)
    assert alone[3].values is None
    assert "cannot be opened" in alone[3].reason
    assert [len(one.sketch) for one in alone] == [13, 3, 8, 0]
    broken = places[0]._replace(crc32=1)
    with pytest.raises(ScoreError, match="crc32 differs"):
        list(embedder.embed([broken]))


def test_the_vector_is_the_networks_features_of_its_clip(export: Path, places: list[ClipPlace]) -> None:
    from cliplift.pipelines.embeddings.embed import seen_clip
    from cliplift.pipelines.evaluation.evaluate import load_network
    from cliplift.sharding.scoring.embed import read_clip

    frozen = frozen_network(f"embedding:{export}")
    (found,) = NetworkEmbedder(frozen, device=CPU, workers=0).embed(places[:1])
    clip = seen_clip(read_clip(places[0]), places[0], frozen.data).frames
    spec = frozen.network.input_spec
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (spec.mean, spec.std))
    network = load_network(str(export))[0]
    network.reset_classifier(0)
    with torch.no_grad():
        expected = network(((clip.permute(3, 0, 1, 2) / 255 - mean) / std).unsqueeze(0))[0]
    assert found.values is not None
    np.testing.assert_allclose(found.values, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_frames_of_an_image_network_are_averaged(tmp_path: Path, places: list[ClipPlace]) -> None:
    torch.manual_seed(1)
    network = create_model("efficientnet_lite0", num_classes=0)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    frozen = frozen_network(f"embedding:efficientnet_lite0={tmp_path / 'weights.pt'}")
    assert frozen.facts.model == "efficientnet_lite0"
    assert frozen.facts.weights_sha256 == weights_sha256(network.state_dict())
    assert (frozen.facts.width, frozen.data.sampling.frames) == (1280, 8)
    clip = torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        each = torch.stack([network.eval()(clip[:, :, t])[0] for t in range(8)])
    torch.testing.assert_close(frozen.features(clip), each.mean(dim=0), rtol=1e-4, atol=1e-5)


def test_other_weights_are_another_embedding(export: Path, tmp_path: Path) -> None:
    facts = frozen_network(f"embedding:{export}").facts
    assert facts == frozen_network(f"embedding:{export}").facts
    torch.manual_seed(7)
    other = save_pretrained(create_model("t3d_tiny", num_classes=3), tmp_path / "net", name="t3d_tiny")
    again = frozen_network(f"embedding:{other}").facts
    assert (again.model, again.input) == (facts.model, facts.input)
    assert again.name != facts.name


@pytest.mark.parametrize(
    ("word", "error", "says"),
    [
        ("embedding:t3d_tiny", ConfigError, "t3d_tiny has no weights at hand.*embedding:t3d_tiny=FILE"),
        ("embedding:t3d_tinny", ModelError, "unknown model 't3d_tinny': did you mean 't3d_tiny'"),
        ("embedding:t3d_tiny=/nowhere.pt", ModelError, "there is no such file"),
    ],
)
def test_a_word_that_names_no_network_is_one_sentence(word: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        frozen_network(word)


def test_words() -> None:
    assert [is_embedding(word) for word in ("embedding", "embedding:x", "embeddings", "motion")] == [
        True, True, False, False
    ]  # fmt: skip
