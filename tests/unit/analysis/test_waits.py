# SPDX-License-Identifier: Apache-2.0
"""Waits are assigned to the phase in which they delayed the side on the critical path."""

from __future__ import annotations

import pytest

from ebpf_mig.breakdown import Wait
from ebpf_mig.recording import events as ev
from tests.unit import scripts
from tests.unit.script import US, Script, Vm, at


def sleep(vm: Vm, us: float, until: float, *stack: str, tid: int = 1, preempted: bool = False) -> None:
    vm.events.append(ev.OffCpu(at(us), at(until), vm.pid, vm.pid + tid, stack, preempted))


def waits(script: Script) -> list[tuple[str, str, float, list[str]]]:
    found = script.result().breakdown.waits
    assert found is not None
    return [(w.phase, w.thread, w.duration_ns / US, w.stack) for w in found]


def test_each_side_waits_in_its_own_phases() -> None:
    script = scripts.qemu_10_0()
    source, destination = script.vms
    sleep(source, 2000, 2500, "sk_stream_wait_memory", "tcp_sendmsg")
    sleep(destination, 5500, 45_990, "ep_poll")
    sleep(destination, 1000, 4000, "ep_poll")  # the source is on the critical path: this wait delayed nothing
    sleep(source, 5600, 46_000, "futex_wait")  # the destination is on the critical path
    assert waits(script) == [
        ("handover", "2001", 40_490, ["ep_poll"]),
        ("memory.send", "1001", 500, ["sk_stream_wait_memory", "tcp_sendmsg"]),
    ]


def test_a_wait_is_cut_to_the_phase_that_it_overlaps_most() -> None:
    script = scripts.qemu_11_1()
    sleep(script.vms[0], 100, 3200, "wait_for_completion")
    assert waits(script) == [("fetch.user", "1001", 3010, ["wait_for_completion"])]


def test_idle_threads_delay_nothing() -> None:
    script = scripts.qemu_7_2()
    source, destination = script.vms
    sleep(source, 3000, 45_000, "hrtimer_nanosleep", tid=9)
    sleep(source, 7000, 45_000, "futex_wait", tid=100)
    sleep(destination, 1000, 44_700, "futex_wait", tid=100)
    assert waits(script) == [("resume", "CPU 0/KVM 2100", 100, ["futex_wait"])]


def test_short_waits_are_left_out_and_losing_the_cpu_is_named() -> None:
    script = scripts.qemu_7_2()
    sleep(script.vms[0], 3000, 3099, "f")
    sleep(script.vms[0], 4000, 4100, preempted=True)
    assert waits(script) == [("quiesce", "1001", 100, ["(runnable, not running)"])]


@pytest.mark.parametrize(
    ("readings", "word"),
    [
        ([(3000, 5), (6000, 5)], "(preempted)"),
        ([(3000, 5), (6000, 95)], "(CPU quota)"),
        ([(3000, 5), (6000, 94)], "(runnable, not running)"),
        ([(3000, 0), (3500, 900), (4050, 900), (6000, 1100)], "(CPU quota)"),
        ([(3000, 0), (4050, 0), (6000, 900)], "(runnable, not running)"),
        ([(4050, 5), (6000, 5)], "(runnable, not running)"),
        ([(3000, 5), (4050, 5)], "(runnable, not running)"),
    ],
)
def test_why_a_thread_that_could_run_did_not(readings: list[tuple[int, int]], word: str) -> None:
    """The quota's time counts if it was read before and after the wait. The wait takes 100 us here."""
    script = scripts.qemu_7_2()
    source = script.vms[0]
    sleep(source, 4000, 4100, preempted=True)
    source.events += [ev.CpuQuota(at(us), source.pid, held * 1000) for us, held in readings]
    assert waits(script) == [("quiesce", "1001", 100, [word])]


def test_multifd_senders_count_while_memory_is_sent() -> None:
    script = scripts.multifd()
    sleep(script.vms[0], 1000, 1900, "sk_stream_wait_memory", tid=5)
    sleep(script.vms[0], 3600, 4200, "futex_wait", tid=5)
    assert waits(script) == [("memory.send", "1005", 900, ["sk_stream_wait_memory"])]


def test_only_the_longest_are_kept() -> None:
    script = scripts.qemu_7_2()
    for n in range(20):
        sleep(script.vms[0], 8000 + n * 1000, 8100 + n * 1001, f"f{n}")
    found = script.result().breakdown.waits
    assert found is not None and len(found) == 10
    assert found[0] == Wait(phase="memory.send", thread="1001", duration_ns=119 * US, stack=["f19"])


def test_without_a_window_there_are_no_waits() -> None:
    assert Script().result().breakdown.waits is None
