"""``cliplift import-weights``: foreign files in, export folders out; mistakes in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cliplift.launch.cli import main
from cliplift.models import create_model, from_pretrained, list_models
from cliplift.models.registry import model_entry
from cliplift.models.state_dicts import match_weights
from cliplift.models.timesformer.huggingface import to_huggingface

SIZES = {"crop": 32, "width": 16, "depth": 2, "heads": 2}
OPTIONS = [word for key, value in SIZES.items() for word in ("--option", f"{key}={value}")]


def timesformer(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = create_model("timesformer_base", **{"num_classes": 5, "in_frames": 4, **SIZES, **options})
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


def imported(source: Path, *words: str, output: Path, model: str = "timesformer_base") -> int:
    return main(["import-weights", str(source), "--model", model, "--output", str(output), *words])


def same_logits(folder: Path, model: nn.Module) -> None:
    x = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(from_pretrained(folder)(x), model(x))


def test_hugging_face_weights_become_an_export_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timesformer(num_classes=7)
    state, _ = to_huggingface(model)
    save_file(state, tmp_path / "model.safetensors")
    source = tmp_path / "model.safetensors"
    assert imported(source, "--in-frames", "4", *OPTIONS, output=tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert f"{len(state) - 2} tensors match" in said
    assert "note: took Hugging Face's names" in said
    assert "classifier: 7 classes, from the source" in said  # 400 is the model's own default
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_classes"], config["in_frames"], config["options"]) == (7, 4, SIZES)
    assert config["extra"]["imported_from"] == "model.safetensors"
    same_logits(tmp_path / "out", model)


def test_options_are_read_as_yaml(tmp_path: Path) -> None:
    model = timesformer(attention="joint", drop_path=0.25)
    torch.save({"model_state": {f"model.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pyth")
    words = ["--option", "attention=joint", "--option", "drop_path=0.25", "--in-frames", "4"]
    assert imported(tmp_path / "w.pyth", *words, *OPTIONS, output=tmp_path / "out") == 0
    options = json.loads((tmp_path / "out/config.json").read_text())["options"]
    assert (options["attention"], options["drop_path"], options["width"]) == ("joint", 0.25, 16)
    same_logits(tmp_path / "out", model)


def test_another_number_of_classes_is_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = create_model("t3d_tiny", num_classes=5)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert (
        imported(
            tmp_path / "w.safetensors", "--num-classes", "3", output=tmp_path / "three", model="t3d_tiny"
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "classifier: 3 classes, FRESHLY INITIALISED" in said
    assert "classifier.weight (5, 224)" in said
    assert from_pretrained(tmp_path / "three").num_classes == 3
    assert (
        imported(tmp_path / "w.safetensors", "--num-classes", "0", output=tmp_path / "none", model="t3d_tiny")
        == 0
    )
    said = capsys.readouterr().out
    assert "no classifier: the model gives features; left out: classifier." in said
    features = from_pretrained(tmp_path / "none")
    assert features.num_classes == 0
    for key, value in features.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


def test_a_source_without_classifier_gives_a_model_without(tmp_path: Path) -> None:
    source = create_model("t3d_tiny", num_classes=0)
    torch.save(source.state_dict(), tmp_path / "trunk.pt")
    assert imported(tmp_path / "trunk.pt", output=tmp_path / "out", model="t3d_tiny") == 0
    assert from_pretrained(tmp_path / "out").num_classes == 0


def test_inflated_2d_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    flat = create_model("densenet_121", num_classes=7)
    torch.save(flat.state_dict(), tmp_path / "flat.pth")
    words = ["import-weights", f"2d:{tmp_path / 'flat.pth'}", "--model", "densenet3d_121"]
    assert main([*words, "--dry-run"]) == 0
    assert "kernels from 2D" in capsys.readouterr().out
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    deep = from_pretrained(tmp_path / "out")
    assert deep.num_classes == 0
    # the centre rule: all of the 2D kernel in one frame of the 3D one
    name = "features.denseblock1.denselayer1.conv2"
    assert torch.equal(deep.get_submodule(name).weight.sum(2), flat.get_submodule(name).weight)


def test_a_dry_run_lists_every_key_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state: dict[str, Tensor] = dict(timesformer().state_dict())
    del state["norm.weight"], state["norm.bias"]
    state["blocks.0.gate"] = torch.zeros(1)
    state["cls_token"] = torch.zeros(1, 1, 9)
    save_file(state, tmp_path / "odd.safetensors")
    words = ["--in-frames", "4", *OPTIONS]
    assert imported(tmp_path / "odd.safetensors", *words, "--dry-run", output=tmp_path / "out") == 1
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [
        "  2 missing in the source:",
        "    norm.weight",
        "    norm.bias",
        "  1 unknown to the model:",
        "    blocks.0.gate",
        "  1 of another shape:",
        "    cls_token (1, 1, 9) for (1, 1, 16)",
        "  classifier: 5 classes, from the source",
    ]
    assert not (tmp_path / "out").exists()
    # for real it is the one sentence of every user's mistake
    assert imported(tmp_path / "odd.safetensors", *words, output=tmp_path / "out") == 2
    assert "2 missing (norm.weight, norm.bias)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.pth", "--model", "t3d_tiny"], "nowhere.pth"),
        (["w.pt", "--model", "t3d_tinny"], "did you mean 't3d_tiny'"),
        (["w.pt", "--model", "t3d_tiny", "--option", "depth"], "write key=value"),
        (["w.pt", "--model", "t3d_tiny", "--option", "depth=[1"], "no readable value"),
        (["w.pt", "--model", "t3d_tiny", "--option", "heads=1"], "has no option 'heads'"),
        (
            ["w.pt", "--model", "timesformer_base", "--option", "crop=32", "--option", "crop=48"],
            "given twice",
        ),
        (["w.pt", "--model", "timesformer_base", "--option", "attention=no"], "attention='no'"),
    ],
)
def test_mistakes(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(create_model("t3d_tiny", num_classes=2).state_dict(), "w.pt")
    assert main(["import-weights", *words, "--output", "out"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_a_folder_in_use_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(create_model("t3d_tiny", num_classes=2).state_dict(), tmp_path / "w.pt")
    assert imported(tmp_path / "w.pt", output=tmp_path / "out", model="t3d_tiny") == 0
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    assert imported(tmp_path / "w.pt", output=tmp_path / "out", model="t3d_tiny") == 2
    assert "holds model.safetensors already" in capsys.readouterr().err
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before
    assert main(["import-weights", str(tmp_path / "w.pt"), "--model", "t3d_tiny"]) == 2
    assert "--output: is needed" in capsys.readouterr().err


FAMILIES = {model_entry(name).build.__module__: name for name in list_models()}


@pytest.mark.parametrize("name", FAMILIES.values())
def test_every_familys_own_weights_match_it(name: str) -> None:
    with torch.device("meta"):
        source, target = create_model(name, num_classes=611), create_model(name)
    match = match_weights(target, source.state_dict())
    assert match.loads
    assert match.classes == 611
    assert not match.head_fits
    assert len(match.matched) + len(match.head_given) == len(source.state_dict())
