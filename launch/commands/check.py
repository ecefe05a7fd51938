"""``cliplift check``: would a run work, fit and end in time? Asked before it is queued. ``doctor``: what is here?"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cliplift.launch.commands.command import Command, add_json_option, print_json

if TYPE_CHECKING:
    from cliplift.launch.check.findings import Finding


def add_options(check: argparse.ArgumentParser) -> None:
    add_json_option(check)
    check.add_argument("--nodes", type=int, default=1, help="nodes the run will have")
    check.add_argument(
        "--gpus", type=int, default=None, help="GPUs per node; 0 is a CPU run; default: those here"
    )
    check.add_argument(
        "--gpu", default=None, help="kind of GPU, such as h200, a100-80, l40s; default: the one here"
    )
    check.add_argument("--memory", type=float, default=None, help="memory of one GPU (or of the host), GiB")
    check.add_argument(
        "--cores", type=int, default=None, help="processor cores per node; default: those here"
    )
    check.add_argument(
        "--mfu", type=float, default=None, help="share of the peak reached, 0 to 1, if you know it"
    )
    check.add_argument(
        "--write-speed",
        type=float,
        default=None,
        metavar="GB/S",
        help="what one node writes to its disk or store, GB/s: says how long a checkpoint takes",
    )
    check.add_argument(
        "--price",
        type=float,
        default=None,
        metavar="PER_HOUR",
        help="what one GPU (or one node of a CPU run) costs an hour, in any currency: says what the run costs",
    )


def run_check(arguments: argparse.Namespace) -> int:
    """Exit code 1 when a row of the table fails."""
    from cliplift.launch.check.doctor import memory_bytes, usable_cores
    from cliplift.launch.check.fit import check
    from cliplift.launch.check.machine import choose_machine
    from cliplift.launch.commands.subject import load_training
    from cliplift.pipelines.repeats import single_runs

    loaded = load_training(arguments.subject, arguments.rest)
    runs = single_runs(loaded.run)  # which differ in fold and seed alone
    machine = choose_machine(
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        gpu=arguments.gpu,
        memory_gib=arguments.memory,
        cores=arguments.cores,
        cores_here=usable_cores(),
        memory_here=memory_bytes(),
        write_gb_per_second=arguments.write_speed,
        price_per_hour=arguments.price,
    )
    findings = check(runs[0], machine, mfu=arguments.mfu, runs=len(runs))
    return _say(findings, as_json=arguments.json)


def add_doctor_options(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument(
        "--compile",
        nargs="+",
        default=None,
        metavar=("CONFIG", "key=value"),
        help="instead: where torch.compile would leave the graph of this run's network and loss",
    )
    add_json_option(doctor)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Exit code 1 when something that the stages need is broken."""
    if arguments.compile:
        from cliplift.launch.check.graph_breaks import find_graph_breaks
        from cliplift.launch.commands.subject import load_training

        config, *overrides = arguments.compile
        findings = list(find_graph_breaks(load_training(config, overrides).run))
    else:
        from cliplift.launch.check.doctor import examine

        findings = examine(os.environ)
    return _say(findings, as_json=arguments.json)


def _say(findings: Sequence[Finding], *, as_json: bool) -> int:
    """The table, or the same rows as JSON. Returns the exit code."""
    from dataclasses import asdict

    from cliplift.launch.check.findings import exit_code, table

    status = exit_code(findings)
    if as_json:
        print_json({"ok": status == 0, "findings": [asdict(finding) for finding in findings]})
    else:
        print(table(findings))
    return status


COMMANDS = (
    Command(
        name="check",
        summary="will it work, fit and end in time? a run's data, shapes, memory and hours, before it is queued",
        add_options=add_options,
        run=run_check,
    ),
    Command(
        name="doctor",
        summary="what this machine has: versions, GPUs, decoders, limits",
        subject="",
        rest="",
        add_options=add_doctor_options,
        run=run_doctor,
    ),
)
