"""The machines a run is checked against: GPUs by name, with memory and peak, or the processors of this host."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from cliplift.configs.sections import ConfigError

# The name the driver gives (its peak is in ``throughput``), and memory in bytes by the vendors' data sheets.
GPUS: dict[str, tuple[str, float]] = {
    "h200": ("H200", 141e9),
    "h100": ("H100", 80e9),
    "h100-pcie": ("H100 PCIe", 80e9),
    "gh200": ("GH200", 96e9),
    "b200": ("B200", 180e9),
    "a100-80": ("A100", 80e9),
    "a100": ("A100", 40e9),
    "l40s": ("L40S", 48e9),
    "a40": ("A40", 48e9),
    "l4": ("L4", 24e9),
    "v100-32": ("V100", 32e9),
    "v100": ("V100", 16e9),
    "t4": ("T4", 16e9),
}
ASSUMED_MFU = 0.25  # 3D convolutions and video transformers between kernels that wait for memory
FP32_SHARE = 0.5  # TF32 against bf16 on cards from Ampere on


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run is to have. ``gpu`` is None for CPU runs; ``memory_bytes`` is of one GPU, or of the host.

    ``write_bytes_per_second`` is what one node writes to its disk or store, ``price_per_hour`` what a GPU costs (a node
    of a CPU run), in any currency; None where it was not said.
    """

    nodes: int
    ranks_per_node: int
    gpu: str | None
    memory_bytes: float
    peak_tflops: float | None
    cores_per_node: int
    write_bytes_per_second: float | None = None
    price_per_hour: float | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def memory_per_rank(self) -> float:
        return self.memory_bytes if self.gpu else self.memory_bytes / self.ranks_per_node

    @property
    def text(self) -> str:
        kind = f"{self.ranks_per_node} x {self.gpu}" if self.gpu else f"{self.ranks_per_node} CPU rank"
        return f"{self.nodes} node(s) of {kind}, {self.cores_per_node} cores"


def choose_machine(
    *,
    nodes: int,
    gpus: int | None,
    gpu: str | None,
    memory_gib: float | None,
    cores: int | None,
    cores_here: int,
    memory_here: int,
    write_gb_per_second: float | None = None,
    price_per_hour: float | None = None,
) -> Machine:
    """The machine the options describe; what they leave open is taken from this one.

    Raises:
        ConfigError: an unknown GPU, or numbers that describe no machine.
    """
    if nodes < 1 or (gpus is not None and gpus < 0):
        raise ConfigError(
            f"--nodes {nodes} --gpus {gpus} is no machine", file="command line", hint="use at least one node"
        )
    _require_speed_and_price(write_gb_per_second, price_per_hour)
    kind = gpu.lower().replace("nvidia-", "").replace("_", "-") if gpu else None
    if kind is not None and kind not in GPUS:
        raise ConfigError(
            f"--gpu {gpu!r} is not known",
            file="command line",
            hint=f"use one of {', '.join(GPUS)}, or --memory with the closest of them",
        )
    here = _gpu_here() if kind is None and gpus != 0 else None
    count = gpus if gpus is not None else (here[0] if here else (1 if kind else 0))
    if count and kind is None and here is None:
        raise ConfigError(
            f"--gpus {count} of which kind? This machine has none to look at",
            key="--gpu",
            file="command line",
            hint=f"give one of {', '.join(GPUS)}",
        )
    name, memory, peak = None, float(memory_here), None
    if count and kind is not None:
        name, memory, peak = kind, GPUS[kind][1], peak_of(GPUS[kind][0])
    elif count and here is not None:
        name, memory, peak = here[1], here[2], peak_of(here[1])
    return Machine(
        nodes=nodes,
        ranks_per_node=max(1, count),
        gpu=name,
        memory_bytes=memory if memory_gib is None else memory_gib * 2**30,
        peak_tflops=peak,
        cores_per_node=cores or cores_here,
        write_bytes_per_second=None if write_gb_per_second is None else 1e9 * write_gb_per_second,
        price_per_hour=price_per_hour,
    )


def _require_speed_and_price(write_gb_per_second: float | None, price_per_hour: float | None) -> None:
    if write_gb_per_second is not None and not 0 < write_gb_per_second < math.inf:
        raise ConfigError(
            "is no speed",
            key="--write-speed",
            value=write_gb_per_second,
            file="command line",
            hint="give GB/s, such as 2.5",
        )
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise ConfigError(
            "is no price",
            key="--price",
            value=price_per_hour,
            file="command line",
            hint="give what a GPU costs an hour, such as 2.5",
        )


def _gpu_here() -> tuple[int, str, float] | None:
    """(count, name, bytes) of the GPUs of this host."""
    import torch

    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    return torch.cuda.device_count(), facts.name, float(facts.total_memory)


def peak_of(device_name: str) -> float | None:
    """Dense bf16 peak of a card by the name its driver gives, 1e12 operations per second; None where unknown."""
    from cliplift.pipelines.engine.telemetry import HALF_PEAK_TFLOPS

    known = HALF_PEAK_TFLOPS.items()
    return next((peak for name, peak in known if re.search(rf"\b{name}\b", device_name)), None)
