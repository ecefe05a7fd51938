"""NCCL's flight recorder: told where to write, by names that the installed torch reads. Only a GPU makes it write."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cliplift.pipelines.distributed import flight_recorder
from cliplift.pipelines.distributed.flight_recorder import record_collectives

# A rank alone, with gloo, which records as NCCL does; what it recorded is read as JSON, without a file.
RECORDED = """
import os, sys, torch
from pathlib import Path
from cliplift.configs.training import EngineConfig
from cliplift.pipelines.distributed.collectives import start
from cliplift.pipelines.distributed.flight_recorder import record_collectives

record_collectives(Path(sys.argv[1]), os.environ)
start(EngineConfig(device="cpu"))
torch.distributed.all_reduce(torch.ones(3, 5))
trace = torch._C._distributed_c10d._dump_fr_trace_json(True, False)
print(trace.decode() if isinstance(trace, bytes) else trace)
"""


@pytest.fixture(autouse=True)
def first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight_recorder, "_set", {})


def test_what_each_rank_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environment: dict[str, str] = {}
    record_collectives(Path("runs/a/stacks"), environment)
    place = str(tmp_path / "runs/a/stacks/collectives_rank")
    assert environment == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": place,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": place,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    # The next run of this process, such as another fold, has a folder of its own.
    record_collectives(Path("runs/b/stacks"), environment)
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == place.replace("/a/", "/b/")


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    theirs = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "50000", "TORCH_FR_DUMP_TEMP_FILE": "/scratch/trace_"}
    environment = dict(theirs)
    record_collectives(tmp_path, environment)
    assert environment == {**theirs, "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def test_the_installed_torch_reads_these_names(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    record_collectives(tmp_path, environment)
    place = Path(torch.__file__).parent
    header = (place / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp").read_text()
    with (
        (place / "lib/libtorch_cpu.so").open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as library,
    ):
        for name in environment:
            assert f'"{name}"' in header or library.find(b"\0" + name.encode() + b"\0") >= 0, name


@pytest.mark.slow
def test_a_rank_records_its_collectives(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RECORDED, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    entries = json.loads(done.stdout.splitlines()[-1])["entries"]
    reduced = [one for one in entries if "all" in one["profiling_name"] and one["input_sizes"] == [[3, 5]]]
    assert len(reduced) == 1
