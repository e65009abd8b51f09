# SPDX-License-Identifier: Apache-2.0
"""Repeatable statistics of small samples of durations, without assumptions about their distribution.

In: lists of numbers. Out: numbers. Methods that resample are seeded from their data, so a comparison can be repeated
digit for digit. Latencies have outliers and long tails. So the methods use medians, ranks and resampling, not means
and t-tests.
"""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from statistics import median

__all__ = ["bootstrap_interval", "effect_size", "effect_word", "holm", "median", "noise_floor", "p95"]
__all__ += ["can_decide", "permutation_p", "quantile", "rank_p", "runs_needed"]

Statistic = Callable[[Sequence[float]], float]

SIGNIFICANT = 0.05
MIN_RUNS = 4
"""With fewer values, no permutation test can reach the 5 % level: 2 / C(6, 3) = 0.1, 2 / C(8, 4) = 0.03."""

_EXACT = 10_000
"""If there are at most this many permutations, all are tried."""
_DRAWS = 4_999
_LARGE, _DRAWS_LARGE = 400, 999
"""Large samples get fewer draws, because a table would take minutes. p is then only accurate to 0.001."""
_RESAMPLES = 2_000


def quantile(values: Sequence[float], share: float) -> float:
    """The `share` quantile, interpolated between neighbours (Hyndman and Fan's type 7). ValueError if empty."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def p95(values: Sequence[float]) -> float:
    """The 95th percentile. With fewer than 20 values it is close to their maximum."""
    return quantile(values, 0.95)


def bootstrap_interval(
    values: Sequence[float], statistic: Statistic = median, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap's confidence interval of `statistic`. ValueError if empty."""
    if not values:
        raise ValueError("no values")
    if _alike(values):
        return statistic(values), statistic(values)
    draw = _seeded(values)
    found = [statistic(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES)]
    return quantile(found, (1 - level) / 2), quantile(found, (1 + level) / 2)


def rank_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided permutation test of whether one sample tends to larger values (Wilcoxon's rank sum).

    Returns the probability of ranks at least this far apart if the labels `a` and `b` were assigned at random; 1 if one
    sample is empty.
    """
    pooled = sorted([*a, *b])
    doubled = {value: bisect_left(pooled, value) + bisect_right(pooled, value) for value in set(pooled)}
    return permutation_p([doubled[v] for v in a], [doubled[v] for v in b], sum)


def permutation_p(a: Sequence[float], b: Sequence[float], statistic: Statistic) -> float:
    """Two-sided permutation test of the difference between `statistic(a)` and `statistic(b)`.

    It is exact if all permutations can be tried. Otherwise it uses seeded draws, and the result is never 0 because the
    data themselves count as one draw. With `sum` the samples may differ in size: sums are compared with their
    expectation.
    """
    if not a or not b:
        return 1.0
    pooled = [*a, *b]
    if _alike(pooled):
        return 1.0
    size = len(a)
    expected = sum(pooled) * size / len(pooled)

    def apart(first: Sequence[float], second: Callable[[], Sequence[float]]) -> float:
        return abs(sum(first) - expected) if statistic is sum else abs(statistic(first) - statistic(second()))

    seen = apart(a, lambda: b) * (1 - 1e-12)
    if math.comb(len(pooled), size) <= _EXACT:
        ways = list(itertools.combinations(range(len(pooled)), size))
        hits = sum(apart([pooled[i] for i in way], lambda w=way: _others(pooled, w)) >= seen for way in ways)  # type: ignore[misc]
        return hits / len(ways)
    draw = _seeded(pooled)
    hits = 1
    draws = _DRAWS if len(pooled) <= _LARGE else _DRAWS_LARGE
    for _ in range(draws):
        draw.shuffle(pooled)
        hits += apart(pooled[:size], lambda: pooled[size:]) >= seen
    return hits / (draws + 1)


def can_decide(sizes: tuple[int, int], tests: int) -> bool:
    """Whether samples of these sizes can differ significantly after Holm's correction for that many tests.

    Even samples that do not overlap have a p: that of the two most extreme assignments of the labels. Sizes below
    MIN_RUNS cannot, whatever the other side's.
    """
    if min(sizes) < MIN_RUNS:
        return False
    ways = math.comb(sum(sizes), sizes[0])
    least = 2 / ways if ways <= _EXACT else 1 / ((_DRAWS if sum(sizes) <= _LARGE else _DRAWS_LARGE) + 1)
    return least * tests < SIGNIFICANT


def runs_needed(tests: int) -> int:
    """The smallest number of runs on each side that `can_decide`."""
    return next(count for count in itertools.count(MIN_RUNS) if can_decide((count, count), tests) or count > _LARGE)


def effect_size(a: Sequence[float], b: Sequence[float]) -> float:
    """Cliff's delta: how much more likely a value of `b` is above a value of `a` than below it. -1 to 1; 0 if empty."""
    if not a or not b:
        return 0.0
    ordered = sorted(a)
    more = sum(bisect_left(ordered, value) for value in b)
    less = sum(len(a) - bisect_right(ordered, value) for value in b)
    return (more - less) / (len(a) * len(b))


def effect_word(delta: float) -> str:
    """The usual names of Cliff's delta (Romano et al., 2006)."""
    size = abs(delta)
    return "negligible" if size < 0.147 else "small" if size < 0.33 else "medium" if size < 0.474 else "large"


def noise_floor(values: Sequence[float], other: int, statistic: Statistic = median) -> float:
    """How far `statistic` differs by chance, 95 times in 100, between two samples of the population of `values`.

    One sample has the size of `values`, the other the size `other`. ValueError if one is empty.
    """
    if not values or other < 1:
        raise ValueError("no values")
    if _alike(values):
        return abs(statistic(values) - statistic([values[0]] * other))
    draw = _seeded(values)
    found = [
        abs(statistic(draw.choices(values, k=len(values))) - statistic(draw.choices(values, k=other)))
        for _ in range(_RESAMPLES)
    ]
    return quantile(found, 0.95)


def holm(probabilities: Sequence[float]) -> list[float]:
    """The probabilities corrected for multiple tests (Holm's step-down), in the given order."""
    order = sorted(range(len(probabilities)), key=lambda i: probabilities[i])
    corrected = [1.0] * len(probabilities)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, probabilities[index] * (len(order) - rank)))
        corrected[index] = highest
    return corrected


def _alike(values: Sequence[float]) -> bool:
    """Whether every sample of them is the same. Many figures are: those of a phase that there is not."""
    return min(values) == max(values)


def _others(pooled: Sequence[float], way: Sequence[int]) -> list[float]:
    taken = set(way)
    return [value for index, value in enumerate(pooled) if index not in taken]


def _seeded(values: Sequence[float]) -> random.Random:
    return random.Random(f"{len(values)} {sum(values):.6g}")  # noqa: S311 - statistics, not secrets
