# SPDX-License-Identifier: Apache-2.0
"""When samples are taken: only of threads with long fetches, fast only in a stop, never after the fetch."""

from __future__ import annotations

import pytest

from ebpf_mig.linux import kvm
from ebpf_mig.probes import stack_sampler
from ebpf_mig.probes.stack_sampler import FASTEST_NS, GIVE_UP_NS, SLOW_NS, Sampler
from ebpf_mig.recording.events import AnyEvent, Ioctl, Kick, Samples, Transfer, VcpuEnter

MS = 1_000_000
PID, TID = 10, 11


class Clock:
    """Stands where perf_event_open needs a real thread; remembers its paces."""

    def __init__(self, tid: int) -> None:
        self.tid, self.paces, self.closed = tid, list[int](), False

    def pace(self, period_ns: int) -> None:
        self.paces.append(period_ns)

    def close(self) -> None:
        self.closed = True


class Rig:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.periods, self.clocks = 0, list[int](), list[Clock]()
        monkeypatch.setattr(stack_sampler, "ThreadClock", self.open)
        monkeypatch.setattr(stack_sampler.clock, "monotonic_ns", lambda: self.now)
        self.sampler = Sampler(5, self.periods.append)

    def open(self, tid: int, program_fd: int, _period_ns: int) -> Clock:
        assert program_fd == 5
        if tid == 666:
            raise OSError(13, "Permission denied")
        self.clocks.append(Clock(tid))
        return self.clocks[-1]

    def see(self, *events: AnyEvent) -> int:
        self.now = max([self.now, *(getattr(e, "end_ns", 0) or getattr(e, "at_ns", 0) for e in events)])
        self.sampler.follow(events)
        return self.sampler.period_ns


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def get(begin_ms: float, took_ms: float, tid: int = TID) -> Ioctl:
    begin = int(begin_ms * MS)
    return Ioctl(begin, begin + int(took_ms * MS), PID, tid, 9, kvm.GET_DIRTY_LOG, 0)


def kick(at_ms: float) -> Kick:
    return Kick(int(at_ms * MS), PID, TID, 12, 10)


def send(at_ms: float) -> Transfer:
    return Transfer(int(at_ms * MS), int(at_ms * MS) + 1000, PID, TID, 3, 0, 70, 1, 4096, 1000, 1000, 0, 0)


def test_short_fetches_are_never_sampled(rig: Rig) -> None:
    assert rig.see(get(1, 0.9), get(100, 0.4), kick(200)) == 0
    assert rig.clocks == []


def test_a_fetch_of_several_slots_counts_as_one(rig: Rig) -> None:
    assert rig.see(get(1, 0.6), get(1.7, 0.6)) == SLOW_NS
    assert [clock.tid for clock in rig.clocks] == [TID]


def test_slow_while_the_guest_runs_fast_in_the_stop_and_off_after_it(rig: Rig) -> None:
    assert rig.see(get(1, 5)) == SLOW_NS
    assert rig.see(send(50)) == SLOW_NS
    assert rig.see(kick(100)) == FASTEST_NS
    assert rig.see(send(100.1)) == FASTEST_NS, "sent before the final fetch: announces it"
    assert rig.see(get(101, 5)) == FASTEST_NS
    assert rig.see(send(107)) == 0
    assert rig.clocks[0].paces == [0, SLOW_NS, FASTEST_NS, 0]
    assert rig.periods == [SLOW_NS, FASTEST_NS, FASTEST_NS]


def test_a_long_fetch_needs_no_fast_samples(rig: Rig) -> None:
    """200 samples in 60 ms are one every 300 us."""
    rig.see(get(1, 60))
    assert rig.see(kick(200)) == 300_000


def test_where_a_sample_is_dear_there_are_fewer(rig: Rig) -> None:
    """A sample costs 12 us: one every 1.2 ms is an overhead of 1 %."""
    dear = Sampler(5, rig.periods.append, 12_000)
    dear.follow([get(1, 5)])
    assert dear.period_ns == 1_200_000
    dear.follow([kick(100)])
    assert dear.period_ns == 1_200_000
    cheap = Sampler(5, rig.periods.append, 2_000)
    cheap.follow([get(1, 5), kick(100)])
    assert cheap.period_ns == 200_000


def test_a_kick_without_a_stop_is_forgotten(rig: Rig) -> None:
    rig.see(get(1, 5), kick(50))
    assert rig.see(VcpuEnter(51 * MS, PID, 12, 8, 50 * MS, -4, 9)) == SLOW_NS
    rig.see(kick(60))
    rig.now += GIVE_UP_NS
    assert rig.see() == SLOW_NS


def test_vcpu_threads_are_left_alone(rig: Rig) -> None:
    rig.see(VcpuEnter(1, PID, 12, 8, 0, 0, 1))
    assert rig.see(get(1, 5, tid=12)) == 0


def test_what_cannot_be_sampled_is_said_once(rig: Rig) -> None:
    assert rig.see(get(1, 5, tid=666)) == 0
    assert rig.sampler.refusal == "Permission denied"


def test_equal_stacks_are_one_event_and_half_sampled_ioctls_have_none(rig: Rig) -> None:
    rig.see(get(1, 5))
    late, early = get(10, 5), get(5, 1)
    for _ in range(3):
        rig.sampler.take(Samples(late.begin_ns, PID, TID, SLOW_NS, 1, ("a", "b")))
    rig.sampler.take(Samples(late.begin_ns, PID, TID, SLOW_NS, 1, ("c",)))
    rig.sampler.take(Samples(early.begin_ns, PID, TID, SLOW_NS, 1, ("a",)))
    assert rig.sampler.of(early) == [], "sampling began at 6 ms, when the ioctl was going on"
    found = rig.sampler.of(late)
    assert [(s.count, s.stack) for s in found] == [(3, ("a", "b")), (1, ("c",))]
    assert rig.sampler.of(late) == []


def test_a_process_that_is_traced_no_more_costs_nothing(rig: Rig) -> None:
    rig.see(get(1, 5))
    rig.sampler.forget(PID)
    assert rig.clocks[0].closed and rig.sampler.period_ns == 0
    rig.sampler.close()
