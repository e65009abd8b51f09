# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig report`: what a recording says about the blackout.

In: a recording. Out: a report on stdout or in a file. Needs neither bcc nor privilege. `_FORMATS` is where a new kind
of report is entered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

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
from ebpf_mig.recording import Recording

EPILOG = examples(
    "ebpf-mig report vm1.rec",
    "ebpf-mig report vm1.rec --format json | jq .blackout_ns",
    "ebpf-mig report vm1.rec --format html -o vm1.html --redact",
    "ssh HOST cat vm1.rec | ebpf-mig report -",
)


class Source(NamedTuple):
    """What a report can be made of."""

    recording: Recording
    breakdown: Breakdown


def _text(source: Source, output: str, color: str) -> str:
    return rendered(source.breakdown, "text", output, color)


def _json(source: Source, output: str, color: str) -> str:
    return rendered(source.breakdown, "json", output, color)


def _html(source: Source, output: str, color: str) -> str:  # noqa: ARG001
    from ebpf_mig.report import html, lanes

    return html.render(source.breakdown, lanes.view(source.recording.header, source.recording.events))


def _perfetto(source: Source, output: str, color: str) -> bytes:  # noqa: ARG001
    from ebpf_mig.report import lanes, perfetto

    header = source.recording.header
    return perfetto.render(source.breakdown, header, lanes.view(header, source.recording.events))


def _csv(source: Source, output: str, color: str) -> str:  # noqa: ARG001
    from ebpf_mig.report import csv

    return csv.render(source.breakdown)


_FORMATS: dict[str, Callable[[Source, str, str], str | bytes]] = {
    "text": _text,
    "json": _json,
    "html": _html,
    "perfetto": _perfetto,
    "csv": _csv,
}
"""By name: from the source, the output's name and the choice of colour to the report. Each imports what it needs."""


@click.command(epilog=EPILOG)
@click.argument("file", type=click.Path(allow_dash=True))
@format_option(*_FORMATS)
@output_option()
@click.option("--redact", is_flag=True, help="Leave out names of hosts, threads and files, and addresses.")
@color_option
@strict_option
def command(*, file: str, form: str, output: str, force: bool, redact: bool, color: str, strict: bool) -> None:
    """Show where the blackout went.

    FILE is a recording that `demo`, `migrate` or `record` made; `-` is stdin.
    """
    source = _source(file, redact)
    write_result(_FORMATS[form](source, output, color), output, force=force)
    require_complete(source.breakdown, strict)


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


def _source(file: str, redact: bool) -> Source:
    from ebpf_mig.collector import analyse
    from ebpf_mig.recording import read_recording
    from ebpf_mig.redact import redacted

    recording = read_recording(sys.stdin.buffer if file == "-" else file)
    if recording.truncated:
        click.echo(f"ebpf-mig: {printable(file)} is cut off: {printable(recording.reason)}", err=True)
    if recording.unknown:
        click.echo(
            f"ebpf-mig: {printable(file)} was made by a newer ebpf-mig: "
            f"{recording.unknown} events of unknown kinds are left out",
            err=True,
        )
    if redact:
        recording = redacted(recording)
    breakdown = analyse(recording.header, recording.events, truncated=recording.truncated, unknown=recording.unknown)
    return Source(recording, breakdown)
