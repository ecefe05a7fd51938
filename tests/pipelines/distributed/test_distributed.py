"""Who this process is among the others, told from the environment alone."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import EngineConfig
from cliplift.pipelines.distributed.collectives import (
    all_gather_tensor,
    all_reduce_max,
    gather_objects,
    meet,
    start,
)
from cliplift.pipelines.distributed.launchers import find_place, ranks


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        (
            {
                "SLURM_PROCID": "2",
                "SLURM_NTASKS": "4",
                "SLURM_LOCALID": "0",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NODELIST": "n[1-2]",
            },
            (2, 4, 0),
        ),
        # The batch script itself: it has the variables of a task, and is the only process there will be.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (1, 2, 0)),
        ({"SLURM_NTASKS": "4"}, (0, 1, 0)),
    ],
)
def test_ranks_of_every_launcher(environment: dict[str, str], expected: tuple[int, int, int]) -> None:
    assert ranks(environment) == expected


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="RANK=2"):
        ranks({"RANK": "2", "WORLD_SIZE": "2"})


def test_one_process_needs_no_port_and_leaves_the_environment_alone() -> None:
    """Children of the process would inherit a port that is taken."""
    before = {k: v for k, v in os.environ.items() if k.startswith(("MASTER", "RANK", "WORLD"))}
    topology = start(EngineConfig(device="cpu"))
    assert (topology.rank, topology.world_size, topology.device.type) == (0, 1, "cpu")
    assert {k: v for k, v in os.environ.items() if k.startswith(("MASTER", "RANK", "WORLD"))} == before
    assert start(EngineConfig(device="cpu")) == topology
    assert gather_objects([1, 2], topology) == [1, 2]
    assert all_reduce_max(3.0, topology) == 3.0
    assert torch.equal(all_gather_tensor(torch.arange(3), topology), torch.arange(3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_names_the_key() -> None:
    with pytest.raises(ConfigError, match="no CUDA device") as caught:
        start(EngineConfig(device="cuda"))
    assert caught.value.key == "engine.device"


SILENT_PEER = """
import sys, time, torch
from cliplift.configs.training import EngineConfig
from cliplift.pipelines.distributed.collectives import start

start(EngineConfig(device="cpu", collective_timeout_seconds=3))
import deepspeed
from deepspeed.utils import groups

group = groups._clone_world_group()
print("ready", flush=True)
if sys.argv[1] == "0":
    deepspeed.comm.all_reduce(torch.ones(1), group=group)
time.sleep(60)
"""


@pytest.mark.slow
def test_the_time_limit_holds_in_the_groups_that_deepspeed_makes(repository: Path) -> None:
    """The groups gradients are reduced in; torch would give them half an hour."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SILENT_PEER, rank],
            env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank},
            cwd=repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        output, _ = ranks[0].communicate(timeout=200)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert "ready" in output
    assert re.search("[Tt]imed out waiting 3000ms", output), output


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["torchrun", "srun"])
def test_a_rank_left_in_the_shell_ends_with_the_variables_to_unset(
    kind: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "torchrun": {"RANK": str(rank), "WORLD_SIZE": "4"},
        "srun": {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"},
    }[kind] | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEPID"):
        monkeypatch.setenv(name, "0")  # put back after the test, which sets them
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"rank {rank} of 4") as caught:
        meet(find_place(variables), seconds=1)
    assert f"unset {' '.join(variables)};" in str(caught.value)
