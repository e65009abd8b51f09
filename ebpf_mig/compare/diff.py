# SPDX-License-Identifier: Apache-2.0
"""Tests whether two benchmarks differ in each figure, and whether a gate forbids the difference.

In: two `Benchmark`s, conditions such as `blackout.p50>+5%`. Out: `Difference`s and `Ruling`s. A change counts as a
difference only if a permutation test finds it (corrected for the number of figures) and it exceeds the noise. The noise
is how far two series like A differ by chance. With fewer than four runs on a side the verdict is "too few runs".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction

from ebpf_mig.compare import stats
from ebpf_mig.compare.benchmark import FIGURES, Benchmark
from ebpf_mig.errors import UsageError

SIGNIFICANT = 0.05

_STATISTICS: dict[str, stats.Statistic] = {
    "p50": stats.median,
    "p95": stats.p95,
    "max": max,
    "min": min,
}
_UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
_CONDITION = re.compile(
    r"(?P<figure>[a-z.]+)\.(?P<statistic>p50|p95|max|min) ?> ?"
    r"(?P<sign>\+?)(?P<number>\d{1,12}(?:\.\d{1,9})?) ?(?P<unit>%|ns|us|ms|s)"
)


class Finding(StrEnum):
    """How a figure changed from A to B."""

    SLOWER = "slower"
    """B is longer, beyond chance and noise."""
    FASTER = "faster"
    """B is shorter, beyond chance and noise."""
    NO_DIFFERENCE = "no difference"
    """Chance and noise can explain the change."""
    TOO_FEW_RUNS = "too few runs"
    """Too few runs for a test."""
    NOT_MEASURED = "not measured"
    """One side did not measure the figure."""


@dataclass(frozen=True)
class Difference:
    """One figure in A and in B, in ns."""

    figure: str
    runs: tuple[int, int]
    before: float
    after: float
    p: float
    """The permutation test's p, corrected for the number of figures."""
    effect: float
    """Cliff's delta; positive: B is larger."""
    noise: float
    verdict: Finding


@dataclass(frozen=True)
class Condition:
    """A parsed `--fail-if`."""

    text: str
    figure: str
    statistic: str
    relative: bool
    """True: the limit is on the change from A to B. False: it is on B alone."""
    percent: bool
    limit: Fraction
    """Per cent or ns."""


@dataclass(frozen=True)
class Ruling:
    """The result of one condition."""

    condition: Condition
    failed: bool
    why: str
    p: float | None = None
    """The permutation test's p, corrected for the number of conditions; None if the condition is on B alone."""


def parse_condition(text: str) -> Condition:
    """`FIGURE.STATISTIC>LIMIT`: `+5%` and `+2ms` limit the change, `50ms` the value in B. UsageError otherwise."""
    match = _CONDITION.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"cannot read the condition {text!r}", "write it like blackout.p50>+5%, fetch.p95>+2ms or blackout.max>80ms"
        )
    if match["figure"] not in FIGURES:
        raise UsageError(f"no figure is called {match['figure']}", f"figures: {', '.join(FIGURES)}")
    percent, relative = match["unit"] == "%", bool(match["sign"])
    if percent and not relative:
        raise UsageError(f"a limit in per cent must be a change, in {text!r}", "write it with a plus: +5%")
    limit = Fraction(match["number"]) * (1 if percent else _UNITS[match["unit"]])
    return Condition(text.strip(), match["figure"], match["statistic"], relative, percent, limit)


def compare(a: Benchmark, b: Benchmark) -> list[Difference]:
    """The difference of every figure."""
    samples = [(figure, a.sample(figure), b.sample(figure)) for figure in FIGURES]
    tested = [i for i, (_, x, y) in enumerate(samples) if _enough(x, y)]
    corrected = stats.holm([stats.rank_p(samples[i][1], samples[i][2]) for i in tested])
    p_of = dict(zip(tested, corrected, strict=True))
    return [_difference(figure, x, y, p_of.get(i, 1.0)) for i, (figure, x, y) in enumerate(samples)]


