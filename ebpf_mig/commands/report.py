# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig report`: shows the blackout of a recording.

In: a recording. Out: a report on stdout or in a file. Needs neither bcc nor privilege. A new kind of report is
a row in `FORMATS`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from ebpf_mig.analysis.whatif import Hypothesis
from ebpf_mig.breakdown import PHASES, Breakdown, PhaseName, Verdict
from ebpf_mig.commands.options import (
    RATE,
    color_option,
    examples,
    format_option,
    output_option,
    strict_option,
    write_result,
)
from ebpf_mig.commands.terminal import canvas_for
from ebpf_mig.errors import IncompleteError, UsageError
from ebpf_mig.recording.file import Recording
from ebpf_mig.report.canvas import Canvas
from ebpf_mig.text import printable

if TYPE_CHECKING:
    from ebpf_mig.analysis.result import Analysis
    from ebpf_mig.analysis.stacks import Stack
    from ebpf_mig.report.compare_rows import Sheet

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


def _text(analysis: Analysis, output: str, color: str) -> str:
    from ebpf_mig.report import whatif as what_if

    return rendered(analysis.breakdown, "text", output, color) + what_if.text(analysis.breakdown)


def _json(analysis: Analysis, output: str, color: str) -> str:
    return rendered(analysis.breakdown, "json", output, color)


def _html(analysis: Analysis, output: str, color: str) -> str:  # noqa: ARG001
    from ebpf_mig.analysis import lanes
    from ebpf_mig.report import html

    return html.render(analysis.breakdown, lanes.view(analysis))


def _perfetto(analysis: Analysis, output: str, color: str) -> bytes:  # noqa: ARG001
    from ebpf_mig.analysis import lanes
    from ebpf_mig.report import perfetto

    return perfetto.render(analysis.breakdown, analysis.header, lanes.view(analysis))


def _csv(analysis: Analysis, output: str, color: str) -> str:  # noqa: ARG001
    from ebpf_mig.report import csv

    return csv.render(analysis.breakdown)


def _markdown(analysis: Analysis, output: str, color: str) -> str:  # noqa: ARG001
    from ebpf_mig.report import markdown

    picture = _picture(output)
    return markdown.render(analysis.breakdown, picture.name if picture else "")


def _picture(output: str) -> Path | None:
    """The file for the timeline beside a markdown report; None if that goes to stdout, a pipe or a device."""
    file = Path(output)
    if output == "-" or (file.exists() and not file.is_file()):
        return None
    if file.suffix == ".svg":
        raise UsageError(f"{output} would be both the report and its picture", "name it .md, or use --format svg")
    return file.with_suffix(".svg")


def _svg(analysis: Analysis, output: str, color: str) -> str:  # noqa: ARG001
    from ebpf_mig.analysis import lanes
    from ebpf_mig.report import svg

    return svg.render(analysis.breakdown, lanes.view(analysis))


def _folded(analysis: Analysis, output: str, color: str) -> str:  # noqa: ARG001
    from ebpf_mig.report import folded

    return folded.render(_stacks(analysis))


def _speedscope(analysis: Analysis, output: str, color: str) -> str:  # noqa: ARG001
    from ebpf_mig.report import answer, speedscope

    return speedscope.render(_stacks(analysis), answer.headline(analysis.breakdown))


def _pprof(analysis: Analysis, output: str, color: str) -> bytes:  # noqa: ARG001
    from ebpf_mig.report import pprof

    return pprof.render(_stacks(analysis), analysis.header, analysis.attribution.window)


def _stacks(analysis: Analysis) -> Sequence[Stack]:
    """The stacks in the window. A line on stderr says why there are none."""
    from ebpf_mig.analysis import stacks

    found = stacks.observe(analysis)
    if not found:
        click.echo(f"ebpf-mig: no stacks: {stacks.why_none(analysis)}", err=True)
    return found


