"""``cliplift check``: each thing that can be wrong is found, with the number that repairs it."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.launch.check import cost as check_cost
from cliplift.launch.check import fit as check_module
from cliplift.launch.check.cost import Cost, logged_speed
from cliplift.launch.check.findings import Finding, exit_code, table
from cliplift.launch.check.fit import Known, check, check_fit, check_tracking, unreachable
from cliplift.launch.check.machine import Machine, choose_machine
from cliplift.launch.cli import main
from cliplift.pipelines.cost.memory_plan import Sizes
from cliplift.pipelines.data.source import ClipSource
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos

GIB = 2**30
HOST = Machine(nodes=1, ranks_per_node=1, gpu=None, memory_bytes=16 * GIB, peak_tflops=None, cores_per_node=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    folder = tmp_path_factory.mktemp("check")
    write_demo_videos(
        folder / "videos", seed=1, train_per_class=2, val_per_class=1, test_per_class=1, unlabelled=6,
        size_pixels=64,
    )  # fmt: skip
    words = [f"source.root={folder}/videos/labelled", f"output={folder}/shards", "workers=2"]
    run_shard(load_run(repository / "configs" / "shard" / "demo_actions.yaml", RUNS, words).run)
    return folder / "shards"


def run_of(repository: Path, shards: Path, *words: str, recipe: str = "pretrain/demo") -> Any:
    basis = [f"data.shards={shards}", "output=nowhere", "track.wandb=disabled"]
    return load_run(repository / "configs" / f"{recipe}.yaml", RUNS, [*basis, *words]).run


def by_subject(findings: Iterable[Finding]) -> dict[str, Finding]:
    listed = list(findings)
    print(table(listed))
    return {f.subject: f for f in listed}


def fit(repository: Path, shards: Path, *words: str, recipe: str = "pretrain/demo") -> dict[str, Finding]:
    """The rows before anything is measured."""
    return by_subject(check_fit(run_of(repository, shards, *words, recipe=recipe), HOST, Known()))


def cost_of(repository: Path, shards: Path, *words: str, machine: Machine = HOST) -> dict[str, Finding]:
    """The rows of what it costs, at a given speed, so that nothing has to be tried out."""
    run = run_of(repository, shards, "track.peak_tflops=1", *words)
    train = ClipSource(run.data, split="train")
    return by_subject(check_cost.check_cost(Cost(run=run, machine=machine, classes=10, train=train, mfu=0.5)))


def test_a_run_that_works(repository: Path, shards: Path) -> None:
    findings = check(run_of(repository, shards), HOST, mfu=None)
    found = {f.subject: f for f in findings}
    assert exit_code(findings) == 0, table(findings)
    assert found["data, train"].found == "20 clips"
    assert found["labels"].found == "10 classes with 2 to 2 clips"
    assert found["batch"].found.startswith(
        "16 clips = 1 ranks x 16 x 1 accumulation steps; 1 steps per epoch, 4 clips"
    )
    assert found["length"].found.startswith("300 steps, 240.00 epochs, 4800 clips")
    assert "one step tried on this CPU" in found["time"].found
    for name in ("model", "memory per rank", "activations", "decoding", "disk reads", "disk", "wandb"):
        assert found[name].status == "ok", name


def test_the_command_exits_1_with_the_number_to_change(
    shards: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["check", "pretrain/demo", f"data.shards={shards}", f"output={tmp_path}/run"]
    assert main([*words, "engine.global_batch=64"]) == 1
    assert "engine.global_batch=20 or less" in capsys.readouterr().out
    assert main([*words, "--nodes", "3"]) == 1
    assert "multiple of 3" in capsys.readouterr().out
    assert main([*words, "--gpu", "h200", "--gpus", "2", "--nodes", "4", "--write-speed", "2"]) == 0
    text = capsys.readouterr().out
    assert "4 node(s) of 2 x h200" in text
    assert re.search(r"per checkpoint, \d+\.\d\d written by each rank", text)
    assert re.search(r"saving.* of each node in \d+\.\d s at 2 GB/s, while training goes on", text)
    assert "25 % MFU of 494 TFLOPS, assumed" in text
    assert not (tmp_path / "run").exists(), "a check leaves nothing behind"


def test_a_price_is_that_of_all_gpus_and_all_runs(repository: Path, shards: Path) -> None:
    """300 steps of 16 clips at 1 TFLOP/s and half of it reached, on 2 nodes of 4."""
    machine = Machine(
        nodes=2, ranks_per_node=4, gpu="h200", memory_bytes=141e9, peak_tflops=1, cores_per_node=8,
        price_per_hour=3.5,
    )  # fmt: skip
    run = run_of(repository, shards, "track.peak_tflops=1")
    train = ClipSource(run.data, split="train")
    rows = by_subject(
        check_cost.check_cost(Cost(run=run, machine=machine, classes=10, train=train, mfu=0.5, runs=3))
    )
    hours = float(re.findall(r"^([\d.]+) h at", rows["time"].found)[0])
    pattern = r"^([\d.]+) GPU hours in (\d) runs, ([\d.]+) at 3.5 an hour$"
    used, runs, price = re.findall(pattern, rows["price"].found)[0]
    assert runs == "3"
    assert float(used) == pytest.approx(3 * 8 * hours, abs=0.05 + 3 * 8 * 0.005)
    assert float(price) == pytest.approx(3.5 * float(used), abs=0.2)
    assert cost_of(repository, shards)["price"].found.endswith("node hours")


@pytest.mark.parametrize("room_mib", [50])
def test_too_little_memory_names_settings_that_fit(repository: Path, shards: Path, room_mib: int) -> None:
    memory = check_cost.CPU_RESERVE_BYTES + room_mib * 2**20
    machine = Machine(
        nodes=1, ranks_per_node=1, gpu=None, memory_bytes=memory, peak_tflops=None, cores_per_node=2
    )
    row = cost_of(repository, shards, machine=machine)["memory per rank"]
    assert row.status == "fail"
    settings = row.remedy.split(" takes ")[0].split()
    assert all(word.startswith("engine.") for word in settings), row.remedy
    assert cost_of(repository, shards, *settings, machine=machine)["memory per rank"].status == "ok", (
        "it must work"
    )


@pytest.mark.slow
def test_a_model_too_large_for_anything_is_said(repository: Path, shards: Path) -> None:
    machine = Machine(
        nodes=1, ranks_per_node=1, gpu=None, memory_bytes=GIB, peak_tflops=None, cores_per_node=2
    )
    found = cost_of(repository, shards, "engine.global_batch=2", machine=machine)
    assert "smaller model" in found["memory per rank"].remedy


def test_data_that_is_not_there(repository: Path, shards: Path, tmp_path: Path) -> None:
    found = fit(repository, tmp_path / "none")
    assert found["data"].status == "fail"
    assert "holds no dataset.json" in found["data"].found
    found = fit(repository, shards, "data.val_split=holdout")
    assert found["data, holdout"].status == "fail"
    assert "it has test (10)" in found["data, holdout"].found


def test_a_manifest_changed_by_hand(repository: Path, shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    facts = json.loads((copy / "dataset.json").read_text())
    facts["classes"][0] = "renamed"
    (copy / "dataset.json").write_text(json.dumps(facts))
    found = fit(repository, copy)["data"]
    assert found.status == "fail"
    assert "is not its content's" in found.found


def test_a_shard_cut_short_and_a_damaged_clip(repository: Path, shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    tar = next((copy / "train").glob("*.tar"))
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    found = fit(repository, copy)["shards"]
    assert found.status == "fail"
    assert f"copy train/{tar.name} again" in found.remedy
    tar.write_bytes(b"\0" * len(whole))
    decoding = cost_of(repository, copy)["decoding"]
    assert decoding.status == "fail"
    assert "crc32" in decoding.found


@pytest.mark.slow
def test_unlabelled_clips_cannot_be_classified(repository: Path, shards: Path, tmp_path: Path) -> None:
    words = [f"source.root={shards.parent}/videos/unlabelled", f"output={tmp_path}/shards", "workers=2"]
    run_shard(load_run(repository / "configs" / "shard" / "demo_unlabelled.yaml", RUNS, words).run)
    labels = fit(repository, tmp_path / "shards")["labels"]
    assert labels.status == "fail"
    assert "0 classes" in labels.found
    words = ["engine.global_batch=4", "correspondence.negatives_per_clip=1"]
    videos = fit(repository, tmp_path / "shards", *words, recipe="transfer/demo")["videos"]
    assert videos.status == "ok"


def test_shapes_that_do_not_fit(repository: Path, shards: Path) -> None:
    model = fit(repository, shards, "model.name=timesformer_small", "data.crop_pixels=70")["model"]
    assert model.status == "fail"
    model = fit(repository, shards, "model.name=t3d_tinny")["model"]
    assert model.status == "fail"
    assert "t3d_tiny" in model.found


def test_a_disk_that_is_full(repository: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD with momentum keeps one moment: a checkpoint of a million values is 8 MB, and one more is being written."""
    monkeypatch.setattr(check_cost.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 33_000_000))
    sizes = Sizes(
        parameters=1_000_000, trained=1_000_000, largest_group=900_000, largest_tensor=500_000, buffer_bytes=0
    )

    def disk(keep_last: int, *words: str) -> Finding:
        words = (f"checkpoint.keep_last={keep_last}", "checkpoint.keep_best=false", *words)
        run = run_of(repository, shards, *words)
        (row,) = check_cost.check_disk(Cost(run=run, machine=HOST, classes=10, train=None, mfu=None), sizes)
        return row

    assert (disk(9).status, disk(9).remedy) == ("fail", "checkpoint.keep_last=3")
    assert disk(3).status == "ok"
    assert disk(4).status == "fail"
    stored = disk(4, "checkpoint.url=s3://bucket/run")
    assert stored.status == "ok", "4 MB of momentum pass through"
    assert "0.04 GiB in the store" in stored.found


