# SPDX-License-Identifier: Apache-2.0
"""The result of a source that was traced alone, by what its state went to."""

from __future__ import annotations

from ebpf_mig.breakdown import Migration
from ebpf_mig.linux.descriptors import PLACED
from ebpf_mig.recording.events import (
    CLOSED,
    ENDED,
    FILE,
    FORWARDER,
    KEEPER,
    NEIGHBOUR,
    PIPE,
    SEND,
    Ending,
    SocketError,
    VcpuState,
)
from tests.unit.script import UNIX, Script, Vm, at


def handing_over(script: Script, family: int, inode: int = 70, *, state: int = 100_000) -> Vm:
    """A source that sends memory and state to one carrier, and stays stopped."""
    source = script.vm(1000, "source")
    source.socket(inode, family=family)
    source.logging(-100_000)
    source.gets(-99_900)
    source.send(-98_000, -2_000, 10_000_000, socket=inode, calls=80)
    source.interrupted(0)
    source.gets(100)
    source.send(300, 400, 200_000, socket=inode)
    source.ioctls("GET_REGS GET_SREGS", 500, 600)
    source.send(700, 800, state, socket=inode)
    return source


def outcome(script: Script, reason: str = "handed-over") -> Migration:
    script.ending = Ending(at(3_000_000), reason)
    return script.result().breakdown.migration


def test_a_state_in_a_file_is_saved() -> None:
    script = Script()
    handing_over(script, FILE, PLACED | 7)
    found = outcome(script)
    assert (found.result, found.transport, found.mode) == ("saved", "file", "snapshot")


def test_a_state_in_a_pipe_is_saved_unless_its_reader_can_pass_it_on() -> None:
    for mark, expected in ((NEIGHBOUR, "saved"), (FORWARDER, "unknown"), ("", "saved")):
        script = Script()
        handing_over(script, PIPE)
        if mark:
            script.mark(10, 1000, mark, 70)
        found = outcome(script)
        assert (found.result, found.mode) == (expected, "precopy"), "behind a pipe there may be another host"
    script.mark(10, 1000, FORWARDER, 70)
    script.mark(900, 1000, CLOSED, 70)
    assert outcome(script).result == "completed", "its VMM closed the pipe and lived on"


def test_a_state_behind_a_pipe_is_a_snapshot_if_its_reader_writes_a_file() -> None:
    for inode, expected in ((70, "snapshot"), (71, "precopy")):
        script = Script()
        handing_over(script, PIPE)
        script.mark(10, 1000, KEEPER, inode)
        script.mark(11, 1000, NEIGHBOUR, 70 if inode != 70 else 71)
        found = outcome(script)
        assert (found.result, found.transport, found.mode) == ("saved", "pipe", expected), inode


def test_a_guest_that_runs_on_after_it_was_saved_has_a_blackout_whose_end_is_known() -> None:
    for resumed in (True, False):
        script = Script()
        source = handing_over(script, PIPE)
        if resumed:
            source.ioctl("SET_CLOCK", 5000)
            source.entered(6000, left=0)
        b = script.result().breakdown
        assert b.migration.result == "saved"
        assert (b.completeness.verdict == "complete") is resumed, b.completeness.reasons


def test_a_reader_of_another_pipe_tells_nothing() -> None:
    script = Script()
    handing_over(script, PIPE)
    script.mark(10, 1000, FORWARDER, 71)
    assert outcome(script).result == "saved"


def test_what_is_written_while_nothing_is_known_to_carry_is_no_saved_state() -> None:
    """RDMA beside a disk that is flushed at the stop; a monitor that is polled."""
    script = Script()
    source = script.vm(1000, "source")
    source.socket(PLACED | 7, family=FILE)
    source.socket(71, family=UNIX)
    source.logging(-100_000)
    source.gets(-99_900)
    source.interrupted(0)
    source.gets(100)
    source.ioctls("GET_REGS GET_SREGS", 500, 600)
    source.send(700, 800, 900_000, socket=PLACED | 7, tid=9)
    source.send(700, 800, 60_000, socket=71, tid=8, calls=100)
    assert outcome(script).result == "unknown"


