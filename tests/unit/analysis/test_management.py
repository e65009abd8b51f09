# SPDX-License-Identifier: Apache-2.0
"""The phase `management`: the VMM is ready and waits for a command. Orders follow QEMU 7.2 with pause-before-switchover
and a destination that was started with -S."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from ebpf_mig.breakdown import ManagerWait, Side
from ebpf_mig.report import text
from tests.unit import scripts
from tests.unit.script import UNIX, US, Result, Script, Vm

MONITOR = 79
MAIN, MIGRATION, READER, VCPU = 0, 1, 3, 100


def pausing(
    *, told: float | None = 1600, command: float = 21_600, answered: float = 21_700, stack: str = "futex_do_wait"
) -> tuple[Script, Vm, Vm]:
    """The source stops at 100 us, says STOP at 500 and `told` pre-switchover, and is told to go on at `command`."""
    script = Script()
    source, destination = script.pair()
    source.socket(MONITOR, family=UNIX, peer=999)
    source.logging(-100_000)
    source.gets(-99_900)
    source.send(-98_000, -2_000, 10_000_000, calls=80)
    source.command(-90_000, 30)  # the command `migrate` was answered long ago
    source.send(-89_000, -88_999, 16, MONITOR, MAIN)
    source.kick(0)
    source.interrupted(100)
    source.ioctl("GET_CLOCK", 300)
    source.send(490, 500, 81, MONITOR, MIGRATION)
    source.off(520, 1540, "futex_do_wait", tid=MIGRATION)  # takes back early commands to go on, with a time-out of 1 ms
    if told is not None:
        source.send(told - 10, told, 124, MONITOR, MIGRATION)
    source.off(1650, 21_750, stack, tid=MIGRATION)
    source.command(command, 40)
    source.send(answered, answered + 5, 16, MONITOR, MAIN)
    source.send(21_760, 21_765, 116, MONITOR, MIGRATION)
    source.kick(21_800)
    source.ioctls(scripts.READS, 21_810, 21_900, tid=VCPU)
    source.gets(22_000)
    source.send(22_200, 23_000, 500_000)
    source.ioctl("GET_CLOCK", 23_100)
    source.send(23_400, 23_500, 30_000)
    return script, source, destination


def loading(destination: Vm, since: float, *, started: float) -> None:
    """It receives the state, sets it, says `completed` 1 ms later, and starts the guest."""
    destination.socket(MONITOR, family=UNIX, peer=998)
    destination.receive(since, since + 10, 30_000, socket=80, tid=MAIN)
    destination.ioctls(scripts.WRITES, since + 100, since + 500, tid=VCPU)
    destination.send(since + 1490, since + 1500, 119, MONITOR, MAIN)
    destination.ioctl("SET_CLOCK", started - 300, tid=MAIN)
    destination.entered(started)


def waiting(destination: Vm, since: float, command: float) -> None:
    """It falls asleep in its main loop, until another thread has read the command."""
    destination.off(since, command + 130, "do_sys_poll", tid=MAIN)
    destination.command(command, 30)
    destination.send(command + 200, command + 205, 83, MONITOR, MAIN)


def found(result: Result) -> list[tuple[str, float, float, int]]:
    assert result.breakdown.management is not None
    return [(w.side, w.begin / US, w.duration_ns / US, w.commands) for w in result.breakdown.management]


def test_pre_switchover_and_cont_are_waits_for_the_manager() -> None:
    script, _, destination = pausing()
    loading(destination, 23_600, started=80_400)
    waiting(destination, 25_150, 80_000)
    result = script.result()
    assert found(result) == [("source", 1600, 20_001, 1), ("destination", 25_100, 54_901, 1)]
    assert result.spans("management") == [(1600, 21_601), (25_100, 80_001)]
    assert result.phases == {
        "pause": 100,
        "quiesce": 1500 + 209,
        "fetch.kernel": 20,
        "fetch.user": 180,
        "memory.send": 900,
        "state.save": 190 + 300,
        "state.send": 100,
        "handover": 200,
        "state.load": 400,
        "resume": 1000 + 399,
        "management": 20_001 + 54_901,
    }
    assert sum(result.phases.values()) == result.window == 80_400
    shown = text.render(result.breakdown)
    assert "manager      74.902 ms, waited for it: source 20.001, destination 54.901\n" in shown


def test_without_a_manager_nothing_is_said_of_it() -> None:
    result = scripts.qemu_7_2().result()
    assert found(result) == []
    assert result.spans("management") == []
    assert "manage" not in text.render(result.breakdown)


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("it drains block devices, holds the lock and polls", {"stack": "do_sys_poll"}),
        ("it came while nobody slept", {"command": 21_760, "answered": 21_790}),
    ],
)
def test_a_command_that_did_not_end_the_sleep_is_no_reason_for_it(what: str, changed: dict[str, float]) -> None:
    script, *_ = pausing(**changed)  # type: ignore[arg-type]
    assert found(script.result()) == [], what


def test_an_answer_may_come_after_it_went_on() -> None:
    script, _, destination = pausing(answered=30_000)
    loading(destination, 23_600, started=28_000)
    assert found(script.result()) == [("source", 1600, 20_001, 1)]


def test_it_slept_for_another_reason_if_the_command_had_to_wait_for_the_big_lock() -> None:
    script, source, _ = pausing(command=10_000, answered=21_830)
    source.off(10_200, 21_820, "futex_do_wait", tid=MAIN)
    assert found(script.result()) == []


def test_a_question_right_before_is_answered_in_the_wait_and_is_no_wait_of_its_own() -> None:
    script, source, destination = pausing()
    source.command(1300, 30)
    source.send(1700, 1705, 900, MONITOR, MAIN)
    loading(destination, 23_600, started=28_000)
    assert found(script.result()) == [("source", 1600, 20_001, 1)]


def test_the_end_of_a_line_is_not_the_begin_of_the_next_command() -> None:
    """libvirt asks for the status, and goes on as soon as it has the answer."""
    script, source, destination = pausing()
    source.command(21_000, 30)
    source.send(21_480, 21_490, 900, MONITOR, MAIN)
    source.command(21_500, 2)
    loading(destination, 23_600, started=28_000)
    assert found(script.result()) == [("source", 1600, 20_001, 2)]


def test_vcpus_that_had_left_the_guest_by_themselves_hide_who_stopped_them() -> None:
    script, source, destination = pausing()
    source.events = [e for e in source.events if type(e).__name__ != "Kick" or e.at_ns > 10_021_000_000]
    source.gets(-700)
    loading(destination, 23_600, started=28_000)
    assert [(side, took) for side, _, took, _ in found(script.result())] == [("source", 20_001)]


def test_after_the_state_the_source_waits_for_the_destination_whatever_is_asked() -> None:
    script, source, destination = pausing()
    source.send(23_550, 23_560, 100, MONITOR, MIGRATION)
    source.off(23_570, 79_000, "futex_do_wait", tid=MIGRATION)
    source.command(50_000, 30)
    source.send(50_300, 50_305, 900, MONITOR, MAIN)
    loading(destination, 23_600, started=80_000)
    assert found(script.result()) == [("source", 1600, 20_001, 1)]


def test_questions_meanwhile_are_counted_and_do_not_end_the_wait() -> None:
    script, source, destination = pausing()
    source.command(5000, 30)
    source.send(5300, 5305, 900, MONITOR, MAIN)
    source.command(5320, 1)  # the end of that line, which QEMU reads after it has answered
    loading(destination, 23_600, started=80_400)
    destination.off(25_150, 40_130, "do_sys_poll", tid=MAIN)
    destination.command(40_000, 30)
    destination.send(40_300, 40_305, 900, MONITOR, MAIN)
    waiting(destination, 40_400, 80_000)
    assert found(script.result()) == [("source", 1600, 20_001, 2), ("destination", 25_100, 54_901, 2)]


def test_a_busy_thread_is_not_ready_and_one_that_lost_its_cpu_is() -> None:
    script, _, destination = pausing()
    loading(destination, 23_600, started=80_400)
    destination.off(25_120, 29_120, tid=MAIN, preempted=True)
    waiting(destination, 29_200, 80_000)
    assert found(script.result())[1] == ("destination", 25_100, 54_901, 1)
    script, _, destination = pausing()
    loading(destination, 23_600, started=80_400)
    waiting(destination, 29_200, 80_000)
    assert found(script.result())[1] == ("destination", 29_200, 50_801, 1)


def test_a_command_may_come_while_the_thread_is_up_for_a_timer() -> None:
    script, _, destination = pausing()
    loading(destination, 23_600, started=80_400)
    destination.off(25_150, 79_600, "do_sys_poll", tid=MAIN)
    destination.command(80_000, 30)
    destination.send(80_080, 80_085, 83, MONITOR, MAIN)
    assert found(script.result())[1] == ("destination", 25_100, 54_901, 1)


def test_a_destination_that_starts_by_itself_was_not_told_to() -> None:
    script, _, destination = pausing()
    loading(destination, 23_600, started=28_000)
    destination.off(25_120, 27_600, "futex_do_wait", tid=MAIN)  # joins a thread; a question is read, but not answered
    destination.command(26_000, 30)
    destination.send(27_650, 27_655, 83, MONITOR, MAIN)
    assert found(script.result()) == [("source", 1600, 20_001, 1)]


def test_a_cancel_at_pre_switchover() -> None:
    script, source, _ = pausing()
    kept = [e for e in source.events if getattr(e, "begin_ns", 0) < 10_021_770_000]
    source.events = kept
    source.ioctl("SET_CLOCK", 22_500, tid=MIGRATION)
    source.entered(23_000, left=100, ret=-4)
    source.last(entered=24_000, left=23_990, end=900_000)
    result = script.result()
    assert found(result) == [("source", 1600, 20_001, 1)]
    assert result.phases == {"pause": 100, "quiesce": 1500, "management": 20_001, "resume": 1399}


def test_the_destination_alone() -> None:
    script, _, destination = pausing()
    loading(destination, 23_600, started=80_400)
    waiting(destination, 25_150, 80_000)
    script.vms = [destination]
    result = script.result()
    assert found(result) == [("destination", 1400, 54_901, 1)]
    assert result.phases == {"state.load": 400, "resume": 1000 + 399, "management": 54_901}


def test_a_socket_that_is_read_in_larger_pieces_is_no_monitor() -> None:
    """Replies of a block device over NBD come from a server that the VMM has asked."""
    script, source, _ = pausing()
    source.receive(-50_000, -49_990, 16, MONITOR, READER)
    assert found(script.result()) == []


@pytest.mark.parametrize("signal", ["socket", "off-cpu"])
def test_it_is_unknown_where_a_signal_is_missing(signal: str) -> None:
    script, *_ = pausing()
    script.attach[signal] = "absent: no such tracepoint"
    kinds = ("Transfer", "Socket") if signal == "socket" else ("OffCpu",)
    for vm in script.vms:
        vm.events = [e for e in vm.events if type(e).__name__ not in kinds]
    result = script.result().breakdown
    assert result.management is None
    assert result.phase_ns("management") is None


def test_the_row_names_each_side() -> None:
    breakdown = scripts.qemu_7_2().result().breakdown
    waits = [ManagerWait(side=Side.SOURCE, begin=0, duration_ns=5_000_000, commands=1)]
    shown = text.render(replace(breakdown, management=waits))
    assert "manager      5.000 ms, waited for it: source 5.000\n" in shown
