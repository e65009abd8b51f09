# SPDX-License-Identifier: Apache-2.0
"""`bench --versus OPTION=VALUE`: two settings, or two VMM binaries, in turn.

In: the texts, and the command whose options they name; then the two results. Out: the values as the options read them;
both distributions, and the difference with the statistics of `diff`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ebpf_mig.commands.options import write_result
from ebpf_mig.commands.results import enforce, shown
from ebpf_mig.compare.benchmark import Benchmark
from ebpf_mig.compare.diff import Condition, judge
from ebpf_mig.errors import UsageError
from ebpf_mig.report import compare_rows


def parse(texts: Sequence[str], names: Sequence[str], context: click.Context) -> dict[str, Any]:
    """The changes of B against A, by parameter. `names`: the options that can change. UsageError otherwise."""
    changes: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.removeprefix("--").partition("=")
        option = next((p for p in context.command.params if p.name == name.replace("-", "_")), None)
        if option is None or option.name not in names:
            known = ", ".join(one.replace("_", "-") for one in names)
            raise UsageError(f"cannot read the change {text!r}", f"write OPTION=VALUE with one of {known}")
        if option.name in changes:
            raise UsageError(f"--versus {name} is given twice")
        if getattr(option, "is_flag", False):
            if equals:
                raise UsageError(f"--{name} has no value", f"write --versus {name}")
            changes[option.name] = not context.params[option.name]
            continue
        if not value:
            raise UsageError(f"--versus {name} has no value", f"write --versus {name}=VALUE")
        changes[option.name] = option.type.convert(value, option, context)
    if changes and all(context.params[name] == value for name, value in changes.items()):
        raise UsageError("both sides of --versus are the same", "give B another value than A")
    return changes


def conclude(
    names: tuple[str, str], texts: tuple[str, str], pair: tuple[Benchmark, Benchmark],
    conditions: Sequence[Condition], form: str,
) -> None:  # fmt: skip
    """Prints both sides and the difference. `texts` describe the sides.

    RegressionError or UsageError as `diff` does.
    """
    differences, rulings = judge(*pair, [c for c in conditions if _can_be_judged(c, pair)])
    if form == "text":
        for letter, text, one in zip("AB", texts, pair, strict=True):
            sheet = compare_rows.of_bench(one)
            write_result(shown(sheet._replace(headline=f"{letter} ({text}), {sheet.headline}"), form) + "\n")
    sheet = compare_rows.of_diff(names, pair, differences, rulings)
    about = [f"{line}, {text}" for line, text in zip(sheet.about, texts, strict=True)]
    write_result(shown(sheet._replace(about=about), form))
    missing = [c.text for c in conditions if not _can_be_judged(c, pair)]
    if missing:
        raise UsageError(f"{missing[0]} cannot be judged: a side measured no {missing[0].partition('.')[0]}")
    enforce(rulings)


def _can_be_judged(condition: Condition, pair: tuple[Benchmark, Benchmark]) -> bool:
    return all(one.sample(condition.figure) for one in (pair if condition.relative else pair[1:]))
