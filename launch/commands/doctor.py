"""``cliplift doctor``: what this machine has."""

from __future__ import annotations

import argparse
import os

from cliplift.launch.commands.command import Command


def run_doctor(_: argparse.Namespace) -> int:
    """Exit code 1 when something that the stages need is broken."""
    from cliplift.launch.check.doctor import examine
    from cliplift.launch.check.findings import exit_code, table

    findings = examine(os.environ)
    print(table(findings))
    return exit_code(findings)


COMMANDS = (
    Command(
        name="doctor",
        summary="what this machine has: versions, GPUs, decoders, limits",
        subject="",
        rest="",
        run=run_doctor,
    ),
)
