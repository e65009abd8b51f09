# SPDX-License-Identifier: Apache-2.0
"""Tests whether two benchmarks differ in each figure, and whether a gate forbids the difference.

In: two `Benchmark`s, conditions such as `blackout.p50>+5%`. Out: `Difference`s and `Ruling`s. A change counts as a
difference only if a permutation test finds it (corrected for the number of figures) and it exceeds the noise. The noise
is how far two series like A differ by chance. Where even samples that do not overlap could not be told apart, the
verdict is "cannot tell", and so is the gate's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import NamedTuple

from ebpf_mig.compare import stats
from ebpf_mig.compare.benchmark import FIGURES, Benchmark
from ebpf_mig.errors import UsageError

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
    CANNOT_TELL = "cannot tell"
    """Too few runs: no difference, however large, would be significant."""
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
    """The permutation test's p, corrected for the number of tests; 1 if there is none."""
    raw_p: float
    """The same before the correction."""
    effect: float
    """Cliff's delta; positive: B is larger."""
    noise: float
    verdict: Finding
    needed: int
    """Runs on each side that can show a difference."""


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
    undecided: bool = False
    """There are too few runs to judge a change."""
    needed: int = 0
    """Runs on each side that can decide; 0 if the condition is on B alone."""


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


class _Test(NamedTuple):
    """A permutation test of one figure."""

    raw_p: float
    p: float
    tests: int
    """How many tests `p` is corrected for."""


_Samples = Mapping[str, tuple[Sequence[int], Sequence[int]]]


def judge(a: Benchmark, b: Benchmark, conditions: Sequence[Condition] = ()) -> tuple[list[Difference], list[Ruling]]:
    """The difference of every figure, and the result of every condition. UsageError if B did not measure one.

    A median on which there is a condition has one test, which both use: conditions are few and were fixed in advance,
    so their p needs less correction than that of all figures.
    """
    samples: _Samples = {figure: (a.sample(figure), b.sample(figure)) for figure in FIGURES}
    changes = [c for c in dict.fromkeys(conditions) if c.relative]
    planned = dict(zip(changes, _tests([_p(c, samples) for c in changes]), strict=True))
    tests = {c.figure: test for c, test in planned.items() if c.statistic == "p50"}
    rest = [name for name, (x, y) in samples.items() if name not in tests and x and y and any((*x, *y))]
    tests |= dict(zip(rest, _tests([stats.rank_p(*samples[name]) for name in rest]), strict=True))
    rulings = [_rule(c, *samples[c.figure], planned.get(c)) for c in conditions]
    return [_difference(name, x, y, tests.get(name, _Test(1.0, 1.0, 1))) for name, (x, y) in samples.items()], rulings


def compare(a: Benchmark, b: Benchmark) -> list[Difference]:
    """The difference of every figure, without conditions."""
    return judge(a, b)[0]


def _tests(raw: Sequence[float]) -> list[_Test]:
    return [_Test(one, corrected, len(raw)) for one, corrected in zip(raw, stats.holm(raw), strict=True)]


def _p(condition: Condition, samples: _Samples) -> float:
    x, y = samples[condition.figure]
    if condition.statistic == "p50" or not x or not y:
        return stats.rank_p(x, y)
    return stats.permutation_p(x, y, _STATISTICS[condition.statistic])


def _difference(figure: str, x: Sequence[int], y: Sequence[int], test: _Test) -> Difference:
    runs, needed = (len(x), len(y)), stats.runs_needed(test.tests)
    before, after = (float(stats.median(v)) if v else 0.0 for v in (x, y))
    if not x or not y:
        return Difference(figure, runs, before, after, 1.0, 1.0, 0.0, 0.0, Finding.NOT_MEASURED, needed)
    noise, effect = stats.noise_floor(x, len(y)), stats.effect_size(x, y)
    verdict = Finding.CANNOT_TELL
    if stats.can_decide(runs, test.tests):
        apart = test.p < stats.SIGNIFICANT and abs(after - before) > noise
        changed = Finding.SLOWER if after > before else Finding.FASTER
        verdict = changed if apart else Finding.NO_DIFFERENCE
    return Difference(figure, runs, before, after, test.p, test.raw_p, effect, noise, verdict, needed)


def _rule(condition: Condition, x: Sequence[int], y: Sequence[int], test: _Test | None) -> Ruling:
    if not y or (condition.relative and not x):
        raise UsageError(
            f"{condition.text} cannot be judged from {len(x)} and {len(y)} runs that measured {condition.figure}",
            "a change needs completed runs on each side, a limit on B needs one run in B",
        )
    statistic = _STATISTICS[condition.statistic]
    after = float(statistic(y))
    if test is None:
        failed = after > condition.limit
        return Ruling(condition, failed, f"B is {after / 1e6:.3f} ms")
    before = float(statistic(x))
    change, needed = after - before, stats.runs_needed(test.tests)
    limit = float(condition.limit) * (before / 100 if condition.percent else 1)
    share = f"{100 * change / before:+.1f} %, " if before else ""
    why = f"{before / 1e6:.3f} -> {after / 1e6:.3f} ms, {share}p = {test.raw_p:.4f}, corrected {test.p:.4f}"
    if not stats.can_decide((len(x), len(y)), test.tests):
        few = f"{why}: cannot tell (n = {len(x) + len(y)}); {needed} runs on each side can decide"
        return Ruling(condition, False, few, test.p, True, needed)
    if change <= limit:
        return Ruling(condition, False, why, test.p, needed=needed)
    if test.p >= stats.SIGNIFICANT:
        return Ruling(condition, False, f"{why}: the difference may be chance", test.p, needed=needed)
    noise = stats.noise_floor(x, len(y), statistic)
    if change <= noise:
        return Ruling(condition, False, f"{why}: within the noise of {noise / 1e6:.3f} ms", test.p, needed=needed)
    return Ruling(condition, True, why, test.p, needed=needed)
