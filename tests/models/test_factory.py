"""Weights in and out: export folders, public files, heads of another size, and refusals that say what is wrong."""

import json
import logging
import pickle
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cliplift.models import ModelError, create_model
from cliplift.models.factory import from_pretrained, load_pretrained, push, read_config, save_pretrained
from cliplift.models.state_dicts import head_prefix, read_state


def tiny(num_classes: int = 5, **options: object) -> nn.Module:
    return create_model("t3d_tiny", num_classes=num_classes, **options).eval()


def same(a: nn.Module, b: nn.Module, *, but: str = "\0") -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items() if not k.startswith(but))


def test_a_folder_gives_the_same_model_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"growth": 8, "ttl_widths": (4, 8, 8)}
    model = tiny(in_frames=12, **options)
    extra = {"classes": ["a", "b"]}
    folder = save_pretrained(model, tmp_path / "out", name="t3d_tiny", options=options, extra=extra)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = read_config(folder)
    assert config["extra"] == extra
    assert config["input"]["frames"] == 12
    again = from_pretrained(folder)
    x = torch.randn(2, 3, 12, 48, 48)
    assert not again.training
    assert torch.equal(again(x), model(x))
    assert again.input_spec == model.input_spec


def test_a_head_of_another_size_is_left_fresh_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    source = tiny(5)
    folder = save_pretrained(source, tmp_path, name="t3d_tiny")
    target = tiny(3)
    fresh = target.classifier.weight.clone()
    with caplog.at_level(logging.INFO):
        report = load_pretrained(target, folder)
    assert set(report.head_skipped) == set(report.head_fresh) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(target.classifier.weight, fresh)
    assert same(source, target, but="classifier")
    assert "classifier.weight (5, 224)" in caplog.text
    assert "classifier.weight (3, 224)" in caplog.text
    assert from_pretrained(folder, num_classes=3)(torch.zeros(1, 3, 8, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(("given", "wanted"), [(0, 4), (4, 0), (0, 0)])
def test_a_missing_head_on_either_side_is_fine(tmp_path: Path, given: int, wanted: int) -> None:
    source, target = tiny(given), tiny(wanted)
    report = load_pretrained(target, save_pretrained(source, tmp_path, name="t3d_tiny"))
    assert len(report.head_skipped) == (2 if given else 0)
    assert len(report.head_fresh) == (2 if wanted else 0)
    assert same(source, target, but="classifier")


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_files_load_in_their_usual_wrappings(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    source, target = tiny(), tiny()
    state: dict[str, object] = {prefix + k: v for k, v in source.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "weights.pth")
    report = load_pretrained(target, tmp_path / "weights.pth")
    assert same(source, target)
    assert report.loaded == len(state)


def test_create_model_reads_a_safetensors_file(tmp_path: Path) -> None:
    source = tiny()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    assert same(
        source, create_model("t3d_tiny", num_classes=5, pretrained=str(tmp_path / "weights.safetensors"))
    )


def test_create_model_inflates_2d_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    flat = create_model("resnet_50", num_classes=7)
    torch.save(flat.state_dict(), tmp_path / "flat.pth")
    deep = create_model("p3d_resnet50", num_classes=2, pretrained=f"2d:{tmp_path / 'flat.pth'}")
    kernel = deep.get_submodule("layer3.1.conv2").weight
    assert torch.equal(kernel[:, :, 0], flat.get_submodule("layer3.1.conv2").weight)
    assert deep.get_submodule("fc").weight.shape == (2, 2048)


def test_missing_unexpected_and_misshapen_tensors_are_refused_by_name(tmp_path: Path) -> None:
    state = dict(tiny().state_dict())
    target = tiny()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    del state["features.norm5.weight"]
    state["features.extra"] = torch.zeros(1)
    state["features.conv0.weight"] = torch.zeros(16, 3, 1, 1, 1)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ModelError) as caught:
        load_pretrained(target, tmp_path / "w.safetensors")
    for part in (
        "1 missing (features.norm5.weight)",
        "1 unexpected (features.extra)",
        "1 of another shape (features.conv0.weight (16, 3, 1, 1, 1) for (16, 3, 3, 3, 3))",
        "Check the model's name and options",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in before.items()), "nothing was half loaded"


def test_old_files_without_batch_counters_load(tmp_path: Path) -> None:
    source = tiny()
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    assert load_pretrained(tiny(), tmp_path / "w.safetensors").loaded == len(state)


class Exploit:
    ran = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (setattr, (Exploit, "ran", True))


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save({"state_dict": Exploit()}, tmp_path / "evil.pth")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Exploit(), protocol=2))
    for name in ("evil.pth", "raw.pt"):
        with pytest.raises(ModelError, match="holds pickled objects beside tensors") as caught:
            load_pretrained(tiny(), tmp_path / name)
        assert "weights_only" not in str(caught.value), (
            "torch's advice to switch the safeguard off is not shown"
        )
        assert "\n" not in str(caught.value)
    assert not Exploit.ran