def _difference(figure: str, x: Sequence[int], y: Sequence[int], p: float) -> Difference:
    runs = (len(x), len(y))
    if not x or not y:
        before, after = (float(stats.median(v)) if v else 0.0 for v in (x, y))
        return Difference(figure, runs, before, after, 1.0, 0.0, 0.0, Finding.NOT_MEASURED)
    before, after = float(stats.median(x)), float(stats.median(y))
    noise, effect = stats.noise_floor(x, len(y)), stats.effect_size(x, y)
    verdict = Finding.TOO_FEW_RUNS
    if _enough(x, y):
        apart = p < SIGNIFICANT and abs(after - before) > noise
        changed = Finding.SLOWER if after > before else Finding.FASTER
        verdict = changed if apart else Finding.NO_DIFFERENCE
    return Difference(figure, runs, before, after, p, effect, noise, verdict)


def rule(conditions: Sequence[Condition], a: Benchmark, b: Benchmark) -> list[Ruling]:
    """Judges every condition; UsageError if there are not enough runs to judge one."""
    for condition in conditions:
        x, y = a.sample(condition.figure), b.sample(condition.figure)
        if not y or (condition.relative and not _enough(x, y)):
            raise UsageError(
                f"{condition.text} cannot be judged from {len(x)} and {len(y)} runs that measured {condition.figure}",
                f"a change needs {stats.MIN_RUNS} completed runs on each side, a limit on B needs one run in B",
            )
    changes = [c for c in conditions if c.relative]
    corrected = dict(zip(changes, stats.holm([_p(c, a, b) for c in changes]), strict=True))
    return [_rule(c, a.sample(c.figure), b.sample(c.figure), corrected.get(c)) for c in conditions]


def _p(condition: Condition, a: Benchmark, b: Benchmark) -> float:
    x, y = a.sample(condition.figure), b.sample(condition.figure)
    if condition.statistic == "p50":
        return stats.rank_p(x, y)
    return stats.permutation_p(x, y, _STATISTICS[condition.statistic])


def _rule(condition: Condition, x: Sequence[int], y: Sequence[int], p: float | None) -> Ruling:
    statistic = _STATISTICS[condition.statistic]
    after = float(statistic(y))
    if p is None:
        failed = after > condition.limit
        return Ruling(condition, failed, f"B is {after / 1e6:.3f} ms")
    before = float(statistic(x))
    change = after - before
    limit = float(condition.limit) * (before / 100 if condition.percent else 1)
    share = f"{100 * change / before:+.1f} %, " if before else ""
    why = f"{before / 1e6:.3f} -> {after / 1e6:.3f} ms, {share}p = {p:.4f}"
    if change <= limit:
        return Ruling(condition, False, why)
    if p >= SIGNIFICANT:
        return Ruling(condition, False, f"{why}: the difference may be chance")
    noise = stats.noise_floor(x, len(y), statistic)
    if change <= noise:
        return Ruling(condition, False, f"{why}: within the noise of {noise / 1e6:.3f} ms")
    return Ruling(condition, True, why, p)


def agreed(differences: Sequence[Difference], rulings: Sequence[Ruling]) -> list[Difference]:
    """The differences, with the verdict "slower" for each median that a condition forbids.

    The conditions are few and were fixed in advance, so their p needs less correction than that of all figures.
    """
    failed = {
        r.condition.figure: r.p for r in rulings if r.failed and r.condition.statistic == "p50" and r.p is not None
    }
    return [
        replace(d, verdict=Finding.SLOWER, p=min(d.p, failed[d.figure])) if d.figure in failed else d
        for d in differences
    ]


def _enough(x: Sequence[int], y: Sequence[int]) -> bool:
    return min(len(x), len(y)) >= stats.MIN_RUNS
