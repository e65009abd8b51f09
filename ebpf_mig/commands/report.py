# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig report`: shows the blackout of a recording.

In: a recording. Out: a report on stdout or in a file. Needs neither bcc nor privilege.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click
import msgspec

from ebpf_mig.breakdown import PHASES, Breakdown, Verdict
from ebpf_mig.commands.changes import parse_changes
from ebpf_mig.commands.formats import (
    FORMATS,
    FROM_BREAKDOWN,
    PREDICTING,
    WITH_AXIS,
    explained,
    from_breakdown,
    picture_for,
    rendered,
)
from ebpf_mig.commands.options import (
    color_option,
    examples,
    format_option,
    output_option,
    strict_option,
    write_result,
)
from ebpf_mig.errors import IncompleteError, UsageError
from ebpf_mig.recording.file import Recording
from ebpf_mig.text import printable

if TYPE_CHECKING:
    from ebpf_mig.analysis.result import Analysis

EPILOG = examples(
    "ebpf-mig report vm1.rec",
    "ebpf-mig report vm1.rec --explain state.load",
    "ebpf-mig report vm1.rec --format json | jq .blackout_ns",
    "ebpf-mig report vm1.rec --format html -o vm1.html --redact",
    "ebpf-mig report vm1.rec --format folded | flamegraph.pl > vm1.svg",
    "ebpf-mig report vm1.rec --what-if bandwidth=25Gbit --what-if fetch=0",
    "ebpf-mig report vm1.rec --what-if nodelay",
    "ssh HOST cat vm1.rec | ebpf-mig report -",
    "ebpf-mig report before.json --run 3",
)


@click.command(epilog=EPILOG)
@click.argument("file", type=click.Path(allow_dash=True))
@format_option(*FORMATS)
@output_option()
@click.option(
    "--what-if",
    "changes",
    multiple=True,
    metavar="CHANGE",
    help="Predict the blackout after a change: bandwidth=25Gbit, fetch=0 (a free final fetch; fetch=50%: half"
    " as long), rearm=0 (pages not write-protected again), nodelay (TCP_NODELAY), untraced (without"
    " what tracing took), or without a cause that the diagnosis names, e.g. srcu=0. Can be repeated.",
)
@click.option(
    "--explain",
    "phase",
    type=click.Choice([str(name) for name, _ in PHASES]),
    metavar="PHASE",
    help="Show everything about one phase: causes, waits with their stacks, calls, sends.",
)
@click.option(
    "--run", "number", type=click.IntRange(1), metavar="N", help="The run of a result of `bench` that is shown."
)
@click.option(
    "--symbols",
    type=click.Choice(["local", "debuginfod"]),
    help="Look up names of the VMM's functions that have none in the recording, on this machine or also there.",
)
@click.option("--redact", is_flag=True, help="Omit addresses and the names of hosts, threads and files.")
@color_option
@strict_option
def command(
    *,
    file: str,
    form: str,
    output: str,
    force: bool,
    changes: Sequence[str],
    phase: str | None,
    number: int | None,
    symbols: str | None,
    redact: bool,
    color: str,
    strict: bool,
) -> None:
    """Show the phases of a recorded blackout.

    FILE is a recording that `demo`, `migrate` or `record` made; `-` is stdin. It can also be a result of `bench`:
    then its table is shown, or with --run N one of its runs.
    """
    from ebpf_mig.commands.results import in_result, is_result

    if is_result(file):
        needed = form not in FROM_BREAKDOWN or redact or bool(changes) or phase is not None or symbols is not None
        found = in_result(file, number, form, needed)
        if not isinstance(found, str):
            write_result(from_breakdown(found, form, output, color), output, force=force)
            if isinstance(found, Breakdown):
                require_complete(found, strict)
            return
        file = found
    elif number is not None:
        raise UsageError(f"{printable(file)} is not a result of bench", "leave out --run")
    if changes and form not in PREDICTING:
        raise UsageError(f"--format {form} has no place for a prediction", f"use --format {', '.join(PREDICTING)}")
    if phase and form != "text":
        raise UsageError(f"--explain prints text, not {form}", "leave out --format")
    wanted = parse_changes(changes)
    picture = picture_for(output) if form == "markdown" else None
    if picture is not None and not force and os.path.lexists(picture):
        raise UsageError(f"{picture} exists; not overwritten", "give the report another name, or --force")
    analysis = _analysis(file, redact, form in WITH_AXIS, symbols)
    if changes:
        from ebpf_mig.analysis import whatif

        predicted = whatif.predict(analysis, wanted)
        analysis = replace(analysis, breakdown=msgspec.structs.replace(analysis.breakdown, what_if=predicted))
    breakdown = analysis.breakdown
    if form == "json":
        del analysis  # its events would take as much memory again as the text of a long recording
        write_result(rendered(breakdown, form, output, color), output, force=force)
    else:
        shown = explained(analysis, phase, output, color) if phase else FORMATS[form](analysis, output, color)
        write_result(shown, output, force=force)
        if picture is not None:
            write_result(FORMATS["svg"](analysis, output, color), str(picture), force=force)
    require_complete(breakdown, strict)


def warn(name: str, recording: Recording) -> None:
    """Prints on stderr what is missing in a recording."""
    if recording.truncated:
        click.echo(f"ebpf-mig: {printable(name)} is cut off: {printable(recording.reason)}", err=True)
    if recording.unknown:
        click.echo(
            f"ebpf-mig: {printable(name)} was made by a newer ebpf-mig: "
            f"{recording.unknown} events of unknown kinds are left out",
            err=True,
        )


def require_complete(breakdown: Breakdown, strict: bool) -> None:
    """Raise IncompleteError if `strict` and the verdict is `incomplete`."""
    if strict and breakdown.completeness.verdict == Verdict.INCOMPLETE:
        reasons = breakdown.completeness.reasons
        raise IncompleteError(f"incomplete: {reasons[0]}" if reasons else "the recording is incomplete")


def _analysis(file: str, redact: bool, with_axis: bool, symbols: str | None = None) -> Analysis:
    from ebpf_mig.collector import analyse, analyse_file
    from ebpf_mig.recording.coalesce import read_whole_or_coalesced
    from ebpf_mig.recording.file import read_recording
    from ebpf_mig.recording.redact import Names, redacted
    from ebpf_mig.vmm import words

    warned = False

    def prepared(recording: Recording) -> Recording:
        nonlocal warned
        if not warned:
            warn(file, recording)
        warned = True
        if symbols:
            from ebpf_mig.commands.symbols import named

            recording = named(recording, symbols)
        return redacted(recording, Names(words())) if redact else recording

    if file == "-":
        return analyse(prepared(read_recording(sys.stdin.buffer, within_budget=True, with_axis=with_axis)))
    if with_axis:
        return analyse(prepared(read_whole_or_coalesced(file, with_axis=True)))
    return analyse_file(file, prepared)