def test_time_of_a_checkpoint_at_a_given_bandwidth(repository: Path, shards: Path) -> None:
    """10^9 values with AdamW: 12 GB, of which each of two nodes writes 6 at 2 GB/s in 3 s."""
    sizes = Sizes(parameters=10**9, trained=10**9, largest_group=10**9, largest_tensor=10**8, buffer_bytes=0)

    def saving(machine: Machine, *words: str, clips_per_second: float | None = None) -> Finding:
        words = ("optim.name=adamw", "engine.global_batch=16", "checkpoint.every_steps=10", *words)
        cost = Cost(run=run_of(repository, shards, *words), machine=machine, classes=10, train=None, mfu=None)
        speed = None if clips_per_second is None else check_cost.Speed(clips_per_second, "given")
        (row,) = check_cost.check_saving(cost, sizes, speed)
        return row

    machine = replace(HOST, nodes=2, ranks_per_node=8, gpu="h100", write_bytes_per_second=2e9)
    assert saving(machine).found == "5.59 GiB of each node in 3.0 s at 2 GB/s, while training goes on"
    # A step of 16 clips in 0.2 s: ten of them are over before the checkpoint is, fifteen are not.
    late = saving(machine, clips_per_second=80.0)
    assert (late.status, late.remedy) == ("note", "checkpoint.every_steps=15")
    assert saving(machine, "checkpoint.every_steps=15", clips_per_second=80.0).status == "ok"
    still = saving(machine, "checkpoint.asynchronous=false", clips_per_second=80.0)
    assert "while training stands still; 2.0 s of steps between two" in still.found
    assert still.remedy == "checkpoint.every_steps=300", "3 s are a twentieth of 300 steps"