FORMATS: dict[str, Callable[[Analysis, str, str], str | bytes]] = {
    "text": _text,
    "json": _json,
    "html": _html,
    "perfetto": _perfetto,
    "csv": _csv,
    "markdown": _markdown,
    "svg": _svg,
    "folded": _folded,
    "speedscope": _speedscope,
    "pprof": _pprof,
}
"""By name: makes the report from the analysis, the name of the output and the colour choice. Each imports what it
needs.
"""
_WITH_AXIS = ("html", "perfetto", "svg", "markdown")
_FROM_BREAKDOWN = ("text", "json", "csv", "markdown")
_PREDICTING = ("text", "json", "html")


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
        needed = form not in _FROM_BREAKDOWN or redact or bool(changes) or phase is not None or symbols is not None
        found = in_result(file, number, form, needed)
        if not isinstance(found, str):
            write_result(_from_breakdown(found, form, output, color), output, force=force)
            if isinstance(found, Breakdown):
                require_complete(found, strict)
            return
        file = found
    elif number is not None:
        raise UsageError(f"{printable(file)} is not a result of bench", "leave out --run")
    if changes and form not in _PREDICTING:
        raise UsageError(f"--format {form} has no place for a prediction", f"use --format {', '.join(_PREDICTING)}")
    if phase and form != "text":
        raise UsageError(f"--explain prints text, not {form}", "leave out --format")
    wanted = parse_changes(changes)
    picture = _picture(output) if form == "markdown" else None
    if picture is not None and not force and os.path.lexists(picture):
        raise UsageError(f"{picture} exists; not overwritten", "give the report another name, or --force")
    analysis = _analysis(file, redact, form in _WITH_AXIS, symbols)
    if changes:
        from ebpf_mig.analysis import whatif

        predicted = whatif.predict(analysis, wanted)
        analysis = replace(analysis, breakdown=msgspec.structs.replace(analysis.breakdown, what_if=predicted))
    shown = _explained(analysis, phase, output, color) if phase else FORMATS[form](analysis, output, color)
    write_result(shown, output, force=force)
    if picture is not None:
        write_result(_svg(analysis, output, color), str(picture), force=force)
    require_complete(analysis.breakdown, strict)


def _from_breakdown(found: Breakdown | Sheet, form: str, output: str, color: str) -> str:
    from ebpf_mig.commands.results import shown
    from ebpf_mig.report import csv, markdown

    if not isinstance(found, Breakdown):
        return shown(found, form)
    if form in ("csv", "markdown"):
        return csv.render(found) if form == "csv" else markdown.render(found)
    return rendered(found, form, output, color)


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


def rendered(breakdown: Breakdown, form: str, output: str, color: str) -> str:
    """The report in the requested format, suited to its output."""
    if form == "json":
        from ebpf_mig.report import json

        return json.render(breakdown)
    from ebpf_mig.report import text

    return text.render(breakdown, _canvas(output, color), verbose=_verbose())


def _explained(analysis: Analysis, phase: str, output: str, color: str) -> str:
    from ebpf_mig.report import explain

    return explain.render(analysis, PhaseName(phase), _canvas(output, color))


def _canvas(output: str, color: str) -> Canvas:
    return canvas_for(sys.stdout if output == "-" else None, color)


def _verbose() -> bool:
    """Whether `-v` was given; `cli.py` adds it to each command."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get("ebpf_mig.verbose", 0) > 0


def require_complete(breakdown: Breakdown, strict: bool) -> None:
    """Raise IncompleteError if `strict` and the verdict is `incomplete`."""
    if strict and breakdown.completeness.verdict == Verdict.INCOMPLETE:
        reasons = breakdown.completeness.reasons
        raise IncompleteError(f"incomplete: {reasons[0]}" if reasons else "the recording is incomplete")


_PLAIN_CHANGES = ("nodelay", "untraced")
"""Conditions without a value."""


def parse_changes(texts: Sequence[str]) -> Hypothesis:
    """Parses `NAME=VALUE` items; UsageError if one cannot be read or is given twice."""
    from ebpf_mig.analysis.diagnosis.rules import PREDICTABLE

    values: dict[str, tuple[str, str]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        known_names = {"bandwidth", "fetch", "rearm", *_PLAIN_CHANGES, *PREDICTABLE}
        if name not in known_names or (name in _PLAIN_CHANGES) == bool(equals):
            known = f"bandwidth=25Gbit, {', '.join(_PLAIN_CHANGES)}, or =0 behind one of fetch, rearm, "
            known += ", ".join(PREDICTABLE)
            raise UsageError(f"cannot read the change {text!r}", f"write {known}")
        if name in values:
            raise UsageError(f"{name} is given twice")
        values[name] = (value, text)
    bandwidth = RATE.convert(values["bandwidth"][0], None, None) if "bandwidth" in values else None
    if bandwidth == 0:
        raise UsageError("the bandwidth cannot be 0", "write it like bandwidth=25Gbit")
    fetch, rearm = (_share(*values[name]) if name in values else None for name in ("fetch", "rearm"))
    causes = tuple((name, _share(*values[name])) for name in values if name in PREDICTABLE)
    return Hypothesis(
        bandwidth,
        fetch,
        rearm,
        "nodelay" in values,
        "untraced" in values,
        causes,
        tuple((name, text) for name, (_, text) in values.items()),
    )


def _share(value: str, text: str) -> Fraction:
    """`0`, or the remaining share in per cent."""
    match = re.fullmatch(r"0|([0-9]{1,5}(?:\.[0-9]{1,6})?)%", value, re.ASCII)
    if match is None:
        raise UsageError(
            f"cannot read the change {text!r}", f"write {text.partition('=')[0]}=0, or =50% for half of it"
        )
    return Fraction(match[1] or 0) / 100


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
