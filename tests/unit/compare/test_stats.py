# SPDX-License-Identifier: Apache-2.0
"""Statistics against values worked out by hand or printed in textbooks, and against known distributions."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpf_mig.compare import stats

SAMPLE = st.lists(st.integers(0, 10**9), min_size=1, max_size=30)


def noise(seed: int, count: int, mean: float = 100.0, spread: float = 10.0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(mean, spread) for _ in range(count)]


def test_quantile_of_a_known_sample() -> None:
    assert stats.quantile([15, 20, 35, 40, 50], 0.4) == pytest.approx(29)
    assert stats.p95(list(range(1, 101))) == pytest.approx(95.05)
    assert stats.p95([7]) == 7
    with pytest.raises(ValueError, match="no values"):
        stats.quantile([], 0.5)


def test_rank_test_agrees_with_the_exact_table() -> None:
    """Complete separation of 4 and 4: 2 of C(8, 4) = 70 ways; of 5 and 5: 2 of 252."""
    assert stats.rank_p([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)
    assert stats.rank_p([6, 7, 8, 9, 10], [1, 2, 3, 4, 5]) == pytest.approx(2 / 252)
    assert stats.rank_p([1, 3], [2, 4]) == pytest.approx(4 / 6)
    assert stats.rank_p([5, 5, 5], [5, 5, 5]) == 1
    assert stats.rank_p([], [1]) == 1


def test_samples_of_unequal_size() -> None:
    assert stats.rank_p([1, 2], [3, 4, 5, 6, 7, 8]) == pytest.approx(2 / 28)


def test_large_samples_are_drawn_and_repeatable() -> None:
    same = stats.rank_p(noise(1, 30), noise(2, 30))
    apart = stats.rank_p(noise(1, 30), noise(2, 30, mean=120))
    assert same > 0.05 and 0 < apart < 0.001
    assert same == stats.rank_p(noise(1, 30), noise(2, 30))


def test_false_alarms_are_as_rare_as_promised() -> None:
    alarms = sum(stats.rank_p(noise(2 * i, 6), noise(2 * i + 1, 6)) < 0.05 for i in range(200))
    assert alarms <= 20, "5 % of 200 are 10; 20 would be a chance of 1 in 400"


def test_permutation_of_any_statistic() -> None:
    assert stats.permutation_p([1, 1, 1, 1], [9, 9, 9, 9], stats.p95) < 0.5
    assert stats.permutation_p(noise(1, 20), noise(2, 20, mean=200), stats.p95) < 0.01


def test_effect_size() -> None:
    assert stats.effect_size([1, 2, 3], [4, 5, 6]) == 1
    assert stats.effect_size([4, 5, 6], [1, 2, 3]) == -1
    assert stats.effect_size([1, 2], [1, 2]) == 0
    assert stats.effect_size([1, 2, 3, 4], [2, 3, 4, 5]) == pytest.approx((10 - 3) / 16 + 0, abs=0.07)
    assert [stats.effect_word(d) for d in (0.1, -0.2, 0.4, -0.9)] == ["negligible", "small", "medium", "large"]


def test_bootstrap_interval_holds_the_median_and_covers_the_truth() -> None:
    values = noise(3, 25)
    low, high = stats.bootstrap_interval(values)
    assert low <= stats.median(values) <= high
    inside = sum(
        low <= 100 <= high for low, high in (stats.bootstrap_interval(noise(i, 20)) for i in range(1000, 1100))
    )
    assert inside >= 86, "percentile intervals of 20 values cover about 93 %; 86 of 100 would be a chance of 1 in 100"
    assert stats.bootstrap_interval([5]) == (5, 5)


def test_noise_floor_is_the_difference_of_equals() -> None:
    floor = stats.noise_floor(noise(1, 20), 20)
    assert 3 < floor < 15, "the median of 20 normal values has a deviation of 1.25 * 10 / sqrt(20)"
    assert stats.noise_floor([5, 5], 2) == 0
    assert stats.noise_floor(noise(2, 20, spread=50), 20) > 2 * floor
    assert stats.noise_floor(noise(1, 20), 4) > floor, "fewer runs give a wider interval"


@pytest.mark.parametrize("value", [0.0, 5.0, 0.1])
@pytest.mark.parametrize("statistic", [stats.median, stats.p95, sum])
def test_values_that_are_all_alike_give_what_resampling_gives(
    value: float, statistic: stats.Statistic, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = [value] * 8, [value] * 12

    def found() -> tuple[object, ...]:
        interval, floor = stats.bootstrap_interval(a, statistic), stats.noise_floor(a, len(b), statistic)
        return interval, floor, stats.permutation_p(a, b, statistic), stats.rank_p(a, b)

    at_once = found()
    monkeypatch.setattr(stats, "_alike", lambda _values: False)
    assert found() == at_once and at_once[2:] == (1.0, 1.0)


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]) == []


@given(SAMPLE, SAMPLE)
def test_bounds(a: list[int], b: list[int]) -> None:
    assert -1 <= stats.effect_size(a, b) <= 1
    assert stats.effect_size(a, b) == -stats.effect_size(b, a)
    low, high = stats.quantile(a, 0.05), stats.quantile(a, 0.95)
    assert min(a) <= low <= high <= max(a)
