# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig report`: what a recording says about the blackout.

In: a recording. Out: a report on stdout or in a file. Needs neither bcc nor privilege.
"""

from __future__ import annotations

import sys

import click

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.commands.common import (
    color_option,
    examples,
    format_option,
    output_option,
    strict_option,
    write_result,
)
from ebpf_mig.commands.terminal import canvas_for
from ebpf_mig.errors import IncompleteError
from ebpf_mig.printable import printable

EPILOG = examples(
    "ebpf-mig report vm1.rec",
    "ebpf-mig report vm1.rec --format json | jq .blackout_ns",
    "ssh HOST cat vm1.rec | ebpf-mig report -",
)


@click.command(epilog=EPILOG)
@click.argument("file", type=click.Path(allow_dash=True))
@format_option("text", "json")
@output_option()
@color_option
@strict_option
def command(*, file: str, form: str, output: str, force: bool, color: str, strict: bool) -> None:
    """Show where the blackout went.

    FILE is a recording that `demo`, `migrate` or `record` made; `-` is stdin.
    """
    breakdown = _breakdown(file)
    write_result(rendered(breakdown, form, output, color), output, force=force)
    require_complete(breakdown, strict)


def rendered(breakdown: Breakdown, form: str, output: str, color: str) -> str:
    """The report in the format asked for, fit for where it goes."""
    if form == "json":
        from ebpf_mig.report import json

        return json.render(breakdown)
    from ebpf_mig.report import text

    return text.render(breakdown, canvas_for(sys.stdout if output == "-" else None, color))


def require_complete(breakdown: Breakdown, strict: bool) -> None:
    """Raise IncompleteError if `strict` and the verdict is `incomplete`."""
    if strict and breakdown.completeness.verdict == "incomplete":
        reasons = breakdown.completeness.reasons
        raise IncompleteError(f"incomplete: {reasons[0]}" if reasons else "the recording is incomplete")


def _breakdown(file: str) -> Breakdown:
    from ebpf_mig.collector import analyse
    from ebpf_mig.recording import read_recording

    recording = read_recording(sys.stdin.buffer if file == "-" else file)
    if recording.truncated:
        click.echo(f"ebpf-mig: {printable(file)} is cut off: {printable(recording.reason)}", err=True)
    if recording.unknown:
        click.echo(
            f"ebpf-mig: {printable(file)} was made by a newer ebpf-mig: "
            f"{recording.unknown} events of unknown kinds are left out",
            err=True,
        )
    return analyse(recording.header, recording.events, truncated=recording.truncated)
