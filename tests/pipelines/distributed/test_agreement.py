"""Ranks that disagree stop together, at once, with a sentence that names the difference."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.distributed import agreement
from cliplift.pipelines.distributed.agreement import (
    PACKAGES,
    Facts,
    agree,
    code_digest,
    code_facts,
    difference,
    run_facts,
)
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.distributed.launchers import find_place, first_host

CLIPLIFT = [sys.executable, "-m", "cliplift.launch.cli"]
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "41",
}


@pytest.mark.parametrize(
    ("environment", "rank", "address"),
    [
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[03-06]", "SLURM_JOB_NODELIST": "gpu[01-06]"}, 5, "gpu03"),
        (SLURM | {"SLURM_JOB_NODELIST": "alpha,beta"}, 5, "alpha"),
        (SLURM | {"SLURM_JOB_NODELIST": "alpha,beta", "MASTER_ADDR": "10.0.0.9"}, 5, "10.0.0.9"),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            1,
            "127.0.0.1",
        ),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MASTER_ADDR": "head"}, 3, "head"),
        (
            {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "head", "PMI_RANK": "0", "PMI_SIZE": "1"},
            2,
            "head",
        ),
    ],
)
def test_every_launcher_says_where_to_meet(environment: dict[str, str], rank: int, address: str) -> None:
    place = find_place(environment)
    assert (place.rank, place.master_address) == (rank, address)


def test_mpi_over_hosts_without_an_address_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="mpirun -x MASTER_ADDR") as caught:
        find_place({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"})
    assert caught.value.key == "MASTER_ADDR"


def test_a_rank_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="PMI_RANK='first'"):
        find_place({"PMI_RANK": "first", "PMI_SIZE": "4"})


def test_steps_on_one_host_meet_at_different_ports() -> None:
    nodes = {"SLURM_JOB_NODELIST": "a"}
    ports = {
        find_place(SLURM | nodes | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).master_port
        for job in ("41", "42") for step in ("0", "1")
    }  # fmt: skip
    assert len(ports) == 4
    assert all(20_000 <= port < 32_768 for port in ports), "Linux hands ports from 32768 out by itself"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n[07-09,11],m1", "n07"),
        ("rack[1-2]-gpu", "rack1-gpu"),
        ("a,b[1-2]", "a"),
        ("x-3.y", "x-3.y"),
    ],
)
def test_first_host_of_a_slurm_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_the_difference_names_both_sides() -> None:
    first: Facts = {"host": "a", "facts": {"engine.global_batch": "32", "seed": "0"}}
    other: Facts = {"host": "b", "facts": {"engine.global_batch": "32", "seed": "1"}}
    found = difference(first, other, rank=2)
    assert found is not None
    assert found["key"] == "seed"
    assert found["reason"] == "rank 2 on b has 1 and rank 0 on a has 0"
    assert difference(first, first | {"host": "b"}, rank=1) is None
    extra: Facts = {"host": "b", "facts": first["facts"] | {"new": "x"}}
    for one, two in ((first, extra), (extra, first)):
        found = difference(one, two, rank=1)
        assert found is not None
        assert "(not set)" in found["reason"]


def test_a_rank_that_never_comes_is_named() -> None:
    """Two ranks of three, over a real store; as threads, because the third is what is missing."""
    store = dist.HashStore()
    results: dict[int, BaseException | None] = {}

    def take_part(rank: int) -> None:
        topology = Topology(rank=rank, world_size=3, local_rank=rank, device=torch.device("cpu"))
        try:
            agree({"seed": "0"}, topology, seconds=1.0)
            results[rank] = None
        except ConfigError as error:
            results[rank] = error

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(agreement, "_store", lambda: dist.PrefixStore("test", store))
        threads = [threading.Thread(target=take_part, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    for rank in (0, 1):
        assert "rank 2 of 3 has not answered after 1 s" in str(results[rank])


def test_facts_hold_every_value_but_the_node_local_ones(repository: Path) -> None:
    def facts(*words: str) -> dict[str, str]:
        return run_facts(load_run(repository / "configs" / "transfer" / "demo.yaml", RUNS, words).run)

    assert facts()["optim.lr"] == "0.001"
    assert facts() == facts("data.cache_folder=/scratch/node7")
    assert facts() != facts("teacher.frames=1")
    assert len(code_digest()) == 12


def test_plugins_are_among_the_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank with another version of a plug-in computes something else under the same config."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CLIPLIFT_PLUGINS", "own_augmentations")
    (tmp_path / "own_augmentations.py").write_text("PLUGINS = {}\n")
    here = code_facts()
    (tmp_path / "own_augmentations.py").write_text("PLUGINS = {'models': {}}\n")
    there = code_facts()
    assert [key for key in here if here[key] != there[key]] == ["plug-in own_augmentations (--plugin)"]


def two_ranks(words: list[list[str]], *, folders: list[Path]) -> list[str]:
    """Two ranks as two hosts would start them, each with a command and a folder of its own: stderr of each.

    Ranks that did not notice would wait for each other until they are ended here: half an hour without a limit.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank, (own, folder) in enumerate(zip(words, folders, strict=True)):
        env = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [*CLIPLIFT, "transfer", "transfer/demo", "track.wandb=disabled", *own]
        children.append(subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True))
    errors = [child.communicate(timeout=280)[1] for child in children]
    assert [child.returncode for child in children] == [2, 2], errors
    assert not any("Traceback" in error for error in errors), errors
    return errors


@pytest.mark.slow
def test_another_config_on_one_rank_stops_both(tmp_path: Path) -> None:
    output = [f"output={tmp_path / 'run'}"]
    errors = two_ranks([output, [*output, "optim.lr=0.5"]], folders=[tmp_path, tmp_path])
    for error in errors:
        assert "optim.lr: rank 1 on" in error
        assert "has 0.5 and rank 0 on" in error


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["rebuilt", "missing"])
def test_other_data_on_one_host_stops_both(tmp_path: Path, repository: Path, wrong: str) -> None:
    """The same relative path is a dataset on one host, and on the other one built again, or a mount that is missing."""
    from cliplift.sharding.build.run import run_shard
    from cliplift.sharding.demo.synthetic import write_demo_videos

    write_demo_videos(
        tmp_path / "videos", seed=1, train_per_class=1, val_per_class=1, test_per_class=1, unlabelled=6,
        size_pixels=64,
    )  # fmt: skip
    here, there = tmp_path / "here", tmp_path / "there"
    words = [f"source.root={tmp_path}/videos/unlabelled", f"output={here}/shards", "workers=2"]
    run_shard(load_run(repository / "configs" / "shard" / "demo_unlabelled.yaml", RUNS, words).run)
    there.mkdir()
    shutil.copytree(here / "shards", there / "shards")
    facts = there / "shards" / "dataset.json"
    if wrong == "missing":
        facts.unlink()
    else:
        facts.write_text(facts.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    own = ["data.shards=shards", "engine.global_batch=4", "correspondence.negatives_per_clip=1",
           f"output={tmp_path}/run"]  # fmt: skip
    errors = two_ranks([own, own], folders=[here, there])
    for error in errors:
        assert "data: rank 1 on" in error
        assert ("holds no dataset.json" in error) is (wrong == "missing")


def test_an_edited_checkout_has_another_digest(tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "one.py").write_text("x = 1\n")
    before = code_digest(tmp_path)
    assert code_digest(tmp_path) == before
    (tmp_path / "models" / "one.py").write_text("x = 2\n")
    assert code_digest(tmp_path) != before
