# SPDX-License-Identifier: Apache-2.0
"""The forms of a report: `FORMATS`, and what a form can show.

In: an analysis or a breakdown, the name of the output, the colour choice. Out: the report, as text or bytes. A new kind
of report is a row in `FORMATS`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ebpf_mig.breakdown import Breakdown, PhaseName
from ebpf_mig.commands.terminal import canvas_for
from ebpf_mig.errors import UsageError
from ebpf_mig.report.canvas import Canvas

if TYPE_CHECKING:
    from ebpf_mig.analysis.result import Analysis
    from ebpf_mig.analysis.stacks import Stack
    from ebpf_mig.report.compare_rows import Sheet


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

    picture = picture_for(output)
    return markdown.render(analysis.breakdown, picture.name if picture else "")


def picture_for(output: str) -> Path | None:
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
WITH_AXIS = ("html", "perfetto", "svg", "markdown")
"""Those that draw a time axis, and so need each event."""
FROM_BREAKDOWN = ("text", "json", "csv", "markdown")
"""Those that a breakdown alone is enough for, such as that of a run in a result of `bench`."""
PREDICTING = ("text", "json", "html")
"""Those that show a prediction."""


def from_breakdown(found: Breakdown | Sheet, form: str, output: str, color: str) -> str:
    """A run of a result of `bench`, or its table, in one of the forms `FROM_BREAKDOWN`."""
    from ebpf_mig.commands.results import shown
    from ebpf_mig.report import csv, markdown

    if not isinstance(found, Breakdown):
        return shown(found, form)
    if form in ("csv", "markdown"):
        return csv.render(found) if form == "csv" else markdown.render(found)
    return rendered(found, form, output, color)


def rendered(breakdown: Breakdown, form: str, output: str, color: str) -> str:
    """The report in the requested format, suited to its output."""
    if form == "json":
        from ebpf_mig.report import json

        return json.render(breakdown)
    from ebpf_mig.report import text

    return text.render(breakdown, _canvas(output, color), verbose=_verbose())


def explained(analysis: Analysis, phase: str, output: str, color: str) -> str:
    """Everything about one phase, as text."""
    from ebpf_mig.report import explain

    return explain.render(analysis, PhaseName(phase), _canvas(output, color))


def _canvas(output: str, color: str) -> Canvas:
    return canvas_for(sys.stdout if output == "-" else None, color)


def _verbose() -> bool:
    """Whether `-v` was given; `cli.py` adds it to each command."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get("ebpf_mig.verbose", 0) > 0