def test_a_snapshot_into_a_disk_is_saved_if_the_guest_runs_on() -> None:
    """savevm: the threads that write the disk are not the one that fetches."""
    script = Script()
    source = script.vm(1000, "source")
    source.socket(PLACED | 7, family=FILE)
    source.kick(-20)
    source.interrupted(0)
    source.ioctls("GET_CLOCK", 50, 60)
    source.logging(70)
    source.gets(120)
    source.ioctls("GET_REGS GET_SREGS", 500, 600)
    source.send(700, 800, 900_000, socket=PLACED | 7, tid=9)
    source.entered(1000)
    source.logging(1100, on=False)
    found = outcome(script, "logging-ended")
    assert (found.result, found.mode) == ("saved", "snapshot")


def test_a_migration_whose_carrier_is_not_seen_is_never_saved() -> None:
    """RDMA that fails, so that the guest runs on, while the disk is flushed; RDMA beside a console into a pipe."""
    for family, inode, tid, runs_on in ((FILE, PLACED | 7, 9, True), (PIPE, 70, 9, False), (PIPE, 70, 100, True)):
        script = Script()
        source = script.vm(1000, "source")
        source.socket(inode, family=family)
        source.logging(-100_000)
        source.gets(-99_900)
        source.kick(-20)
        source.interrupted(0)
        source.gets(100)
        source.ioctls("GET_REGS GET_SREGS", 500, 600)
        source.send(700, 800, 900_000, socket=inode, tid=tid)
        if runs_on:
            source.entered(1000)
            source.logging(1100, on=False)
        found = outcome(script, "logging-ended")
        assert (found.result, found.transport) == ("unknown", "none"), (family, tid)
        assert script.result().breakdown.completeness.verdict == "bounded"


def test_a_guest_that_waits_for_the_lock_of_the_set_up_is_not_paused() -> None:
    for left, kicked, paused in ((-105_000, False, False), (-105_000, True, True), (-300_000, False, True)):
        script = Script()
        source = script.vm(1000, "source")
        source.socket(70, family=PIPE)
        if kicked:
            source.kick(left - 50, tid=3)
        source.entered(-900_000)
        source.interrupted(left, entered=-900_000)
        source.entered(-99_000, left=left)
        source.logging(-100_000)
        source.gets(-99_900)
        source.interrupted(0, entered=-99_000)
        source.gets(100)
        assert outcome(script).paused_before is paused


def test_the_wait_for_cont_after_a_state_was_kept_is_part_of_resume() -> None:
    for family, inode in ((FILE, PLACED | 7), (PIPE, 70)):
        script = Script()
        source = handing_over(script, family, inode)
        source.entered(300_800)
        script.ending = Ending(at(1_000_000), "logging-ended")
        found = script.result()
        assert found.breakdown.migration.result == "saved"
        assert (found.phases["resume"], found.phases["state.send"]) == (300_000, 100)
        assert "unattributed" not in found.phases and "handover" not in found.phases


def cancelled_try(script: Script) -> tuple[Vm, Vm]:
    """A try that was cancelled while the guest ran, of which no vCPU event is left: the guest never left KVM_RUN.

    QEMU's destination sets its vCPUs' state and ends when the stream does.
    """
    source, destination = script.pair()
    source.logging(-500_000)
    source.gets(-499_000)
    source.send(-498_000, -2_000, 300_000, calls=10)
    source.events.append(SocketError(at(-1_900), 1000, 1003, 70, SEND, 0))
    destination.receive(-497_000, -1_900, 300_000, socket=80, calls=10)
    destination.ioctls("SET_SREGS SET_REGS SET_MSRS", -1_500, -1_400)
    source.logging(-1_000, on=False)
    return source, destination


def test_a_cancelled_try_whose_guest_shows_no_event_is_not_completed() -> None:
    """The state that a destination sets as it gives up is no sign that it took over."""
    script = Script()
    cancelled_try(script)
    assert outcome(script, "logging-ended").result == "unknown"
    script.mark(-1_300, 2000, ENDED)
    assert outcome(script, "logging-ended").result == "failed"


