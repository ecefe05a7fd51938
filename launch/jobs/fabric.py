"""The network between the nodes of a training job: what NCCL and libfabric are told, and which devices a pod asks for.

Few settings, because both libraries find out most of it by themselves. Each comes from its maker's documentation, named
beside it. A variable that is set already (by ``--setup``, a module, or the site) is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cliplift.configs.sections import ConfigError

RESOURCE = re.compile(r"[a-z0-9.-]+/[A-Za-z0-9._-]+")  # an extended resource of Kubernetes: DOMAIN/NAME


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """One kind of network.

    Attributes:
        name: what ``--fabric`` calls it.
        environment: variables of every rank.
        resource: the device plugin's resource that a pod asks for; None asks for none.
        devices: how many of it a pod asks for; 0 until it is known.
        locks_memory: the pod may lock memory, which registering it for RDMA needs.
    """

    name: str
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    resource: str | None = None
    devices: int = 0
    locks_memory: bool = False


FABRICS: Mapping[str, Fabric] = MappingProxyType(
    {
        "efa": Fabric(
            name="efa",
            environment=MappingProxyType(
                {
                    # fi_fabric(7) of libfabric: the only provider that is looked for, so that a node without EFA
                    # fails at its start and does not train over TCP.
                    "FI_PROVIDER": "efa",
                    # fi_efa(7) of libfabric: huge pages for the provider's buffers are on by default, are a small
                    # gain, and can use up the pages there are. Decoding workers are further processes of each rank.
                    "FI_EFA_USE_HUGE_PAGE": "0",
                }
            ),
            # Amazon EKS User Guide, "Run machine learning training on Amazon EKS with Elastic Fabric Adapter".
            resource="vpc.amazonaws.com/efa",
        ),
        "ib": Fabric(
            name="ib",
            # NCCL User Guide, "Environment Variables", NCCL_NET: with a network named, NCCL does not fall back to
            # another one. "IB" is its own for InfiniBand verbs, which are those of RoCE too.
            environment=MappingProxyType({"NCCL_NET": "IB"}),
            # README.md and example/test-hca-pod.yaml of Mellanox/k8s-rdma-shared-dev-plugin.
            resource="rdma/hca_shared_devices_a",
            devices=1,
            locks_memory=True,
        ),
        # The same page: "Socket" is NCCL's TCP.
        "none": Fabric(name="none", environment=MappingProxyType({"NCCL_NET": "Socket"})),
    }
)


def choose_fabric(
    name: str | None, *, gpus: int, target: str, devices: int | None, resource: str | None
) -> Fabric | None:
    """The fabric that the options of the command name; None where they name none.

    Args:
        name: one of ``FABRICS``, or None: NCCL chooses by itself.
        gpus: GPUs of a node.
        target: slurm, kubernetes or local.
        devices: how many devices a pod asks for; None is the fabric's own number.
        resource: what the cluster's device plugin calls them; None is the usual name.

    Raises:
        ConfigError: options that do not fit together; says which.
    """
    if name is None:
        for option, value in (("--fabric-devices", devices), ("--fabric-resource", resource)):
            if value is not None:
                raise ConfigError(
                    "says nothing without --fabric",
                    key=option,
                    value=value,
                    file="command line",
                    hint="add --fabric",
                )
        return None
    if target == "local" or gpus == 0:
        why = (
            "one machine has no network between nodes"
            if target == "local"
            else "a job on CPUs does not use NCCL"
        )
        raise ConfigError(f"--fabric {name}: {why}", key="--fabric", file="command line", hint="leave it out")
    fabric = FABRICS[name]
    if target != "kubernetes" or fabric.resource is None:
        for option, value in (("--fabric-devices", devices), ("--fabric-resource", resource)):
            if value is not None:
                raise ConfigError(
                    f"is for pods that ask for devices, not for --to {target} --fabric {name}",
                    key=option,
                    value=value,
                    file="command line",
                    hint="leave it out",
                )
        return fabric
    return _with_devices(fabric, devices=devices, resource=resource or fabric.resource)


def _with_devices(fabric: Fabric, *, devices: int | None, resource: str) -> Fabric:
    if RESOURCE.fullmatch(resource) is None:
        raise ConfigError(
            "is no resource of Kubernetes",
            key="--fabric-resource",
            value=resource,
            file="command line",
            hint=f"give DOMAIN/NAME, such as {fabric.resource}",
        )
    count = fabric.devices if devices is None else devices
    if count < 1:
        raise ConfigError(
            f"how many {resource} does a node have?",
            key="--fabric-devices",
            value=devices,
            file="command line",
            hint="`kubectl describe nodes` lists them under Allocatable; give that number",
        )
    return Fabric(
        name=fabric.name,
        environment=fabric.environment,
        resource=resource,
        devices=count,
        locks_memory=fabric.locks_memory,
    )