def test_without_a_bandwidth_no_time_is_said(repository: Path, shards: Path) -> None:
    sizes = Sizes(parameters=10, trained=10, largest_group=10, largest_tensor=10, buffer_bytes=0)
    cost = Cost(run=run_of(repository, shards), machine=HOST, classes=10, train=None, mfu=None)
    assert list(check_cost.check_saving(cost, sizes, None)) == []


def test_few_cores_are_noted(repository: Path, shards: Path) -> None:
    machine = Machine(
        nodes=1, ranks_per_node=8, gpu="h100", memory_bytes=80e9, peak_tflops=989.0, cores_per_node=4
    )
    decoding = cost_of(repository, shards, machine=machine)["decoding"]
    assert decoding.status == "note"
    assert "a node has 4" in decoding.remedy


def test_operations_against_an_independent_count(repository: Path, shards: Path) -> None:
    """Forward of T3D by FlopCounterMode on real tensors, three times for training."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cliplift.models import create_model
    from cliplift.pipelines.stages.run import stage_of

    run = run_of(repository, shards)
    model = create_model("t3d_tiny", num_classes=10, in_frames=8).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 8, 64, 64))
    stage = stage_of(run, classes=[str(k) for k in range(10)])
    assert stage.flops_per_clip == pytest.approx(3 * counter.get_total_flops())


def test_the_speed_of_the_runs_own_log(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"world_size": 2}')
    lines = [{"step": s, "speed/clips_per_second": r} for s, r in ((1, 1.0), (2, 30.0), (3, 32.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 4, "spe')
    found = logged_speed(tmp_path, world_size=2)
    assert found is not None
    assert found.clips_per_second == 30.0
    assert logged_speed(tmp_path, world_size=4) is None
    assert logged_speed(tmp_path / "none", world_size=2) is None


def test_wandb_is_asked_only_where_it_would_be_used(
    repository: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # bound and not listening: nobody answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        (wandb,) = check_tracking(run_of(repository, shards, "track.wandb=online"))
        assert wandb.status == "fail"
        assert "track.wandb=offline" in wandb.remedy
        taken.listen()
        assert unreachable(f"http://127.0.0.1:{port}") is None
    (wandb,) = check_tracking(run_of(repository, shards, "track.wandb=offline"))
    assert wandb.status == "ok"


def machine_of(**options: Any) -> Machine:
    given = {"nodes": 1, "gpus": None, "gpu": None, "memory_gib": None, "cores": None} | options
    return choose_machine(**given, cores_here=4, memory_here=8 * GIB)


def test_machines_by_name() -> None:
    machine = machine_of(nodes=2, gpus=8, gpu="NVIDIA-H200", cores=96)
    assert (machine.world_size, machine.peak_tflops, machine.cores_per_node) == (16, 989.0, 96)
    assert machine.memory_per_rank == 141e9
    assert machine_of(gpu="a100-80").memory_bytes == 80e9
    assert machine_of(gpus=0).gpu is None
    assert machine_of(gpus=0).memory_per_rank == 8 * GIB
    with pytest.raises(ConfigError, match="h200"):
        machine_of(gpu="h2000")
    with pytest.raises(ConfigError, match="no machine"):
        machine_of(nodes=0)
    assert machine_of(write_gb_per_second=2.5).write_bytes_per_second == 2.5e9
    for speed in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="--write-speed"):
            machine_of(write_gb_per_second=speed)
    for price in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="--price"):
            machine_of(price_per_hour=price)


def test_only_training_stages_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "shard/demo_actions"]) == 2
    assert "cliplift verify" in capsys.readouterr().err
    assert check_module.UNREADABLE
