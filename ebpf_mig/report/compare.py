# SPDX-License-Identifier: Apache-2.0
"""The tables of `bench` and `diff`, 80 columns, ASCII except for names that users chose.

In: a benchmark, or two with their differences. Out: text with a final newline. Durations in ms.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from ebpf_mig.compare import stats
from ebpf_mig.compare.benchmark import FIGURES, Benchmark
from ebpf_mig.compare.diff import Difference, Finding
from ebpf_mig.text import printable


def bench_table(benchmark: Benchmark) -> str:
    """Median, p95 and the median's 95 % interval of each figure."""
    return "\n".join(_bench_lines(benchmark)) + "\n"


def _bench_lines(benchmark: Benchmark) -> Iterator[str]:
    yield f"{printable(benchmark.scenario)}: {_runs(benchmark)}"
    yield ""
    yield f"{'figure':16}{'runs':>5}{'median ms':>12}{'p95 ms':>12}{'95 % interval of the median':>31}"
    for figure in FIGURES:
        sample = benchmark.sample(figure)
        if not sample or not any(sample):
            continue
        low, high = stats.bootstrap_interval(sample)
        interval = f"{_ms(low)} .. {_ms(high)}"
        yield f"{figure:16}{len(sample):>5}{_ms(stats.median(sample)):>12}{_ms(stats.p95(sample)):>12}{interval:>31}"
    for at, run in enumerate(benchmark.runs, 1):
        yield from _blemishes(at, run.error, run.breakdown.completeness.reasons if run.breakdown else [])


def _blemishes(at: int, error: str, reasons: list[str]) -> Iterator[str]:
    if error:
        yield f"run {at}: {printable(error)}"
    for reason in reasons:
        yield f"run {at}: {printable(reason)}"


def _runs(benchmark: Benchmark) -> str:
    count = len(benchmark.runs)
    text = f"{count} run{'s' if count != 1 else ''}"
    if failed := benchmark.failed():
        text += f", {failed} not completed"
    if incomplete := benchmark.incomplete():
        text += f", {incomplete} with losses"
    return text


def diff_table(names: tuple[str, str], pair: tuple[Benchmark, Benchmark], differences: Sequence[Difference]) -> str:
    """Both medians, the change, the noise, the p-value and the verdict."""
    return "\n".join(_diff_lines(names, pair, differences)) + "\n"


def _diff_lines(
    names: tuple[str, str], pair: tuple[Benchmark, Benchmark], differences: Sequence[Difference]
) -> Iterator[str]:
    for letter, name, benchmark in zip("AB", names, pair, strict=True):
        facts = ", ".join(filter(None, (_runs(benchmark), printable(benchmark.kernel))))
        yield f"{letter}  {printable(name)}: {printable(benchmark.scenario)}, {facts}"
    yield ""
    yield f"{'figure':14}{'A ms':>10}{'B ms':>10}{'change':>9}{'noise':>9}{'p':>8}  verdict"
    for d in differences:
        if d.verdict != Finding.NOT_MEASURED and (d.before or d.after):
            yield _difference(d)
    missing = [d.figure for d in differences if d.verdict == Finding.NOT_MEASURED]
    if missing:
        yield from textwrap.wrap(f"not measured on both sides: {', '.join(missing)}", 80, subsequent_indent="  ")
    yield ""
    yield _summary(differences)


def _difference(d: Difference) -> str:
    change = f"{100 * (d.after - d.before) / d.before:+.1f}%" if d.before else "new"
    sure = f"{_ms(d.noise):>9}{d.p:>8.4f}" if d.verdict != Finding.TOO_FEW_RUNS else f"{'-':>9}{'-':>8}"
    verdict: str = d.verdict
    if d.verdict in (Finding.SLOWER, Finding.FASTER):
        verdict += f" ({stats.effect_word(d.effect)})"
    return f"{d.figure:14}{_ms(d.before):>10}{_ms(d.after):>10}{change:>9}{sure}  {verdict}"


def _summary(differences: Sequence[Difference]) -> str:
    clear = [d for d in differences if d.verdict in (Finding.SLOWER, Finding.FASTER)]
    if clear:
        return "\n".join(f"{d.figure} is {d.verdict} by {_ms(abs(d.after - d.before))} ms" for d in clear)
    if all(d.verdict in (Finding.TOO_FEW_RUNS, Finding.NOT_MEASURED) for d in differences):
        return f"too few runs to tell: {stats.MIN_RUNS} completed ones are needed on each side"
    return "no median differs"


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.3f}"
