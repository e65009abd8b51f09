# SPDX-License-Identifier: Apache-2.0
"""What tracing took in the window, on timelines by hand. A real migration: tests/integration/test_own_cost.py."""

from __future__ import annotations

from dataclasses import replace as with_fields
from pathlib import Path

import pytest
from msgspec.structs import replace

from ebpf_mig.analysis import own_time
from ebpf_mig.analysis.material import split
from ebpf_mig.analysis.own_time import Curve, Piece
from ebpf_mig.breakdown import Phase, PhaseName, Side, Span, TracingCost
from ebpf_mig.collector import analyse
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.file import Recording, read_recording

DATA = Path(__file__).parents[2] / "data"
MS, US = 1_000_000, 1_000
WINDOW = (100 * MS, 102 * MS)
RUN_NS, CALL_NS = 50, 160
"""A run takes 50 ns beside what it measures; a system call takes 60 ns longer beside its two runs."""


def phase(name: PhaseName, *spans: Span) -> Phase:
    return Phase(phase=name, side=Side.SOURCE, duration_ns=sum(e - b for b, e in spans), spans=list(spans))


PHASES = [phase(PhaseName.QUIESCE, (0, 1 * MS)), phase(PhaseName.HANDOVER, (1 * MS, 2 * MS))]
RATES = ev.OwnRates(1 * MS, RUN_NS, CALL_NS)
BUSY = [
    ev.OwnRuns(50 * MS, 99 * MS, 100 * MS, 0, 7 * MS, 9000, 3000, 100, 50),
    ev.OwnRuns(100 * MS, 100 * MS + 90 * US, 101 * MS, 0, 7 * MS + 30 * US, 9040, 3020, 100, 50),
    ev.OwnRuns(101 * MS, 101 * MS + 90 * US, 150 * MS, 0, 7 * MS + 50 * US, 9060, 3030, 100, 50),
]
"""One CPU: in the window 60 runs and 30 calls of the traced processes in 50 us, most of it in the first phase."""


def recording(*events: ev.AnyEvent) -> Recording:
    return Recording(header=ev.Header(begin_ns=1, cpus=2), events=list(events), truncated=False, unknown=0)


def cost(*events: ev.AnyEvent, phases: list[Phase] = PHASES) -> TracingCost:
    found = own_time.observe(split(recording(*events)), WINDOW, phases)
    assert found is not None
    return found


def test_each_phase_has_what_ran_in_it() -> None:
    found = cost(RATES, *BUSY)
    assert (found.programs_ns, found.calls_ns) == (50 * US + 60 * RUN_NS, 30 * 60)
    assert found.phases["quiesce"].programs_ns == 30 * US + 40 * RUN_NS
    assert found.phases["handover"].programs_ns == 20 * US + 20 * RUN_NS
    assert found.doubt_ns == 0
    assert found.process_ns is None


def test_order_of_the_events_and_a_lost_record_change_no_sum() -> None:
    first, lost, last = BUSY
    assert cost(last, RATES, first, lost) == cost(RATES, *BUSY)
    found = cost(RATES, first, replace(last, since_ns=100 * MS))
    assert (found.programs_ns, found.calls_ns) == (50 * US + 60 * RUN_NS, 30 * 60)


def test_runs_for_other_processes_are_even_in_time_and_on_any_cpu() -> None:
    other = ev.OwnRuns(140 * MS, 140 * MS, 140 * MS, 1, 0, 0, 0, 1390, 695)
    found = cost(RATES, *BUSY, other)
    assert found.programs_ns == 50 * US + 80 * RUN_NS
    assert found.calls_ns == 40 * 60
    assert found.doubt_ns > 0


def test_what_may_lie_beside_the_window_is_said() -> None:
    """A record that began 30 us before the window's end and has 20 us in 60: 0 to 20 us of it were inside."""
    late = ev.OwnRuns(102 * MS - 30 * US, 102 * MS + 30 * US, 150 * MS, 0, 7 * MS + 20 * US, 9000, 3000, 100, 50)
    found = cost(RATES, BUSY[0], late)
    assert (found.programs_ns, found.doubt_ns) == (10 * US, 10 * US)


