# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig diff`: compares two benchmarks, and checks the conditions of a gate.

In: two result files of `bench`, or recordings. Out: a table on stdout; exit code 6 on a regression.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from ebpf_mig.commands.options import examples, format_option, write_result
from ebpf_mig.compare.benchmark import Benchmark, decode, of_recording
from ebpf_mig.compare.diff import Difference, Ruling, agreed, compare, parse_condition, rule
from ebpf_mig.errors import RegressionError, UsageError
from ebpf_mig.recording.format import MAGIC
from ebpf_mig.text import printable

_RESULT_MOST_BYTES = 1 << 30

_EXAMPLES = examples(
    "ebpf-mig diff before.json after.json",
    "ebpf-mig diff before.json after.json --fail-if 'blackout.p50>+5%'",
    "ebpf-mig diff a.json b.json --fail-if 'fetch.p95>+2ms'",
)


@click.command("diff", epilog=_EXAMPLES)
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "--fail-if",
    "conditions",
    multiple=True,
    metavar="CONDITION",
    help="Exit with 6 if this holds and chance does not explain it: FIGURE.{p50,p95,max,min}>{+5%,+2ms,80ms}.",
)
@format_option("text", "json", "markdown")
def command(a: str, b: str, conditions: Sequence[str], form: str) -> None:
    """Compare two benchmarks, phase by phase: B against A.

    A and B are result files of `bench`. A recording counts as a single run.
    """
    wanted = [parse_condition(text) for text in conditions]
    before, after = load(a), load(b)
    rulings = rule(wanted, before, after)
    differences = agreed(compare(before, after), rulings)
    if form == "json":
        write_result(_json(differences, rulings))
    else:
        from ebpf_mig.report import compare as tables
        from ebpf_mig.report import compare_markdown, compare_rows

        sheet = compare_rows.of_diff((a, b), (before, after), differences, rulings)
        write_result(tables.diff_table(sheet) if form == "text" else compare_markdown.render(sheet))
    broken = [f"{r.condition.text} ({r.why})" for r in rulings if r.failed]
    if broken:
        raise RegressionError("regression: " + "; ".join(broken))


def load(name: str) -> Benchmark:
    """A benchmark from a result file, or from a recording; UsageError if the file is neither."""
    try:
        with Path(name).open("rb") as file:
            data = file.read(_RESULT_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {printable(name)}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > _RESULT_MOST_BYTES:
        raise UsageError(f"{printable(name)} is larger than {_RESULT_MOST_BYTES >> 30} GiB")
    if not data.startswith(MAGIC):
        return decode(data, printable(name))
    from ebpf_mig.collector import analyse
    from ebpf_mig.recording.file import read_recording

    recording = read_recording(data, within_budget=True)
    if recording.truncated:
        print(f"ebpf-mig: {printable(name)} is cut off: {printable(recording.reason)}", file=sys.stderr)  # noqa: T201
    breakdown = analyse(recording).breakdown
    return of_recording(breakdown, "recording")


def _json(differences: Sequence[Difference], rulings: Sequence[Ruling]) -> str:
    whole = {"schema": "ebpf-mig/diff/1", "differences": differences, "rulings": [_plain(r) for r in rulings]}
    return msgspec.json.format(msgspec.json.encode(whole), indent=2).decode() + "\n"


def _plain(ruling: Ruling) -> dict[str, object]:
    return {"condition": ruling.condition.text, "failed": ruling.failed, "why": ruling.why}
