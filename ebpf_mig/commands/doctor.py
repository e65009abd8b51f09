# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig doctor`: checks what this machine supports, what is missing, and what would help."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from ebpf_mig.commands.doctor_checks import checks
from ebpf_mig.commands.options import examples, write_result
from ebpf_mig.errors import PreflightError
from ebpf_mig.linux.check import MISSING, Check
from ebpf_mig.text import printable

_SIGNS = {"ok": "ok     ", "warn": "warning", "missing": "MISSING"}


@click.command(
    "doctor", epilog=examples("ebpf-mig doctor", "ebpf-mig doctor --json | jq '.[] | select(.state!=\"ok\")'")
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array instead of lines.")
def command(as_json: bool) -> None:
    """Check what this machine supports, one line per feature. Exits with 3 if tracing cannot work."""
    found = list(checks())
    if as_json:
        write_result(json.dumps([asdict(check) for check in found], indent=2) + "\n")
    else:
        write_result("".join(_lines(check) for check in found))
    lacking = [check.name for check in found if check.required and check.state == MISSING]
    if lacking:
        raise PreflightError(f"tracing cannot work here: {', '.join(lacking)} missing")


def _lines(check: Check) -> str:
    text = f"{_SIGNS[check.state]}  {check.name:16} {printable(check.fact)}\n"
    if check.remedy and check.state != "ok":
        text += f"{'':9}{'':16} remedy: {check.remedy}\n"
    return text
