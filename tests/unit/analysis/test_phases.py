# SPDX-License-Identifier: Apache-2.0
"""The attribution rules one by one, on bare intervals."""

from __future__ import annotations

import pytest

from ebpf_mig import breakdown as b
from ebpf_mig.analysis import phases
from ebpf_mig.analysis.phases import Partition
from ebpf_mig.analysis.source_work import CLEAR, FETCH, MEMORY, REPLY, SAVE, STATE, Interval, Work

MS = 1_000_000


def durations(partition: Partition) -> dict[str, int]:
    return {p.phase: p.duration_ns for p in partition.phases() if p.duration_ns}


def booked(
    intervals: list[Interval],
    until: int = 100 * MS,
    fetched: int | None = 0,
    quiet: int = 0,
    preempted: tuple[tuple[int, int], ...] = (),
) -> dict[str, int]:
    """Phases of [0, until) with the source doing `intervals`."""
    partition = Partition(0, until)
    work = Work(intervals, None, memory=[], quiet_until=quiet, fetched=fetched, coalesced=0, preempted=preempted)
    phases.source(partition, 0, until, work)
    return durations(partition)


class TestPartition:
    def test_books_forward_only(self) -> None:
        partition = Partition(100, 200)
        partition.until(150, "pause")
        partition.until(120, "quiesce")  # before the last boundary: no time is left for it
        partition.until(160, "pause")
        partition.until(999, "resume")
        assert partition.spans == [(100, 160, "pause"), (160, 200, "resume")]

    def test_unassigned_time_is_unattributed(self) -> None:
        partition = Partition(0, 10)
        partition.until(4, "pause")
        assert durations(partition) == {"pause": 4, "unattributed": 6}

    def test_every_phase_is_there_in_order_with_spans_from_the_begin(self) -> None:
        partition = Partition(1000, 1010)
        partition.until(1003, "pause")
        partition.until(1005, "resume")
        partition.until(1010, "pause")
        found = partition.phases()
        assert [(p.phase, p.side) for p in found] == list(b.sides_of(False))
        assert found[0].spans == [(0, 3), (5, 10)]
        assert sum(p.duration_ns for p in found) == 10

    def test_an_empty_window(self) -> None:
        assert sum(p.duration_ns for p in Partition(5, 5).phases()) == 0


@pytest.mark.parametrize(
    ("first", "second", "phase"),
    [
        (FETCH, FETCH, "fetch.user"),
        (FETCH, CLEAR, "fetch.user"),
        (FETCH, MEMORY, "fetch.user"),
        (FETCH, STATE, "state.save"),
        (MEMORY, MEMORY, "memory.send"),
        (MEMORY, CLEAR, "memory.send"),
        (MEMORY, FETCH, "memory.send"),
        (MEMORY, STATE, "state.save"),
        (SAVE, SAVE, "state.save"),
        (SAVE, FETCH, "state.save"),
        (SAVE, STATE, "state.save"),
        (STATE, STATE, "state.send"),
        (STATE, SAVE, "state.save"),
        (STATE, FETCH, "unattributed"),
        (STATE, MEMORY, "unattributed"),
    ],
)
def test_the_phase_of_the_time_between_two_kinds_of_work(first: int, second: int, phase: str) -> None:
    own = phases._INSIDE[first], phases._INSIDE[second]
    found = booked([(0, 10, first), (60 * MS, 100 * MS, second)])
    expected = {own[0]: 10}
    expected[own[1]] = expected.get(own[1], 0) + 40 * MS
    expected[phase] = expected.get(phase, 0) + 60 * MS - 10
    assert found == expected


@pytest.mark.parametrize(
    ("first", "second", "phase"),
    [(FETCH, SAVE, "fetch.user"), (MEMORY, SAVE, "memory.send"), (SAVE, MEMORY, "state.save")],
)
def test_short_waits_belong_to_the_earlier_work_and_long_ones_are_unattributed(
    first: int, second: int, phase: str
) -> None:
    own = phases._INSIDE[first], phases._INSIDE[second]
    short = booked([(0, 10, first), (10 + MS, 2 * MS, second)], until=2 * MS)
    assert "unattributed" not in short
    assert short[phase] == MS + (10 if own[0] == phase else 0) + (MS - 10 if own[1] == phase else 0)
    long = booked([(0, 10, first), (11 + MS, 2 * MS, second)], until=2 * MS)
    assert long["unattributed"] == MS + 1


def test_a_lost_cpu_does_not_make_a_wait_long() -> None:
    """5 ms lie between sending and saving, 4 of them lost to another thread."""
    work = [(0, 10, MEMORY), (5 * MS, 6 * MS, SAVE)]
    assert booked(work, 6 * MS)["unattributed"] == 5 * MS - 10
    assert booked(work, 6 * MS, preempted=((MS // 2, 9 * MS // 2),)) == {"memory.send": 5 * MS, "state.save": MS}
    assert booked(work, 6 * MS, preempted=((4 * MS, 8 * MS),))["unattributed"] == 5 * MS - 10


def test_until_the_first_work_the_vm_is_being_quieted() -> None:
    assert booked([(7, 10, FETCH), (10, 20, MEMORY)], until=20) == {"quiesce": 7, "fetch.kernel": 3, "memory.send": 10}


def test_without_any_work_only_the_stops_own_ioctls_are_known() -> None:
    assert booked([], until=20, quiet=5) == {"quiesce": 5, "unattributed": 15}


def test_the_last_passes_tail_does_not_end_the_quieting() -> None:
    """A multifd thread is still in its send when the vCPUs have stopped."""
    found = booked([(0, 4, MEMORY), (10, 12, SAVE), (20, 22, FETCH), (25, 30, MEMORY)], until=30, fetched=20)
    assert found == {"memory.send": 4 + 5, "quiesce": 6, "state.save": 2 + 8, "fetch.kernel": 2, "fetch.user": 3}


def test_overlaps_go_to_the_kernels_fetch_then_to_sends() -> None:
    found = booked([(0, 10, FETCH), (5, 20, MEMORY), (15, 30, SAVE), (18, 19, MEMORY)], until=30)
    assert found == {"fetch.kernel": 10, "memory.send": 10, "state.save": 10}


def test_a_clear_between_sends_is_kernel_time_and_sending_continues_after_it() -> None:
    found = booked([(0, 2, FETCH), (5, 10, MEMORY), (12, 15, CLEAR), (18, 20, MEMORY)], until=20)
    assert found == {"fetch.kernel": 2 + 3, "fetch.user": 3, "memory.send": 5 + 2 + 3 + 2}


def test_the_answer_to_pages_is_part_of_sending_them_the_answer_to_state_is_handover() -> None:
    found = booked([(0, 5, MEMORY), (6, 10, REPLY), (11, 12, SAVE), (14, 16, STATE), (17, 30, REPLY)], until=30)
    assert found == {"memory.send": 11, "state.save": 3, "state.send": 2, "handover": 14}


def test_rings_are_read_without_an_ioctl() -> None:
    found = booked([(0, 2, SAVE), (10, 20, MEMORY)], until=20, fetched=None)
    assert found == {"state.save": 2, "fetch.user": 8, "memory.send": 10}
