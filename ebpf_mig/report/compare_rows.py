# SPDX-License-Identifier: Apache-2.0
"""What `bench`, `diff` and its gate have to say, as rows. Text and markdown print the same rows.

In: a benchmark; or two with their differences and the rulings of the gate. Out: a `Sheet`. Durations are ms with three
decimals; names that come from a file are made printable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ebpf_mig.compare import stats
from ebpf_mig.compare.benchmark import FETCH, FIGURES, Benchmark
from ebpf_mig.compare.diff import Difference, Finding, Ruling
from ebpf_mig.compare.sweep import fit
from ebpf_mig.text import ms, printable

HEADLINES = frozenset({"blackout", "window", "total", FETCH})
"""Figures that are shown where there is no room for all."""
SWEPT = (FETCH, "blackout")
"""Figures whose growth a sweep shows."""
CLEAR = (Finding.SLOWER, Finding.FASTER)
"""Verdicts that say that there is a difference."""


class Line(NamedTuple):
    """A row of the table."""

    cells: tuple[str, ...]
    main: bool
    """It is shown where there is no room for all rows."""
    clear: bool = False
    """It says that there is a difference."""
    samples: tuple[list[int], ...] = ()
    """The values of single runs in ns, for each side."""


class Gate(NamedTuple):
    """The outcome of one condition."""

    outcome: str
    """`pass`, `FAIL` or `cannot tell`."""
    condition: str
    why: str


class Sheet(NamedTuple):
    """A table with what stands above and below it."""

    headline: str
    """The result in a few words."""
    about: list[str]
    """What was measured: one line for each side."""
    head: tuple[str, ...]
    """The names of the columns; a `#` before a name aligns the column as numbers."""
    lines: list[Line]
    notes: list[str]
    """What is missing or doubtful."""
    results: list[str]
    """What follows from the table."""
    gate: list[Gate]


def of_bench(benchmark: Benchmark) -> Sheet:
    """Median, p95 and the median's 95 % interval of each figure that is not 0 in every run."""
    headline = f"{printable(benchmark.scenario)}: {runs(benchmark)}"
    head = ("figure", "#runs", "#median ms", "#p95 ms", "#95 % interval of the median")
    return Sheet(headline, [], head, list(_figures(benchmark)), list(_blemishes(benchmark)), [], [])


def _figures(benchmark: Benchmark) -> Iterator[Line]:
    for figure in FIGURES:
        sample = benchmark.sample(figure)
        if not any(sample):
            continue
        middle, late = stats.median(sample), stats.p95(sample)
        cells = (figure, str(len(sample)), _ms(middle), _ms(late), _interval(sample))
        yield Line(cells, figure in HEADLINES, samples=(sample,))


def _interval(sample: Sequence[int]) -> str:
    """The median's 95 % interval."""
    low, high = stats.bootstrap_interval(sample)
    return f"{_ms(low)} .. {_ms(high)}"


def _blemishes(benchmark: Benchmark) -> Iterator[str]:
    for at, run in enumerate(benchmark.runs, 1):
        if run.error:
            yield f"run {at}: {printable(run.error)}"
        for reason in run.breakdown.completeness.reasons if run.breakdown else ():
            yield f"run {at}: {printable(reason)}"


def runs(benchmark: Benchmark) -> str:
    """`20 runs, 1 not completed, 2 with losses`."""
    count = len(benchmark.runs)
    text = f"{count} run{'s' if count != 1 else ''}"
    if failed := benchmark.failed():
        text += f", {failed} not completed"
    if incomplete := benchmark.incomplete():
        text += f", {incomplete} with losses"
    return text


class Axis(NamedTuple):
    """The setting that a sweep changes."""

    name: str
    unit: str
    """What the slope is per: `GiB`."""


def of_sweep(axis: Axis, steps: Sequence[tuple[str, float | None, Benchmark]]) -> Sheet:
    """Fetch and blackout of each step, and how they grow with the setting.

    `steps`: the setting as it was written, its number in units of the axis, None if it is none; the result.
    """
    lines = []
    for text, _, benchmark in steps:
        cells = [text, str(len(benchmark.sample("blackout")))]
        for figure in SWEPT:
            sample = benchmark.sample(figure)
            cells += (_ms(stats.median(sample)), _interval(sample)) if sample else ("-", "-")
        lines.append(Line(tuple(cells), main=True))
    head = (axis.name, "#runs", "#fetch ms", "#95 % interval", "#blackout ms", "#95 % interval")
    notes = [f"{text}: {note}" for text, _, benchmark in steps for note in _blemishes(benchmark)]
    scenario = printable(steps[0][2].scenario)
    return Sheet(f"{scenario}: sweep of {axis.name}", [], head, lines, notes, list(_lines_of(axis, steps)), [])