def test_the_kernels_own_sum_corrects_what_a_run_takes() -> None:
    total = BUSY[-1].run_ns + 80 * (BUSY[-1].runs + BUSY[-1].other_runs)
    assert cost(RATES, *BUSY, ev.OwnCost(151 * MS, total, 1)).programs_ns == 50 * US + 60 * 80
    ending = ev.Ending(151 * MS, "migrated", observer_ns={"a": total - 1000, "b": 1000})
    assert cost(RATES, *BUSY, ending).programs_ns == 50 * US + 60 * 80
    assert cost(RATES, *BUSY, ev.OwnCost(10 * MS, total, 1)).programs_ns == 50 * US + 60 * RUN_NS, "read too early"
    wild = ev.OwnCost(151 * MS, total * 1000, 1)
    assert cost(RATES, *BUSY, wild).programs_ns == 50 * US + 60 * own_time.MOST_TIMES * RUN_NS


def test_the_kernels_sum_of_the_first_tenth_of_a_second_corrects_all_runs() -> None:
    """The kernel no longer counted afterwards. Its sum belongs to our sums of the same instant, on every CPU."""
    early = [ev.OwnRuns(2 * MS, 9 * MS, 10 * MS, cpu, 100 * US, 500, 200, 100, 50) for cpu in (0, 1)]
    counted = ev.OwnCost(10 * MS, 2 * (100 * US + 600 * 80), 1200)
    events = [RATES, *early, counted, *BUSY]
    assert cost(*events).programs_ns == 50 * US + 60 * 80
    assert own_time.in_all(split(recording(*events))) == 7 * MS + 50 * US + 9160 * 80 + 100 * US + 600 * 80
    assert own_time.in_all(split(recording(*BUSY))) is None


def test_our_process_counts_while_it_has_a_cpu() -> None:
    turns = [ev.OwnTurn(99 * MS, 100 * MS + 10 * US, 0), ev.OwnTurn(101 * MS, 101 * MS + 5 * US, 1)]
    found = cost(RATES, *BUSY, *turns)
    assert found.process_ns == 15 * US
    assert [found.phases[name].process_ns for name in ("quiesce", "handover")] == [10 * US, 5 * US]
    twice = cost(RATES, *BUSY, *turns, ev.OwnTurn(101 * MS, 101 * MS + 5 * US, 1))
    assert twice == found, "a CPU has one thread at a time"


def test_hosts_are_added_up_and_one_alone_is_not_enough() -> None:
    there = [replace(event, remote=True) for event in (RATES, *BUSY)]
    remote = ev.Remote(host="b", pid=9, own_pid=9, boot_id="", kernel="", machine="", offset_ns=0, bound_ns=0, open="",
                       at_ns=1, drift_ppb=0, pairs=[0, 0], cpus=1)  # fmt: skip
    material = split(recording(RATES, *BUSY, *there))
    both = with_fields(material, header=replace(material.header, remote=remote))
    found = own_time.observe(both, WINDOW, PHASES)
    assert found is not None and found.programs_ns == 2 * (50 * US + 60 * RUN_NS)
    alone = with_fields(both, own_rates=[RATES])
    assert own_time.observe(alone, WINDOW, PHASES) is None


@pytest.mark.parametrize("events", [(), (RATES,), BUSY], ids=["nothing", "no runs", "no rates"])
def test_without_them_nothing_is_said(events: tuple[ev.AnyEvent, ...]) -> None:
    assert own_time.observe(split(recording(*events)), WINDOW, PHASES) is None
    assert own_time.observe(split(recording(RATES, *BUSY)), None, PHASES) is None


def test_old_recordings_have_none() -> None:
    found = analyse(read_recording(DATA / "qemu-7.2-tcp.rec")).breakdown.completeness
    assert found.tracing is None and found.observer_ns is not None


def test_sums_that_shrink_or_times_that_run_back_do_no_harm() -> None:
    first, second, last = BUSY
    found = cost(RATES, last, second, first, replace(first, at_ns=160 * MS, since_ns=1, until_ns=0))
    assert 0 <= found.programs_ns <= BUSY[-1].run_ns + 9060 * RUN_NS and found.calls_ns >= 0
    assert Curve([Piece(5, 5, 3)]).within(0, 10) == 3