def test_a_small_file_cannot_expand_to_a_large_one(tmp_path: Path) -> None:
    torch.save({"zeros": torch.zeros(1_000_000)}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in stored.infolist():
            bomb.writestr(entry.filename, stored.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 10_000
    assert torch.load(tmp_path / "bomb.pt", weights_only=True)["zeros"].shape == (
        1_000_000,
    )  # torch inflates it
    with pytest.raises(ModelError, match=r"bomb\.pt: its tensors are compressed"):
        load_pretrained(tiny(), tmp_path / "bomb.pt")
    with pytest.raises(ModelError, match="stored"):
        load_pretrained(tiny(), tmp_path / "stored.pt")


def test_a_torch_file_is_mapped_and_not_read_whole(tmp_path: Path) -> None:
    """A rank of many needs its part of it alone, and the network is in memory already."""
    source = tiny()
    torch.save({"model": source.state_dict()}, tmp_path / "w.pt")
    before = (tmp_path / "w.pt").read_bytes()
    state = read_state(source, tmp_path / "w.pt")
    places = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [
        [int(end, 16) for end in place[0].split("-")] for place in places if place[-1].endswith("/w.pt")
    ]
    assert all(any(a <= v.data_ptr() < b for a, b in mapped) for v in state.values() if v.numel())
    next(iter(state.values())).zero_()
    assert (tmp_path / "w.pt").read_bytes() == before, "the file is another's"


def test_a_torch_file_of_the_old_kind_is_read(tmp_path: Path) -> None:
    """Before torch 1.6: no archive, so that it cannot be mapped."""
    source, target = tiny(), tiny()
    torch.save(source.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_pretrained(target, tmp_path / "old.pth")
    assert same(source, target)


def test_an_archive_that_cannot_be_listed_is_not_passed_on(tmp_path: Path) -> None:
    """torch reads some archives that Python does not: what is in them would be inflated unseen."""
    path = tmp_path / "names.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/é", b"0" * 1_000_000)
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(ModelError, match=r"names\.pt: a damaged archive"):
        load_pretrained(tiny(), path)


def test_sources_that_are_not_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"pretrained='nowhere\.pth': no such file"):
        load_pretrained(tiny(), "nowhere.pth")
    (tmp_path / "x.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_pretrained(tiny(), tmp_path / "x.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="holds no state dict"):
        load_pretrained(tiny(), tmp_path / "list.pth")
    with pytest.raises(ModelError, match=r"no config\.json there"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": 99, "name": "t3d_tiny"}))
    with pytest.raises(ModelError, match="not a cliplift model of format 1"):
        from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="neither an export folder nor a Hub id"):
        from_pretrained("../no/such/folder")


class FakeHub(types.ModuleType):
    """Stands in for huggingface_hub: keeps what is uploaded in a folder, serves it back."""

    def __init__(self, store: Path) -> None:
        super().__init__("huggingface_hub")
        self.store, self.calls = store, []

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append(("download", repo_id, revision, tuple(allow_patterns)))
        return str(self.store / repo_id)

    def HfApi(self) -> "FakeHub":
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(
        self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str
    ) -> types.SimpleNamespace:
        target = self.store / repo_id
        target.mkdir(parents=True)
        for pattern in allow_patterns:
            for file in Path(folder_path).glob(pattern):
                (target / file.name).write_bytes(file.read_bytes())
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def test_push_and_pull_through_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    model = tiny()
    folder = save_pretrained(model, tmp_path / "export", name="t3d_tiny")
    (folder / "optimizer.bin").write_bytes(b"large and private")
    assert push(folder, "lab/t3d") == "https://hub/lab/t3d/commit/1"
    assert sorted(p.name for p in (tmp_path / "hub/lab/t3d").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    again = from_pretrained("lab/t3d", revision="v1")
    assert same(model, again)
    assert hub.calls == [
        ("create", "lab/t3d", True, True),
        (
            "download",
            "lab/t3d",
            "v1",
            (
                "model.safetensors",
                "model-*-of-*.safetensors",
                "model.safetensors.index.json",
                "config.json",
            ),
        ),
    ]
    with pytest.raises(ModelError, match="no config"):
        push(tmp_path, "lab/t3d")


def test_without_the_extra_the_hub_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"pip install 'cliplift\[hub\]'"):
        from_pretrained("lab/t3d")


def test_heads_are_found_by_name() -> None:
    assert head_prefix(tiny()) == "classifier."
    with torch.device("meta"):
        assert head_prefix(create_model("p3d_63")) == "fc."
        assert head_prefix(create_model("c3d")) == "fc8."
    plain = nn.Module()
    assert head_prefix(plain) == ""
    plain.head = nn.Linear(1, 1)
    assert head_prefix(plain) == "head."


def test_settings_that_are_not_json_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"options and extra must be plain JSON values .*set"):
        save_pretrained(tiny(), tmp_path / "out", name="t3d_tiny", extra={"classes": {1, 2}})
    assert not (tmp_path / "out").exists()


def test_saved_tensors_are_plain_and_on_the_cpu(tmp_path: Path) -> None:
    model = tiny().to(memory_format=torch.channels_last_3d)
    folder = save_pretrained(model, tmp_path, name="t3d_tiny")
    state = load_file(folder / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(v.is_contiguous() and v.device.type == "cpu" for v in state.values())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5), ("name", None), ("num_classes", -1), ("num_classes", "x"), ("num_classes", 10**12),
        ("num_classes", True), ("num_classes", 2.5), ("in_frames", 0), ("in_frames", "4"), ("in_frames", 10**9),
        ("options", []), ("options", {"growth": 10**12}), ("extra", 5), ("extra", {"classes": 5}),
        ("extra", {"classes": [1, 2, 3]}),
    ],
)  # fmt: skip
def test_a_damaged_config_of_an_export_is_one_sentence(tmp_path: Path, key: str, value: object) -> None:
    save_pretrained(
        create_model("t3d_tiny", num_classes=3, in_frames=4), tmp_path, name="t3d_tiny", options={}
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ModelError, match=rf"config\.json: {key}"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"format": 3}', b"{}"])
def test_a_config_of_an_export_that_is_none_is_one_sentence(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        from_pretrained(tmp_path)