def _lines_of(axis: Axis, steps: Sequence[tuple[str, float | None, Benchmark]]) -> Iterator[str]:
    points = [(x, benchmark) for _, x, benchmark in steps if x is not None]
    if len(points) < len(steps):
        yield f"no slope: {axis.name} is not a number in each step"
        return
    for figure in SWEPT:
        found = fit([(x, benchmark.sample(figure)) for x, benchmark in points])
        if found is None:
            yield f"{figure}: no slope, since fewer than two steps measured it"
            continue
        few = min(len(benchmark.sample(figure)) for _, benchmark in points)
        slope, fixed = (
            f"no interval: n = {few}" if between is None else f"95 %: {' to '.join(map(_ms, between))}"
            for between in (found.slope_between, found.intercept_between)
        )
        yield f"{figure}: {_ms(found.slope)} ms per {axis.unit} ({slope})"
        yield f"{figure}: {_ms(found.intercept)} ms of it are fixed ({fixed})"


def of_diff(
    names: tuple[str, str],
    pair: tuple[Benchmark, Benchmark],
    differences: Sequence[Difference],
    rulings: Sequence[Ruling] = (),
) -> Sheet:
    """Both medians, the change, the noise, the p-value and the verdict of each figure; the gate."""
    about = [f"{letter}  {printable(name)}: {_facts(b)}" for letter, name, b in zip("AB", names, pair, strict=True)]
    head = ("figure", "#A ms", "#B ms", "#change", "#noise", "#p", "#p corr", "verdict")
    lines = [_line(d, pair) for d in differences if d.verdict != Finding.NOT_MEASURED and (d.before or d.after)]
    missing = [d.figure for d in differences if d.verdict == Finding.NOT_MEASURED]
    notes = [f"not measured on both sides: {', '.join(missing)}"] if missing else []
    results = _results(differences)
    gate = [Gate(_outcome(r), printable(r.condition.text), printable(r.why, 400)) for r in rulings]
    return Sheet(_verdict(gate) or results[0].capitalize(), about, head, lines, notes, results, gate)


def _facts(benchmark: Benchmark) -> str:
    return ", ".join(filter(None, (printable(benchmark.scenario), runs(benchmark), printable(benchmark.kernel))))


def _outcome(ruling: Ruling) -> str:
    return "cannot tell" if ruling.undecided else "FAIL" if ruling.failed else "pass"


def _line(d: Difference, pair: tuple[Benchmark, Benchmark]) -> Line:
    change = f"{100 * (d.after - d.before) / d.before:+.1f}%" if d.before else "new"
    clear = d.verdict in CLEAR
    verdict = str(d.verdict)
    sure = (_ms(d.noise), f"{d.raw_p:.4f}", f"{d.p:.4f}")
    if d.verdict == Finding.CANNOT_TELL:
        verdict += f" (n = {sum(d.runs)})"
        sure = ("-", "-", "-")
    cells = (d.figure, _ms(d.before), _ms(d.after), change, *sure, verdict)
    a, b = (side.sample(d.figure) for side in pair)
    return Line(cells, clear or d.figure in HEADLINES, clear, (a, b))


def _results(differences: Sequence[Difference]) -> list[str]:
    """The differences that are clear, or why there is none."""
    clear = [d for d in differences if d.verdict in CLEAR]
    if clear:
        return [
            f"{d.figure} is {d.verdict} by {_ms(abs(d.after - d.before))} ms ({stats.effect_word(d.effect)} effect)"
            for d in clear
        ]
    measured = [d for d in differences if d.verdict != Finding.NOT_MEASURED and (d.before or d.after)]
    if all(d.verdict == Finding.CANNOT_TELL for d in measured):
        needed = max((d.needed for d in measured), default=stats.MIN_RUNS)
        return [f"cannot tell: {needed} completed runs on each side can show a difference"]
    return ["no median differs"]


def _verdict(gate: Sequence[Gate]) -> str:
    """The outcome of the gate in a few words; empty without one."""
    if not gate:
        return ""
    conditions = f"{len(gate)} condition{'s' if len(gate) != 1 else ''}"
    failed, open_ = (sum(one.outcome == outcome for one in gate) for outcome in ("FAIL", "cannot tell"))
    if failed:
        return f"Gate failed: {failed} of {conditions}"
    return f"Gate cannot tell: {open_} of {conditions}" if open_ else f"Gate passed: {conditions}"


def _ms(ns: float) -> str:
    return ms(round(ns))
