# SPDX-License-Identifier: Apache-2.0
"""Result files of `bench`, as `diff`, `bench` and `report` read and show them.

In: a file's name. Out: a `Benchmark`, or what the file has of one run; a sheet as text, markdown or html.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.compare.benchmark import Benchmark, decode, of_recording
from ebpf_mig.errors import RegressionError, UsageError
from ebpf_mig.recording.format import MAGIC
from ebpf_mig.text import printable

if TYPE_CHECKING:
    from ebpf_mig.compare.diff import Ruling
    from ebpf_mig.report.compare_rows import Sheet

_LARGEST_RESULT = 1 << 30
_OF_ALL_RUNS = "--format text, markdown or html"


fail_if_option = click.option(
    "--fail-if",
    "conditions",
    multiple=True,
    metavar="CONDITION",
    help="Exit with 6 if this holds and chance does not explain it: FIGURE.{p50,p95,max,min}>{+5%,+2ms,80ms}.",
)


def enforce(rulings: Sequence[Ruling]) -> None:
    """RegressionError if a condition of the gate failed; UsageError if there are too few runs to judge one."""
    broken = [f"{r.condition.text} ({r.why})" for r in rulings if r.failed]
    if broken:
        raise RegressionError("regression: " + "; ".join(broken))
    undecided = [r for r in rulings if r.undecided]
    if undecided:
        raise UsageError(
            f"too few runs to judge {', '.join(r.condition.text for r in undecided)}",
            f"{max(r.needed for r in undecided)} completed runs on each side can decide",
        )


def shown(sheet: Sheet, form: str) -> str:
    """A comparison, or the figures of a benchmark, as text, markdown or html."""
    from ebpf_mig.report import compare as tables
    from ebpf_mig.report import compare_html, compare_markdown

    if form == "text":
        return tables.render(sheet)
    return compare_html.render(sheet) if form == "html" else compare_markdown.render(sheet)


def load(name: str) -> Benchmark:
    """A benchmark from a result file, or from a recording; UsageError if the file is neither."""
    try:
        with Path(name).open("rb") as file:
            data = file.read(_LARGEST_RESULT + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {printable(name)}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > _LARGEST_RESULT:
        raise UsageError(f"{printable(name)} is larger than {_LARGEST_RESULT >> 30} GiB")
    if not data.startswith(MAGIC):
        return decode(data, printable(name))
    from ebpf_mig.collector import analyse
    from ebpf_mig.recording.file import read_recording

    recording = read_recording(data, within_budget=True)
    if recording.truncated:
        click.echo(f"ebpf-mig: {printable(name)} is cut off: {printable(recording.reason)}", err=True)
    breakdown = analyse(recording).breakdown
    return of_recording(breakdown, "recording")


def is_result(name: str) -> bool:
    """Whether a file looks like a result of `bench`: its first byte is that of a JSON object."""
    try:
        file = Path(name)
        with file.open("rb") as opened:
            return file.is_file() and opened.read(1) == b"{"
    except (OSError, ValueError):
        return False


def in_result(file: str, number: int | None, form: str, recording_needed: bool) -> str | Breakdown | Sheet:
    """What a result file has to show: the recording of a run, else its breakdown; without a number, all runs."""
    from ebpf_mig.report import compare_rows

    result = load(file)
    if number is None:
        if form not in ("text", "markdown", "html"):
            raise UsageError(f"there is no {form} of all runs", f"choose a run with --run N, or {_OF_ALL_RUNS}")
        return compare_rows.of_bench(result)
    if number > len(result.runs):
        raise UsageError(f"{printable(file)} has {len(result.runs)} runs", "choose one of them with --run N")
    run = result.runs[number - 1]
    kept = Path(file).parent / run.recording if run.recording else None
    if kept is not None and kept.is_file():
        return str(kept)
    why = f"is not at {printable(str(kept))} any more" if kept is not None else "was not kept"
    if recording_needed:
        raise UsageError(f"the recording of run {number} {why}, and this report needs it", "use bench --keep DIR")
    if run.breakdown is None:
        raise UsageError(f"run {number} left nothing to show: {printable(run.error)}")
    click.echo(f"ebpf-mig: the recording of run {number} {why}; this is what the result has of it", err=True)
    return run.breakdown
