# SPDX-License-Identifier: Apache-2.0
"""How a figure grows with a setting: a line through the medians of the steps of a sweep.

In: for each step a number and a sample of durations. Out: slope and intercept with their confidence intervals. The
intercept is the part that does not depend on the setting.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ebpf_mig.compare.stats import quantile

_RESAMPLES = 2_000
LEAST = 6
"""Runs of a step from which on there is a 95 % interval of its median: 1 - 2 / 2**6 = 0.97, 1 - 2 / 2**5 = 0.94."""

Step = tuple[float, Sequence[int]]
"""The setting's value, and the durations in ns."""


@dataclass(frozen=True, slots=True)
class Fit:
    """`intercept + slope * x`, in ns and ns per unit of x. The intervals hold at 95 % (bootstrap within the steps);
    None where a step has fewer than LEAST runs.
    """

    slope: float
    intercept: float
    slope_between: tuple[float, float] | None = None
    intercept_between: tuple[float, float] | None = None


def fit(steps: Sequence[Step]) -> Fit | None:
    """The least-squares line through the medians; None with fewer than two different steps that were measured."""
    known = [(x, sample) for x, sample in steps if sample]
    if len({x for x, _ in known}) < 2:
        return None
    slope, intercept = _line([(x, median(sample)) for x, sample in known])
    if min(len(sample) for _, sample in known) < LEAST:
        return Fit(slope, intercept)
    draw = random.Random(f"{known}")  # noqa: S311 - statistics, not secrets
    drawn = [_line([(x, median(draw.choices(s, k=len(s)))) for x, s in known]) for _ in range(_RESAMPLES)]
    slopes, intercepts = zip(*drawn, strict=True)
    return Fit(slope, intercept, _between(slopes), _between(intercepts))


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(slope, intercept)"""
    middle_x = sum(x for x, _ in points) / len(points)
    middle_y = sum(y for _, y in points) / len(points)
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    slope = sum((x - middle_x) * (y - middle_y) for x, y in points) / spread
    return slope, middle_y - slope * middle_x


def _between(values: Sequence[float]) -> tuple[float, float]:
    return quantile(values, 0.025), quantile(values, 0.975)
