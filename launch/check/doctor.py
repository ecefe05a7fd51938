"""``cliplift doctor``: what this machine has, tried rather than looked up. No key, password or host list is printed."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

from cliplift.launch.check.findings import Finding

NEEDED = ("cliplift", "torch", "deepspeed", "webdataset", "av", "wandb", "pydantic", "pyarrow", "safetensors")
OPTIONAL = ("decord", "torchcodec", "aiohttp", "s3fs", "gcsfs", "huggingface_hub")
DECODED_CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "prores")
LAUNCHERS = ("torchrun", "deepspeed", "srun", "sbatch", "mpirun", "pdsh", "kubectl")
ENOUGH_FILES = 4096  # 256 open shards, workers with pipes of their own, sockets of every rank
ENOUGH_SHARED_MIB = 1024  # workers hand decoded batches over through it: 64 MiB is Docker's default


def examine(environment: Mapping[str, str]) -> list[Finding]:
    """Everything the stages need of a machine, in the order in which one would repair it."""
    findings: list[Finding] = []
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions,
        _processors,
        _gpus,
        _collectives,
        _codecs,
        _decoders,
        _compilers,
        _shared_memory,
        _limits,
        _host_name,
        _plugins,
    )
    for look in looks:
        try:
            findings += look()
        except (ImportError, OSError, RuntimeError) as error:
            # What is broken here is broken for a run too: it is a finding, and the other looks go on.
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            findings.append(Finding("fail", _subject(look), first[:160], "install the package again"))
    return [*findings, *_launchers(environment), *_wandb(environment)]


def _subject(look: Callable[[], Iterator[Finding]]) -> str:
    return look.__name__.strip("_").replace("_", " ")


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    supported = (3, 11) <= sys.version_info < (3, 14)
    remedy = "" if supported else "use Python 3.11 to 3.13"
    yield Finding(
        "ok" if supported else "fail", "python", f"{python}, {platform.platform(terse=True)}", remedy
    )
    for name in NEEDED:
        found = _version(name)
        if found is None:
            yield Finding("fail", name, "is not installed", "install cliplift with pip, which brings it")
        else:
            yield Finding("ok", name, found)
    have = [f"{name} {version}" for name in OPTIONAL if (version := _version(name)) is not None]
    yield Finding("ok", "optional packages", ", ".join(have) or "none")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processors() -> Iterator[Finding]:
    cores, allowed = os.cpu_count() or 1, usable_cores()
    text = f"{allowed} of {cores} cores usable"
    yield Finding("ok", "processors", text)
    limit, installed = memory_limit_bytes(), _installed_bytes()
    text = f"{installed / 2**30:.1f} GiB installed"
    if limit is not None and limit < installed:
        text += f", this container may use {limit / 2**30:.1f}"
    yield Finding("ok", "memory", text)


def usable_cores() -> int:
    """Cores this process may run on, by affinity and by the container's quota."""
    cores = len(os.sched_getaffinity(0))
    quota = _text(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def memory_limit_bytes() -> int | None:
    """The container's memory limit, or None."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _text(Path("/sys/fs/cgroup") / name).strip()
        if text.isdigit():
            return int(text)
    return None


def memory_bytes() -> int:
    """Memory this process may use: the host's, or the container's part of it."""
    limit = memory_limit_bytes()
    return _installed_bytes() if limit is None else min(limit, _installed_bytes())


def _installed_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""  # another cgroup version, or none


def _gpus() -> Iterator[Finding]:
    import torch

    built = torch.version.cuda
    if not torch.cuda.is_available():
        if built is None:
            yield Finding("note", "gpu", "torch is a CPU build; stages run on the CPU")
        else:
            remedy = "check nvidia-smi and the container's --gpus; stages run on the CPU"
            yield Finding("note", "gpu", f"torch is built for CUDA {built} and sees no GPU", remedy)
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        total = f"{facts.total_memory / 2**30:.1f} GiB, compute {facts.major}.{facts.minor}"
        yield Finding("ok", f"gpu {number}", f"{facts.name}, {total}, CUDA {built}")
    # A wrong driver is found by the first kernel, not by the list of devices.
    ones = float(torch.ones(1024, device="cuda").sum())
    yield Finding("ok" if ones == 1024.0 else "fail", "gpu kernel", f"the sum of 1024 ones is {ones:g}")


def _collectives() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    gloo = dist.is_available() and dist.is_gloo_available()
    yield Finding("ok" if gloo else "fail", "gloo", "available" if gloo else "missing from this torch")
    if not torch.cuda.is_available():
        yield Finding("ok", "nccl", "not needed without a GPU")
    elif dist.is_nccl_available():
        found: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        yield Finding("ok", "nccl", ".".join(map(str, found)))
    else:
        yield Finding("fail", "nccl", "missing from this torch", "several GPUs need a torch built with NCCL")


def _codecs() -> Iterator[Finding]:
    import av

    can_encode = _has_codec("libx264", "w")
    remedy = "" if can_encode else "install PyAV from its wheel; sharding encodes with libx264"
    yield Finding(
        "ok" if can_encode else "fail", "encoder", "libx264" if can_encode else "no libx264", remedy
    )
    known = [name for name in DECODED_CODECS if _has_codec(name, "r")]
    unknown = [name for name in DECODED_CODECS if name not in known]
    text = f"{', '.join(known)} (FFmpeg in PyAV {av.__version__})"
    remedy = f"sources in {', '.join(unknown)} will be refused" if unknown else ""
    yield Finding("note" if unknown else "ok", "source codecs", text, remedy)


def _has_codec(name: str, mode: Literal["r", "w"]) -> bool:
    import av

    try:
        av.Codec(name, mode)
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def _decoders() -> Iterator[Finding]:
    """Encode a clip as shards hold it and decode it with every decoder a config may name."""
    from fractions import Fraction

    import numpy as np

    from cliplift.configs.sharding import TranscodeConfig
    from cliplift.sharding.video.decode import VideoDecodeError, decode_frames
    from cliplift.sharding.video.transcode import encode_array

    ramp = np.linspace(0, 255, 24 * 64 * 64 * 3).reshape(24, 64, 64, 3).astype(np.uint8)
    data = encode_array(ramp, fps=Fraction(24), config=TranscodeConfig())
    reference = decode_frames(data, range(24), decoder="pyav")
    yield Finding("ok", "decoder pyav", f"24 of {len(reference)} frames of a test clip")
    others: tuple[Literal["decord", "torchcodec"], ...] = ("decord", "torchcodec")
    for name in others:
        try:
            frames = decode_frames(data, range(24), decoder=name)
        except (VideoDecodeError, ImportError, OSError, RuntimeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            yield Finding("note", f"decoder {name}", first[:120])
            continue
        same = np.array_equal(frames, reference)
        text = "the same pixels as pyav" if same else "other pixels than pyav on a test clip"
        yield Finding(
            "ok" if same else "fail", f"decoder {name}", text, "" if same else "use data.decoder=pyav"
        )


def _compilers() -> Iterator[Finding]:
    for name, purpose in (("g++", "engine.compile"), ("nvcc", "raw DeepSpeed operators")):
        path = shutil.which(name)
        text = path or f"not found; only {purpose} needs it"
        yield Finding("ok" if path else "note", name, text)


def _shared_memory() -> Iterator[Finding]:
    place = Path("/dev/shm")
    if not place.is_dir():
        yield Finding("fail", "/dev/shm", "does not exist", "mount a tmpfs, or use data.workers=0")
        return
    total, _, free = shutil.disk_usage(place)
    text = f"{total / 2**20:.0f} MiB, {free / 2**20:.0f} free"
    enough = total >= ENOUGH_SHARED_MIB * 2**20
    remedy = "" if enough else f"docker run --shm-size={ENOUGH_SHARED_MIB // 1024}g, or data.workers=0"
    yield Finding("ok" if enough else "note", "/dev/shm", text, remedy)


def _limits() -> Iterator[Finding]:
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = files == resource.RLIM_INFINITY or files >= ENOUGH_FILES
    remedy = "" if enough else f"ulimit -n {ENOUGH_FILES}"
    yield Finding("ok" if enough else "note", "open files", f"{_limit(files)}, hard {_limit(hard)}", remedy)
    pinned, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield Finding("ok", "locked memory", _limit(pinned, unit=2**20, name="MiB"))
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    unlimited = space == resource.RLIM_INFINITY
    remedy = (
        "" if unlimited else "ulimit -v unlimited: CUDA and memory-mapped shards reserve more than they use"
    )
    yield Finding(
        "ok" if unlimited else "note", "address space", _limit(space, unit=2**30, name="GiB"), remedy
    )


def _limit(value: int, *, unit: int = 1, name: str = "") -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value // unit} {name}".strip()


def _host_name() -> Iterator[Finding]:
    """Several hosts meet by name: one that resolves to itself alone cannot be reached by the others."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        remedy = "give MASTER_ADDR (torchrun --rdzv-endpoint) as an address, or add the name to /etc/hosts"
        yield Finding("note", "host name", f"{host} resolves to nothing", remedy)
        return
    if address.startswith("127."):
        remedy = "give MASTER_ADDR as an address for runs over several hosts"
        yield Finding("note", "host name", f"{host} resolves to {address}, this host alone", remedy)
        return
    yield Finding("ok", "host name", f"{host} is {address}")


def _plugins() -> Iterator[Finding]:
    """Models, objectives, sources and augmentations that other packages add; a broken one stops nothing else."""
    from cliplift.configs.plugins import augmentation_plugins, source_plugins, stage_plugins
    from cliplift.models.registry import list_models, model_plugins

    list_models()  # this package's own first: their names are taken
    groups = (model_plugins(), stage_plugins(), source_plugins(), augmentation_plugins())
    for plugin in (plugin for group in groups for plugin in group):
        subject = f"plug-in {plugin.name}"
        if plugin.fault:
            remedy = "update or uninstall the package"
            yield Finding("note", subject, f"{plugin.group} of {plugin.origin}: {plugin.fault[:160]}", remedy)
        else:
            yield Finding("ok", subject, f"{plugin.group} of {plugin.origin}")


def _launchers(environment: Mapping[str, str]) -> Iterator[Finding]:
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join((beside, environment.get("PATH", "")))
    have = [name for name in LAUNCHERS if shutil.which(name, path=path)]
    yield Finding("ok", "launchers", ", ".join(have) or "none; plain python runs one process")


def _wandb(environment: Mapping[str, str]) -> Iterator[Finding]:
    """The mode a run would take; whether there is a key, never the key."""
    from cliplift.sharding.build.tracking import wandb_mode

    mode = wandb_mode("auto", environment)
    where = "WANDB_MODE" if environment.get("WANDB_MODE") else "track.wandb=auto"
    key = "an API key is set" if wandb_mode("auto", _without_mode(environment)) == "online" else "no API key"
    yield Finding("ok", "wandb mode", f"{mode} by {where}; {key}")


def _without_mode(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != "WANDB_MODE"}