def test_a_vcpu_that_never_left_its_guest_was_not_paused() -> None:
    script = Script()
    source, _ = cancelled_try(script)
    assert outcome(script, "logging-ended").paused_before is True, "no vCPU was in KVM_RUN at any time"
    script.ending = None
    found = script.result(truncated=True).breakdown.migration
    assert (found.paused_before, found.stopped_early, found.result) == (None, False, "unknown"), "no account was read"
    source.events.append(VcpuState(at(0), 1000, 1100, 10, 0, 0, 0, 0, 0, 0, 0))
    found = outcome(script, "logging-ended")
    assert (found.paused_before, found.stopped_early, found.result) == (False, False, "unknown")


def test_a_connection_that_the_source_shut_down_was_not_handed_over() -> None:
    """QEMU closes it after a success, and shuts it down first to cancel. The guest was paused in both cases."""
    for shut_down, expected in ((True, "unknown"), (False, "completed")):
        script = Script()
        source = script.vm(1000, "source")
        source.socket(70, "10.0.0.1:1", "10.0.0.2:2")
        source.logging(-500_000)
        source.gets(-499_000)
        source.send(-498_000, -2_000, 300_000, calls=10)
        if shut_down:
            source.events.append(SocketError(at(-1_900), 1000, 1003, 70, SEND, 0))
        source.logging(-1_000, on=False)
        script.mark(0, 1000, CLOSED, 70)
        found = outcome(script, "handed-over")
        assert (found.paused_before, found.result) == (True, expected)


def test_the_end_of_another_try_s_destination_says_nothing() -> None:
    """A paused guest moves to a second destination, after the first one gave up."""
    script = Script()
    source, destination = script.pair()
    source.logging(-500_000)
    source.gets(-499_000)
    source.send(-498_000, -2_000, 300_000, calls=10)
    destination.receive(-497_000, -1_900, 300_000, socket=80, calls=10)
    destination.ioctls("SET_SREGS SET_REGS SET_MSRS", -1_500, -1_400)
    source.logging(-1_000, on=False)
    script.mark(-490_000, 3000, ENDED)
    assert outcome(script, "handed-over").result == "completed"
    script.mark(-100, 2000, ENDED)
    assert outcome(script, "handed-over").result == "failed"


def test_a_vcpu_that_waited_for_long_before_the_pause_request_was_not_paused() -> None:
    """It left KVM_RUN by itself and waited 0.2 s for a lock of the VMM. The pause was requested meanwhile, so the
    KVM_RUN after that returned at once. Without this call, somebody had paused the guest. So had they if the only such
    call is the first one of a guest that is set going again: nothing is read after that."""
    for runs, back, expected in (
        (True, False, ("completed", False, 5_100)),
        (False, False, ("completed", True, None)),
        (True, True, ("unknown", False, 40_100)),
        (False, True, ("unknown", True, None)),
    ):
        script = Script()
        source, destination = script.pair()
        source.entered(-900_000)
        source.logging(-30_000)
        source.gets(-29_900)
        source.send(-29_000, -2_000, 10_000_000, calls=80)
        source.kick(-100)
        if runs:
            source.entered(0, left=-210_000)
            source.interrupted(10, entered=0)
        elif not back:
            source.last(entered=-900_000, left=-210_000, end=10_000)
        source.gets(100)
        source.send(300, 400, 200_000)
        source.ioctls("GET_REGS GET_SREGS", 500, 600)
        source.send(700, 800, 100_000)
        destination.receive(310, 900, 10_300_000, socket=80, calls=80)
        destination.ioctls("SET_REGS SET_SREGS", 1_000, 1_100)
        if back:
            source.ioctl("SET_CLOCK", 39_000)
            source.entered(39_990, left=10 if runs else -210_000, ret=-4 if runs else 0)
            source.interrupted(39_996, entered=39_990)
            source.entered(40_000, left=39_996, ret=-4)
        else:
            destination.entered(5_000)
        found = script.result()
        seen = found.blackout
        took = seen and seen[1] - seen[0]
        assert (outcome(script, "migrated").result, outcome(script, "migrated").paused_before, took) == expected
