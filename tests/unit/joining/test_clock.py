# SPDX-License-Identifier: Apache-2.0
"""Bounds on the offset of two clocks, against clocks that are known."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import pairwise

import pytest

from ebpf_mig.joining import clock
from ebpf_mig.joining.clock import ContradictionError, Evidence, Hull, bounds

S = 10**9


def hull(*points: tuple[int, int]) -> Hull:
    made = Hull()
    for point in points:
        made.add(*point)
    return made


def test_a_pair_each_way_bounds_the_offset() -> None:
    known = bounds(Evidence([hull((5 * S, 120))], [hull((5 * S, -100))]), 5 * S)
    assert (known.least, known.most) == (100, 120)
    assert known.offset == 110
    assert known.bound == 10


def test_a_pair_further_away_bounds_less_because_rates_can_differ() -> None:
    known = bounds(Evidence([hull((4 * S, 120))], [hull((5 * S, -100))]), 5 * S)
    assert known.most == 120 + S // 1000 + S // 10**6


def test_pairs_far_apart_bound_the_rate_and_the_offset_between_them() -> None:
    drift = 50e-6
    points = [(x, round(x * drift)) for x in range(0, 10 * S, S)]
    exact = Evidence([hull(*points)], [hull(*((x, -y) for x, y in points))])
    known = bounds(exact, 4 * S + S // 2)
    assert known.bound is not None
    assert known.bound <= 4501  # only the first and last pair of a line are kept; the rate may drift in between
    assert abs(known.offset - 4.5 * S * drift) <= known.bound
    low, high = known.drift
    assert low <= Fraction(50, 10**6) <= high
    assert high - low < Fraction(10, 10**6)


@pytest.mark.parametrize("side", ["least", "most"])
def test_without_pairs_one_way_that_side_is_open(side: str) -> None:
    one = [hull((S, 7))]
    known = bounds(Evidence(one, []) if side == "least" else Evidence([], one), S)
    assert getattr(known, side) is None
    assert known.bound is None
    assert known.offset == (7 if side == "least" else -7)


def test_pairs_that_fit_no_clocks_are_a_contradiction() -> None:
    with pytest.raises(ContradictionError):
        bounds(Evidence([hull((S, 99))], [hull((S, -100))]), S)
    with pytest.raises(ContradictionError):  # a second apart, and 2 ms of difference: 2000 ppm
        bounds(Evidence([hull((S, 0))], [hull((2 * S, -2_002_000))]), S)


def test_random_clocks_lie_within_their_bounds() -> None:
    random.seed(7)
    for _ in range(200):
        offset, ppm = random.randint(-3600 * S, 3600 * S), random.uniform(-100, 100)
        begin = random.randint(0, 10**6) * S

        def ahead(at: int, *known: float) -> int:
            return int(known[0]) + round((at - known[2]) * known[1] / 1e6)

        truth = (offset, ppm, begin)
        most, least = Hull(), Hull()
        for at in sorted(random.randint(begin, begin + 20 * S) for _ in range(50)):
            most.add(at, ahead(at, *truth) + random.randint(0, 10**6))
        for at in sorted(random.randint(begin, begin + 20 * S) for _ in range(5)):
            least.add(at, -ahead(at, *truth) + random.randint(0, 10**6))
        for at in (begin, begin + 10 * S, begin + 25 * S):
            known = bounds(Evidence([most], [least]), at)
            assert known.least is not None
            assert known.most is not None
            assert known.least <= ahead(at, *truth) + 1
            assert ahead(at, *truth) - 1 <= known.most


def test_the_hull_keeps_few_points_and_every_line_below_it_is_below_all() -> None:
    random.seed(3)
    points = [(x, random.randint(0, 10**6)) for x in range(0, 10**7, 100)]
    kept = hull(*points)
    assert kept.count == len(points)
    assert len(kept.points) < 100
    for (x1, y1), (x2, y2) in pairwise(kept.points):
        assert all((y - y1) * (x2 - x1) >= (y2 - y1) * (x - x1) for x, y in points if x1 <= x <= x2)


def test_a_hull_made_to_be_large_is_thinned_and_the_bound_only_gets_wider() -> None:
    curved = [(x * 1000, x * x) for x in range(20_000)]
    known = bounds(Evidence([hull(*curved)], [hull((0, 0))]), 0)
    assert known.most == 0
    assert len(list(clock._thinned(curved))) == clock.MOST_CORNERS
