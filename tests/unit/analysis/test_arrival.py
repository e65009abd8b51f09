# SPDX-License-Identifier: Apache-2.0
"""A destination alone: which part of its loading belongs to the source, by the arrival of the last bytes."""

from __future__ import annotations

import pytest

from ebpf_mig.recording.events import Segment
from tests.unit.script import Result, Script, Vm, at

SLEEP = "schedule_hrtimeout_range_clock"


def segment(vm: Vm, us: float, payload: int = 20_000, socket: int = 80) -> None:
    """Data arrived on a socket of the VM."""
    vm.events.append(Segment(at(us), vm.pid, socket, payload=payload, acked=0, in_flight=0, unsent=0, window=65536))


def migration(sent: float, *, last: float, alone: bool) -> tuple[Script, Vm]:
    """Restore work begins at 204,000 us. The source's last send of state ends at `sent`, the destination's last receive
    at `last`; the load ends 500 us later and the guest starts 400 us after that."""
    script = Script()
    source, destination = script.vm(1000, "source"), script.vm(2000, "destination")
    script.join(70, 80)
    source.logging(100_000)
    source.gets(101_000)
    source.send(102_000, 103_000, 1 << 20)
    source.kick(200_000)
    source.interrupted(200_050)
    source.gets(201_000)
    source.send(202_000, 203_000, 65536)
    source.ioctls("GET_REGS GET_SREGS", 203_100, 203_200)
    source.send(203_300, 203_400, 32768)
    source.send(sent - 20, sent, 20_000)
    destination.receive(102_000, 203_500, (1 << 20) + 65536 + 32768, socket=80)
    destination.ioctls("SET_USER_MEMORY_REGION SET_IRQCHIP", 204_000, 204_200)
    destination.receive(last - 20, last, 20_000, socket=80)
    destination.ioctls("SET_SREGS SET_REGS", last + 100, last + 500)
    destination.ioctl("SET_CLOCK", last + 600)
    destination.entered(last + 900)
    if alone:
        script.vms.remove(source)
    return script, destination


def figures(result: Result) -> tuple[float, float]:
    return round(result.phases["state.load"]), round(result.phases["resume"])


@pytest.mark.parametrize("segments", [True, False])
def test_time_before_the_last_bytes_belongs_to_the_source(segments: bool) -> None:
    """It slept until they came, 0.8 ms after its first restore work."""
    both, alone = (migration(205_000, last=205_060, alone=one) for one in (False, True))
    for _, destination in (both, alone):
        destination.off(204_300, 205_010, SLEEP)
        if segments:
            segment(destination, 203_400)
            segment(destination, 205_000)
    assert figures(both[0].result()) == (560, 400)
    assert figures(alone[0].result()) == ((560, 400) if segments else (550, 400))
    assert alone[0].result().window == (960 if segments else 950)


def test_bytes_that_came_before_the_loading_change_nothing() -> None:
    """It worked all the time, and the bytes were there."""
    both, alone = (migration(203_500, last=206_000, alone=one) for one in (False, True))
    for _, destination in (both, alone):
        segment(destination, 203_500)
        destination.off(204_300, 205_900, "futex_do_wait")  # for another thread, not for bytes
        destination.ioctl("SET_IRQCHIP", 205_400)
    assert figures(alone[0].result()) == figures(both[0].result()) == (2500, 400)


def test_data_that_its_own_receive_released_had_been_sent() -> None:
    """TCP held them back until earlier data was acknowledged or there was room, which the receive brought."""
    both, alone = (migration(203_500, last=204_700, alone=one) for one in (False, True))
    for _, destination in (both, alone):
        segment(destination, 204_690)
    assert figures(alone[0].result()) == figures(both[0].result()) == (1200, 400)


@pytest.mark.parametrize("sleeps", [1, 20])
def test_a_delayed_acknowledgement_is_no_work_of_the_source(sleeps: int) -> None:
    """The state was sent, and Nagle's algorithm held it back for 41 ms. The wait is `handover`, also if the thread
    answered a monitor each 2 ms."""
    both, alone = (migration(204_100, last=246_000, alone=one) for one in (False, True))
    for _, destination in (both, alone):
        segment(destination, 204_095, payload=7232)
        segment(destination, 245_900)
        for us in range(204_300, 245_950, 41_650 // sleeps):
            destination.off(us, min(us + 41_650 // sleeps - 50 * (sleeps > 1), 245_950), SLEEP)
    assert abs(both[0].result().phases["state.load"] - alone[0].result().phases["state.load"]) <= 5
    assert round(alone[0].result().phases["handover"]) == 41_800
    assert alone[0].result().phases["resume"] == 400


def test_pages_for_other_threads_do_not_count() -> None:
    """In postcopy, memory goes on arriving on the same socket while the state is loaded."""
    script, destination = migration(203_900, last=203_950, alone=True)
    for us in range(204_250, 204_500, 50):
        segment(destination, us)
        destination.receive(us + 5, us + 10, 20_000, socket=80, tid=4)
    expected = figures(script.result())
    script, _ = migration(203_900, last=203_950, alone=True)
    assert figures(script.result()) == expected


def test_a_thread_without_a_cpu_has_not_finished_loading() -> None:
    """More than 20 ms between two restore ioctls, for which it could run and others had its CPU."""
    both, alone = (migration(203_900, last=234_300, alone=one) for one in (False, True))
    for _, destination in (both, alone):
        segment(destination, 203_900)
        destination.off(204_250, 234_200, preempted=True)
    assert figures(alone[0].result()) == figures(both[0].result()) == (700, 400)
    assert alone[0].result().window == 31_200
