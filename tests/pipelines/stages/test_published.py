"""A run whose checkpoints go to a URL: what is there afterwards, who can go on with it, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest
import torch
from safetensors.torch import load_file

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.launch.cli import main
from cliplift.pipelines.distributed.agreement import run_facts
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.repeats import single_runs
from cliplift.pipelines.runs import published
from cliplift.pipelines.runs.published import PublishedRun
from cliplift.pipelines.stages.checkpoint_export import is_checkpoint
from cliplift.pipelines.stages.run import run_stage
from cliplift.sharding import storage
from cliplift.sharding.storage import StorageError, open_store

ALONE = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
URL = "memory://published/run"
WORDS = [
    "schedule.steps=3",
    "evaluation.every_steps=null",
    "checkpoint.keep_best=false",
    f"checkpoint.url={URL}",
]


@pytest.fixture(scope="module")
def finished(load: Callable[..., Any], finetuned: Path) -> Any:
    """The config of a finished run. With ``finetuned``, so that it is made in the process that has the shards."""
    run = load("pretrain/demo", "published", *WORDS)
    run_stage(run, command=["cliplift", "pretrain"])
    return run


def test_the_url_holds_records_weights_and_checkpoints(finished: Any) -> None:
    store, folder = open_store(URL), Path(finished.output)
    names = set(store.list())
    weights = {f"weights/{path.name}" for path in (folder / "weights").iterdir()}
    assert weights | {"config.yaml", "run.json", "result.json", "metrics.jsonl"} <= names
    assert {name for name in names if name.startswith("checkpoints/")} > {
        "checkpoints/step_00000003/COMPLETE.json"
    }
    assert "run.lock" not in names
    for name in (*weights, "result.json", "metrics.jsonl", "config.yaml"):
        assert store.read(name) == (folder / name).read_bytes()


def test_another_machine_sees_that_it_is_finished(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = run_stage(finished.model_copy(update={"output": str(tmp_path / "new")}), command=[])
    assert "already finished" in capsys.readouterr().out
    assert again.metrics == json.loads((Path(finished.output) / "result.json").read_text())["metrics"]


def test_a_stored_checkpoint_is_exported(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The values of its optimizer state are not read."""
    url = f"{URL}/checkpoints/step_00000003"
    assert is_checkpoint(url)
    assert not is_checkpoint(URL)
    store = open_store(url)
    optimizer = store.read("optimizer-rank0.safetensors")
    store.write("optimizer-rank0.safetensors", optimizer[:-1] + bytes([optimizer[-1] ^ 1]))
    try:
        assert main(["export", url, str(tmp_path / "out")]) == 0
    finally:
        store.write("optimizer-rank0.safetensors", optimizer)
    found, expected = (
        load_file(place / "model.safetensors")
        for place in (tmp_path / "out", Path(finished.output) / "weights")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert main(["export", "memory://nothing/step_00000001", str(tmp_path / "o")]) == 2
    assert "memory://nothing/step_00000001" in capsys.readouterr().err


def test_an_upload_of_the_result_that_failed_is_made_up_for(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "memory://published/later"
    checkpoint = finished.checkpoint.model_copy(update={"url": url})
    run = finished.model_copy(update={"output": str(tmp_path / "later"), "checkpoint": checkpoint})
    real = storage.RemoteStore.upload

    def failing(self: storage.RemoteStore, file: Path, name: str) -> None:
        if name.startswith("weights/"):
            raise StorageError(f"{url}/{name}: no answer")
        real(self, file, name)

    with monkeypatch.context() as patch:
        patch.setattr(storage.RemoteStore, "upload", failing)
        with pytest.raises(ConfigError, match=r"is finished, but cannot be uploaded: .* no answer") as caught:
            run_stage(run, command=[])
    assert caught.value.key == "checkpoint.url"
    store = open_store(url)
    assert store.size("result.json") is None
    run_stage(run, command=[])
    assert store.size("result.json")
    assert (
        store.read("weights/model.safetensors")
        == (Path(run.output) / "weights/model.safetensors").read_bytes()
    )


def test_records_are_taken_up_from_the_url_over_older_ones(tmp_path: Path) -> None:
    url, here, there = f"memory://{uuid4().hex}", tmp_path / "here", tmp_path / "there"
    for folder, text in ((here, "new"), (there, "old")):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(text)
    (here / "run.lock").touch()
    PublishedRun(url, here).publish_records()
    PublishedRun(url, there).take_up(ALONE)
    assert {path.name: path.read_text() for path in there.iterdir()} == {"metrics.jsonl": "new"}


def test_ranks_without_a_common_folder_are_told_before_they_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 finds nothing of rank 0 in a folder of its own; rank 0 hears of it and leaves nothing behind."""
    monkeypatch.setattr(published, "SEEN_SECONDS", 0.3)
    monkeypatch.setattr(published, "broadcast_object", lambda value, topology: "x")
    monkeypatch.setattr(published, "barrier", lambda topology: None)
    monkeypatch.setattr(published, "gather_objects", lambda items, topology: list(items))
    published.require_common_folder(tmp_path, ALONE)
    assert list(tmp_path.iterdir()) == []
    second = Topology(rank=1, world_size=2, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(
        ConfigError, match=r"output: rank 1 on .* does not see the folder .*; .*checkpoint\.url"
    ):
        published.require_common_folder(tmp_path, second)
    (tmp_path / ".seen-x").touch()
    published.require_common_folder(tmp_path, second)
    assert (tmp_path / ".seen-x").exists(), "rank 0 removes it"


def test_hosts_may_have_folders_of_their_own_where_a_url_is_given(finished: Any) -> None:
    assert "output" not in run_facts(finished)
    alone = finished.model_copy(update={"checkpoint": finished.checkpoint.model_copy(update={"url": None})})
    assert "output" in run_facts(alone)


def test_each_repeat_has_a_place_of_its_own(repository: Path) -> None:
    words = ["seeds=[1,2]", "checkpoint.url=s3://bucket/x", "model.pretrained=null"]
    run = load_run(repository / "configs/finetune/demo.yaml", RUNS, words).run
    assert [single.checkpoint.url for single in single_runs(run)] == [
        "s3://bucket/x/seed1",
        "s3://bucket/x/seed2",
    ]


@pytest.fixture(scope="module")
def s3(failing_s3: ModuleType) -> Iterator[Any]:
    with failing_s3.served("bucket") as faults:
        yield faults


@pytest.fixture
def unmade_run(tmp_path: Path, repository: Path) -> list[str]:
    """Words of a command line whose data are nowhere."""
    recipe = str(repository / "configs/pretrain/demo.yaml")
    return ["pretrain", recipe, f"output={tmp_path}/run", "data.shards=/nowhere", "track.wandb=disabled"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nosuch://bucket/run", "nosuch://bucket/run: Protocol not known: nosuch"),
        ("s3://absent/run", "bucket does not exist"),
        ("s3://bucket/run", "cannot write: .*Forbidden.*403.*check the credentials"),
        ("s3://", "is no URL such as s3://BUCKET/FOLDER"),
        ("/a/folder", "is no URL such as s3://BUCKET/FOLDER"),
        ("sftp://me:secret@host/run", "holds a password"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_sentence_before_anything_is_read(
    s3: Any, unmade_run: list[str], capsys: pytest.CaptureFixture[str], url: str, said: str
) -> None:
    if "Forbidden" in said:
        s3.share, s3.kinds, s3.only = 1.0, ("403",), "PUT /bucket"
    try:
        assert main([*unmade_run, f"checkpoint.url={url}"]) == 2
    finally:
        s3.calm()
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "checkpoint.url" in sentence
    assert "secret" not in sentence
    assert re.search(said, sentence), sentence


def test_a_url_as_output_says_where_it_belongs(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", str(repository / "configs/pretrain/demo.yaml"), "output=s3://bucket/run"]) == 2
    assert "output: 's3://bucket/run' is a URL, and a run's folder is on a disk" in capsys.readouterr().err
