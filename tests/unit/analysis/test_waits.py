# SPDX-License-Identifier: Apache-2.0
"""Waits are assigned to the phase in which they delayed the side on the critical path."""

from __future__ import annotations

import pytest

from ebpf_mig.breakdown import Side, Stolen, Wait
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
        ([(3000, 0), (4050, 150), (6000, 245)], "(CPU quota)"),  # a throttling had ended before
        ([(3000, 0), (4050, 150), (6000, 235)], "(runnable, not running)"),
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


@pytest.mark.parametrize(
    ("took_us", "held", "cpus", "read_us", "word"),
    [
        (10_000, 39_000, 2, 5000, "(CPU quota)"),
        (10_000, 39_000, 2, 5001, "(runnable, not running)"),  # the throttling may have begun after the wait
        (10_000, 39_000, 1, 5000, "(runnable, not running)"),
        (10_000, 41_000, 2, 5000, "(runnable, not running)"),
        (9_900, 39_000, 2, 3000, "(runnable, not running)"),  # another CPU may have had a rest of the quota
    ],
)
def test_the_kernel_adds_up_what_a_quota_withheld_on_all_cpus(
    took_us: int, held: int, cpus: int, read_us: int, word: str
) -> None:
    script = scripts.qemu_7_2()
    source = script.vms[0]
    end = 4000 + took_us
    source.events.append(ev.OffCpu(at(4000), at(end), source.pid, source.pid + 1, (), True, 0, 77, 78))
    source.events += [ev.CpuQuota(at(us), source.pid, ns * 1000) for us, ns in ((3000, 0), (end + read_us, held))]
    source.events += [ev.CpuSteal(at(3000), source.pid, cpu, 0) for cpu in (-1, *range(cpus))]
    assert next(wait[3] for wait in waits(script)) == [word]


@pytest.mark.parametrize(
    ("stolen", "word"),
    [
        ([(3000, 5), (6000, 5)], "(preempted)"),
        ([(3000, 5), (6000, 95)], "(CPU stolen)"),
        ([(3000, 5), (6000, 94)], "(runnable, not running)"),
        ([(3000, 5), (6000, 905)], "(runnable, not running)"),
        ([(4050, 5), (6000, 5)], "(preempted)"),  # not read before the wait: as in recordings of earlier versions
    ],
)
@pytest.mark.parametrize("cpu", [0, 1, -1])
def test_a_stolen_cpu_is_no_contention(stolen: list[tuple[int, int]], word: str, cpu: int) -> None:
    """Only the time of the CPU that the thread lost counts. If that is not known, any stolen time leaves a doubt."""
    script = scripts.qemu_7_2()
    source = script.vms[0]
    source.events.append(ev.OffCpu(at(4000), at(4100), source.pid, source.pid + 1, (), True, cpu, 77, 78))
    source.events += [ev.CpuQuota(at(us), source.pid, 0) for us in (3000, 6000)]
    for us, ns in stolen:
        source.events += [ev.CpuSteal(at(us), source.pid, which, ns * 1000) for which in (-1, 1)]
    expected = {0: "(preempted)", 1: word, -1: word.replace("CPU stolen", "runnable, not running")}
    assert waits(script) == [("quiesce", "1001", 100, [expected[cpu]])]


@pytest.mark.parametrize(
    ("following", "previous", "throttled", "word"),
    [
        (77, 0, False, "(preempted)"),
        (0, 78, False, "(runnable, not running)"),  # nobody got the CPU
        (77, 78, True, "(real-time throttling)"),
    ],
)
def test_who_got_the_cpu(following: int, previous: int, throttled: bool, word: str) -> None:
    script = scripts.qemu_7_2()
    source = script.vms[0]
    ids = source.pid, source.pid + 1
    source.events.append(ev.OffCpu(at(4000), at(4100), *ids, (), True, 0, following, previous, throttled))
    source.events += [ev.CpuQuota(at(us), source.pid, 0) for us in (3000, 6000)]
    assert waits(script) == [("quiesce", "1001", 100, [word])]


@pytest.mark.parametrize(
    ("delay", "previous", "found"),
    [
        (600, 78, [(900, "do_poll"), (600, "(waits for a CPU)")]),
        (600, 0, [(900, "do_poll"), (600, "(runnable, not running)")]),  # its CPU had been idle
        (1450, 78, [(1450, "(waits for a CPU)")]),  # the sleep itself was too short
        (50, 78, [(1450, "do_poll")]),
        (9999, 78, [(1500, "(waits for a CPU)")]),
    ],
)
def test_a_thread_that_was_woken_and_got_no_cpu_does_not_sleep(
    delay: int, previous: int, found: list[tuple[float, str]]
) -> None:
    script = scripts.qemu_7_2()
    source = script.vms[0]
    source.events += [
        ev.OffCpu(at(10_000), at(11_500), source.pid, source.pid + 1, ("do_poll",), False, 0, 77, previous),
        ev.RunDelay(at(11_500), source.pid, source.pid + 1, delay * US),
        ev.RunDelay(at(11_500), source.pid, source.pid + 9, 3 * delay * US),
        *(ev.CpuQuota(at(us), source.pid, 0) for us in (9000, 20_000)),
    ]
    assert [(w[2], w[3][0]) for w in waits(script)] == found


def test_stolen_time_around_the_window() -> None:
    script = scripts.qemu_7_2()
    readings = ((-100, {0: 10}), (-50, {0: 10, 1: 20}), (90_000, {0: 10, 1: 60}), (95_000, {0: 90, 1: 60}))
    for vm in script.vms:
        for us, cpus in readings:
            vm.events += [ev.CpuSteal(at(us), vm.pid, cpu, ms * 1000 * US) for cpu, ms in {-1: 1, **cpus}.items()]
    assert script.result().breakdown.stolen == [
        Stolen(side=Side.BOTH, cpu=1, stolen_ns=40_000 * US, between_ns=90_050 * US)
    ]
    assert scripts.qemu_7_2().result().breakdown.stolen is None


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
