# SPDX-License-Identifier: Apache-2.0
"""Throttling before the switchover: the window begins with the request of the thread that stops all vCPUs."""

from __future__ import annotations

from ebpf_mig.breakdown import Throttled
from tests.unit.script import Result, Script, Vm

MIGRATION, MAIN = 1, 9


def throttled(us: float, source: Vm, until: float, *, entered: float, vcpu: int = 0) -> None:
    """The main thread's timer kicks a vCPU, which leaves and comes back at `until`."""
    source.kick(us, vcpu, tid=MAIN)
    source.interrupted(us + 20, vcpu, entered=entered)
    source.entered(until, vcpu, left=us + 20, ret=-4, runs=2)


def handed_over(script: Script, source: Vm, destination: Vm, stop: float) -> Result:
    """After a stop: quiesced in 1 ms, fetched, 64 KiB and the state sent, loaded, started 5 ms later."""
    source.gets(stop + 1000)
    source.send(stop + 1100, stop + 1300, 65536)
    source.ioctls("GET_REGS GET_SREGS", stop + 1400, stop + 1500)
    source.send(stop + 1600, stop + 1700, 4000)
    destination.receive(stop + 1100, stop + 1710, 69536, socket=80)
    destination.ioctls("SET_SREGS SET_REGS", stop + 2000, stop + 2400)
    destination.ioctl("SET_CLOCK", stop + 3000)
    destination.entered(stop + 5000)
    return script.result()


def running(vcpus: int = 1) -> tuple[Script, Vm, Vm]:
    """A source in pre-copy, its vCPUs inside since 0, with a pass and its pages."""
    script = Script()
    source, destination = script.pair(vcpus)
    source.logging(1000)
    source.gets(2000)
    source.send(3000, 4000, 1 << 20)
    return script, source, destination


def test_the_window_begins_with_the_request_and_not_with_the_throttles_kick() -> None:
    script, source, destination = running()
    throttled(10_000, source, 50_000, entered=100)
    source.kick(60_000, tid=MAIN)
    source.interrupted(60_020, entered=50_000)
    source.gets(70_000)  # a pass that runs while the guest is throttled
    source.send(70_200, 71_000, 65536)
    source.kick(90_000, tid=MIGRATION)
    result = handed_over(script, source, destination, 90_000)
    assert result.window == 5000
    assert result.blackout == (0, 5000)
    assert "pause" not in result.phases
    assert result.phases["quiesce"] == 1000
    assert [f.begin for f in result.breakdown.dirty_log.fetches] == [1_000_000]
    assert len(result.breakdown.dirty_log.passes) == 2
    dark = 39_980 + 29_980
    assert result.breakdown.throttled == Throttled(
        dark_ns=dark * 1000, stretches=2, longest_ns=39_980_000, before_request_ns=29_980_000
    )
    assert result.breakdown.vcpus[0].stop == -29_980_000


def test_a_vcpu_that_left_by_itself_right_before_the_throttles_kick() -> None:
    """As seen with QEMU 7.2: the exit to user space was 0.4 ms before the kick, and the sleep lasted 700 ms."""
    script, source, destination = running()
    throttled(10_000, source, 50_000, entered=100)
    source.last(entered=50_000, left=60_000, end=200_000)
    source.kick(60_375, tid=MAIN)
    source.kick(90_000, tid=MIGRATION)
    result = handed_over(script, source, destination, 90_000)
    assert result.window == 5000
    assert result.breakdown.throttled is not None
    assert result.breakdown.throttled.before_request_ns == 30_000_000


def test_a_throttled_vcpu_that_ran_when_it_was_asked_to_stop() -> None:
    script, source, destination = running()
    throttled(10_000, source, 50_000, entered=100)
    throttled(60_000, source, 80_000, entered=50_000)
    source.kick(90_000, tid=MIGRATION)
    source.interrupted(90_300, entered=80_000)
    result = handed_over(script, source, destination, 90_300)
    assert result.window == 5300
    assert result.phases["pause"] == 300
    assert result.breakdown.throttled is not None
    assert result.breakdown.throttled.before_request_ns == 0


def test_one_vcpu_held_and_one_running() -> None:
    """The throttle's kick is in vCPU 0's gap. The pause request stops vCPU 1."""
    script, source, destination = running(vcpus=2)
    for vcpu in (0, 1):
        throttled(10_000, source, 50_000, entered=100, vcpu=vcpu)
    source.kick(60_000, 0, tid=MAIN)
    source.interrupted(60_020, 0, entered=50_000)
    source.kick(90_000, 0, tid=MIGRATION)
    source.kick(90_010, 1, tid=MIGRATION)
    source.interrupted(90_200, 1, entered=50_000)
    result = handed_over(script, source, destination, 90_200)
    assert result.window == 5200
    assert result.phases["pause"] == 200


def test_a_dirty_limit_has_no_kick_but_a_reset_and_a_sleep() -> None:
    script, source, destination = running()
    vcpu = source.tid(0) - source.pid
    for begin, back in ((10_000, 50_000), (60_000, None)):
        source.ioctl("RESET_DIRTY_RINGS", begin + 100, tid=vcpu)
        if back is not None:
            source.entered(back, left=begin, runs=2)
    source.last(entered=50_000, left=60_000, end=200_000)
    source.kick(90_000, tid=MIGRATION)
    result = handed_over(script, source, destination, 90_000)
    assert result.window == 5000
    assert result.breakdown.throttled is not None
    assert result.breakdown.throttled.before_request_ns == 30_000_000


def test_waiting_for_the_vmms_lock_is_no_throttle() -> None:
    """The vCPU left without a kick, 5 ms before the request. The blackout is the migration's own work."""
    script, source, destination = running()
    source.last(entered=100, left=85_000, end=200_000)
    source.kick(90_000, tid=MIGRATION)
    result = handed_over(script, source, destination, 90_000)
    assert result.breakdown.throttled is None
    assert result.blackout == (0, 10_000)


def test_the_ring_reapers_kick_is_no_request() -> None:
    script, source, destination = running()
    reaper = 5
    source.ioctl("RESET_DIRTY_RINGS", 5000, tid=reaper)
    source.entered(100)
    source.kick(89_000, tid=reaper)
    source.kick(90_000, tid=MIGRATION)
    source.interrupted(90_100, entered=100)
    result = handed_over(script, source, destination, 90_100)
    assert result.phases["pause"] == 100
