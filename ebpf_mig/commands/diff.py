# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig diff`: compares two benchmarks, and checks the conditions of a gate.

In: two result files of `bench`, or recordings. Out: a table on stdout; exit code 6 on a regression.
"""

from __future__ import annotations

from collections.abc import Sequence

import click
import msgspec

from ebpf_mig.commands.options import examples, format_option, write_result
from ebpf_mig.commands.results import enforce, fail_if_option, load, shown
from ebpf_mig.compare.diff import Difference, Ruling, judge, parse_condition

_EXAMPLES = examples(
    "ebpf-mig diff before.json after.json",
    "ebpf-mig diff before.json after.json --fail-if 'blackout.p50>+5%'",
    "ebpf-mig diff a.json b.json --fail-if 'fetch.p95>+2ms'",
)


@click.command("diff", epilog=_EXAMPLES)
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@fail_if_option
@format_option("text", "json", "markdown", "html")
def command(a: str, b: str, conditions: Sequence[str], form: str) -> None:
    """Compare two benchmarks, phase by phase: B against A.

    A and B are result files of `bench`. A recording counts as a single run.
    """
    wanted = [parse_condition(text) for text in conditions]
    before, after = load(a), load(b)
    differences, rulings = judge(before, after, wanted)
    if form == "json":
        write_result(_json(differences, rulings))
    else:
        from ebpf_mig.report import compare_rows

        write_result(shown(compare_rows.of_diff((a, b), (before, after), differences, rulings), form))
    enforce(rulings)


def _json(differences: Sequence[Difference], rulings: Sequence[Ruling]) -> str:
    whole = {"schema": "ebpf-mig/diff/1", "differences": differences, "rulings": [_plain(r) for r in rulings]}
    return msgspec.json.format(msgspec.json.encode(whole), indent=2).decode() + "\n"


def _plain(ruling: Ruling) -> dict[str, object]:
    about = {"condition": ruling.condition.text, "failed": ruling.failed, "undecided": ruling.undecided}
    return {**about, "why": ruling.why, "p": ruling.p}
