# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig schema`: prints the JSON Schema of the JSON output of other commands."""

from __future__ import annotations

import json

import click
import msgspec

from ebpf_mig.breakdown import SCHEMA as BREAKDOWN
from ebpf_mig.breakdown import Breakdown
from ebpf_mig.commands.options import examples, write_result
from ebpf_mig.compare.benchmark import SCHEMA as BENCH
from ebpf_mig.compare.benchmark import Benchmark
from ebpf_mig.report.schema import schema_of

_KINDS: dict[str, tuple[type[msgspec.Struct], str]] = {
    "breakdown": (Breakdown, BREAKDOWN),
    "bench": (Benchmark, BENCH),
}


@click.command("schema", epilog=examples("ebpf-mig schema", "ebpf-mig schema bench > bench.schema.json"))
@click.argument("kind", type=click.Choice(list(_KINDS)), default="breakdown")
def command(kind: str) -> None:
    """Print the JSON Schema of a breakdown, or of a result of bench.

    Names are stable: later versions add names, and never rename or remove any.
    """
    write_result(json.dumps(schema_of(*_KINDS[kind]), indent=2) + "\n")
