# SPDX-License-Identifier: Apache-2.0
"""The wall clock at an instant, though NTP changes its rate, or somebody sets it."""

from __future__ import annotations

import time

import pytest

from ebpf_mig.exporter.wall_clock import WallClock, edge_of
from ebpf_mig.recording.events import AnyEvent, ClockPair, Kick, Transfer, VcpuEnter, VcpuExit

S, MS = 1_000_000_000, 1_000_000
EPOCH = 1_700_000_000 * S
KICKS = [Kick(50, 10, 11, 12, 10), Kick(60, 10, 11, 13, 10)]
LEFT = VcpuExit(55, 10, 12, 8, 5, -4, 0)
FIRST, AGAIN = VcpuEnter(80, 20, 21, 8, 0, 0, 1), VcpuEnter(40, 10, 12, 8, 30, -4, 9)


def reading(at_ns: int, fast: float = 0.0) -> ClockPair:
    return ClockPair(at_ns, EPOCH + at_ns + round(at_ns * fast), 100)


@pytest.mark.parametrize("fast", [0.0, 0.0005, -0.0005, 0.005])
def test_a_wall_clock_of_another_rate_is_right_between_readings(fast: float) -> None:
    wall = WallClock(reading(at * 20 * MS, fast) for at in range(100))
    for instant in (7 * MS, 999 * MS, 20 * MS):
        pair = wall.at(instant)
        assert pair.monotonic_ns == instant
        assert pair.realtime_ns == pytest.approx(reading(instant, fast).realtime_ns, abs=2)


def test_beside_the_readings_the_nearest_one_counts() -> None:
    wall = WallClock([reading(S), reading(2 * S)])
    assert wall.at(0) == reading(S)
    assert wall.at(3 * S) == reading(2 * S)


def test_a_clock_that_was_set_is_not_averaged() -> None:
    later = ClockPair(2 * S, EPOCH + 3600 * S, 100)
    wall = WallClock([reading(S), later])
    assert wall.at(S + 1) == reading(S)
    assert wall.at(2 * S - 1) == later


def test_the_machines_own_clocks() -> None:
    wall = WallClock()
    for _ in range(10):
        wall.read()
        time.sleep(0.01)
    before, monotonic, after = time.time_ns(), time.monotonic_ns(), time.time_ns()
    wall.read()
    pair = wall.at(monotonic)
    assert before - pair.doubt_ns - 50_000 <= pair.realtime_ns <= after + pair.doubt_ns + 50_000


@pytest.mark.parametrize(
    ("events", "edge"),
    [
        ([], 100),
        (KICKS, 60),
        ([KICKS[0], LEFT, KICKS[1]], 55),
        ([AGAIN, *KICKS], 60),
        ([*KICKS, FIRST], 80),
        ([FIRST], 80),
    ],
    ids=["nothing", "kicks", "a source that ends", "a source that went on", "both", "a destination"],
)
def test_the_edge_of_a_blackout(events: list[AnyEvent], edge: int) -> None:
    sends: list[AnyEvent] = [Transfer(90, 95, 10, 11, 3, 0, 70, 1, 10, 1, 1, 0, 0)]
    assert edge_of(sends + events, 100) == edge
