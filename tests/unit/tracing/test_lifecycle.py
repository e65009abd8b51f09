# SPDX-License-Identifier: Apache-2.0
"""When passive tracing decides that a migration is over."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import (
    AF_UNIX,
    FILE,
    PIPE,
    AnyEvent,
    Ending,
    Exec,
    Ioctl,
    Kick,
    Socket,
    Transfer,
    VcpuEnter,
    VcpuExit,
)  # fmt: skip
from ebpf_mig.recording.file import read_recording
from ebpf_mig.tracing.lifecycle import QUIET_NS, SILENCE_NS, STOPPED_NS, MigrationWatch

SRC, DST = 10, 20
SET_REGS = 0x4090AE82
MS = 1_000_000


def logging(at: int, on: bool, size: int = 256 << 20) -> Ioctl:
    return Ioctl(at, at + 1, SRC, SRC, 5, kvm.SET_USER_MEMORY_REGION, 0, slot=1, flags=int(on), size=size)


def fetch(at: int) -> Ioctl:
    return Ioctl(at, at + 1, SRC, SRC, 5, kvm.GET_DIRTY_LOG, 0, slot=1)


def stop(at: int) -> VcpuExit:
    return VcpuExit(at, SRC, 11, 7, at - MS, -4)


def start(at: int, pid: int = DST) -> list[AnyEvent]:
    return [Ioctl(at - 2, at - 1, pid, pid, 7, SET_REGS, 0), VcpuEnter(at, pid, pid + 1, 7, 0, 0, 1)]


def came(at: int, size: int = 64 << 10, calls: int = 2, pid: int = DST) -> Transfer:
    return Transfer(at, at + 1, pid, pid, 9, 1, 88, calls, size, 1, 1, 0, 0)


def verdict(events: list[AnyEvent], now: int, pids: tuple[int, ...] = (SRC, DST)) -> str | None:
    watch = MigrationWatch(pids)
    watch.saw(events)
    return watch.verdict(now, pids)


def test_a_started_destination_ends_it_after_a_quiet_while() -> None:
    events = [logging(1, True), fetch(2 * MS), stop(3 * MS), fetch(4 * MS), *start(9 * MS)]
    assert verdict(events, 9 * MS + QUIET_NS - 1) is None
    assert verdict(events, 9 * MS + QUIET_NS) == "migrated"


def test_a_destination_that_was_traced_too_late_ends_it_with_its_source() -> None:
    """Its guest was not seen to be loaded, and never falls silent."""
    watch = MigrationWatch((SRC,))
    watch.saw([VcpuEnter(1, SRC, 11, 7, 0, 0, 1), logging(2, True), fetch(2 * MS), stop(3 * MS), fetch(4 * MS)])
    watch.joined(DST)
    for at in range(10 * MS, 10_000 * MS, 100 * MS):
        watch.saw([VcpuEnter(at, DST, 21, 7, at - MS, 0, 9)])
        assert watch.verdict(at, (SRC, DST)) is None
    end = 10_000 * MS
    assert watch.verdict(end, (DST,)) is None, "it may have ended just now"
    watch.saw([VcpuEnter(end + STOPPED_NS, DST, 21, 7, end, 0, 9)])
    assert watch.verdict(end + STOPPED_NS, (DST,)) == "handed-over"


def test_a_source_that_ends_while_nobody_runs_is_awaited() -> None:
    watch = MigrationWatch((SRC, DST))
    watch.saw([logging(1, True), fetch(2 * MS), stop(3 * MS), fetch(4 * MS), came(5 * MS)])
    assert watch.verdict(10 * MS, (DST,)) is None
    assert watch.verdict(10 * MS + STOPPED_NS, (DST,)) is None


def test_a_running_guest_is_not_a_started_destination() -> None:
    events: list[AnyEvent] = [VcpuEnter(MS, SRC, 11, 7, 0, 0, 1), VcpuEnter(5 * MS, SRC, 11, 7, 2 * MS, 0, 9)]
    assert verdict(events, 10_000 * MS, (SRC,)) is None


def test_logging_switched_off_again_is_an_ending() -> None:
    events = [logging(1, True), fetch(MS), logging(2 * MS, False)]
    assert verdict(events, 2 * MS + QUIET_NS + 1) == "logging-ended"


def test_a_switch_off_after_much_was_sent_ends_what_began_unseen() -> None:
    for sent, reason in ((1 << 20, "logging-ended"), (4096, None)):
        assert verdict([moved(MS, 0, sent), logging(2 * MS, False)], 10_000 * MS, (SRC,)) == reason


def test_the_vga_slot_is_no_migration() -> None:
    small = [logging(1, True, size=65536), logging(2, False, size=65536)]
    assert verdict(list(small), 10_000 * MS) is None


def moved(at: int, direction: int, size: int = 1 << 20, socket: int = 77) -> Transfer:
    return Transfer(at - MS, at, SRC, SRC, 9, direction, socket, 3, size, MS, MS, 0, 0)


HANDED: list[AnyEvent] = [logging(1, True), fetch(2 * MS), stop(3 * MS), moved(6 * MS, 0)]


def test_a_source_alone_is_not_done_because_it_is_silent() -> None:
    assert verdict(HANDED, 10 * STOPPED_NS, (SRC,)) is None
    assert verdict(HANDED, 6 * MS + SILENCE_NS, (SRC,)) == "lost-sight"


def test_a_source_alone_ends_when_it_was_answered_and_stays_stopped() -> None:
    events = [*HANDED, moved(7 * MS, 1, 8)]
    assert verdict(events, 6 * MS + STOPPED_NS, (SRC,)) is None
    assert verdict(events, 7 * MS + STOPPED_NS, (SRC,)) == "handed-over"
    assert verdict([*HANDED, moved(7 * MS, 1, 8, socket=78)], 9 * STOPPED_NS, (SRC,)) is None, "on another socket"
    back = VcpuEnter(8 * MS, SRC, 11, 7, 3 * MS, -4, 2)
    assert verdict([*events, back], 9 * STOPPED_NS, (SRC,)) is None, "its guest came back"


def test_a_source_alone_ends_when_its_vmm_closed_the_connection() -> None:
    watch = MigrationWatch([SRC])
    watch.saw(HANDED)
    assert watch.connections == {SRC: 77}
    watch.closed(SRC, 50 * MS)
    assert watch.connections == {}
    assert watch.verdict(49 * MS + STOPPED_NS, [SRC]) is None
    assert watch.verdict(50 * MS + STOPPED_NS, [SRC]) == "handed-over"


def test_a_guest_that_stopped_by_itself_is_not_awaited_at_the_destination() -> None:
    """Another thread asked for the stop than the one that goes on fetching."""
    for kicker, ends in ((7, "handed-over"), (SRC, None)):
        kick = Kick(3 * MS - 1, SRC, kicker, 11, 10)
        sent = Transfer(5 * MS, 6 * MS, SRC, SRC, 9, 0, 77, 1, 1 << 20, 1, 1, 0, 0)
        answer = Transfer(7 * MS, 7 * MS, SRC, SRC, 9, 1, 77, 1, 8, 1, 1, 0, 0)
        events = [logging(1, True), fetch(2 * MS), kick, stop(3 * MS), fetch(4 * MS), sent, answer]
        assert verdict(events, 7 * MS + STOPPED_NS) == ends


def test_a_destination_alone_ends_when_it_started() -> None:
    assert verdict([came(MS // 2), *start(MS)], MS + QUIET_NS, (DST,)) == "migrated"


def test_a_guest_that_boots_is_no_started_destination() -> None:
    """Whatever its monitor, network, disk or console delivers, and whenever its manager lets it go."""
    clock, pause = Ioctl(3 * MS, 3 * MS + 1, DST, DST, 5, kvm.SET_CLOCK, 0), stop(8 * MS)
    monitor = came(MS // 2, calls=64 << 10)
    for events in (start(MS), [monitor, *start(MS)], [*start(MS)[:1], came(2 * MS), clock, *start(4 * MS)]):
        assert verdict(events, 10_000 * MS, (DST,)) is None
        assert verdict([logging(1, True), fetch(2 * MS), *events], SILENCE_NS, (SRC, DST)) is None
        assert verdict([logging(1, True), *events, pause, fetch(9 * MS)], SILENCE_NS, (SRC, DST)) == "migrated"


def test_a_guest_that_ran_and_is_written_to_is_no_started_destination() -> None:
    """As by a reset, or by a monitor that shows registers."""
    events = [VcpuEnter(MS // 4, DST, DST + 1, 7, 0, 0, 1), came(MS // 2), *start(MS)]
    assert verdict(events, 10_000 * MS, (DST,)) is None


def test_memory_that_a_talkative_guest_maps_is_no_end_of_logging() -> None:
    """It deletes the slot first; one that boots makes all of them."""
    said = moved(MS, 0, 1 << 20)
    gone = logging(2 * MS, False, size=0)
    assert verdict([said, gone, logging(3 * MS, False)], 10_000 * MS, (SRC,)) is None
    assert verdict([logging(MS // 2, False), said, logging(3 * MS, False)], 10_000 * MS, (SRC,)) is None
    assert verdict([said, gone, logging(3 * MS, False), logging(4 * MS, True)], 2 * SILENCE_NS, (SRC,)) == "lost-sight"


def test_nobody_left_is_an_ending() -> None:
    watch = MigrationWatch([SRC])
    assert watch.verdict(1, []) == "target-died"


def test_a_busy_guest_does_not_hide_that_the_migration_is_over() -> None:
    watch = MigrationWatch([1, 2])
    watch.saw([came(0, pid=2), Ioctl(3, 4, 2, 2, 5, SET_REGS, 0), VcpuEnter(10, 2, 3, 6, 0, 0, 1)])
    for at in range(20, 2 * QUIET_NS, QUIET_NS // 4):
        watch.saw([VcpuExit(at, 2, 3, 6, at - 1, -4), VcpuEnter(at + 5, 2, 3, 6, at, -4, 2)])
        verdict = watch.verdict(at + 10, [1, 2])
        assert verdict == ("migrated" if at + 10 - 10 >= QUIET_NS else None)


def test_a_source_that_is_found_late_was_active_when_it_last_sent() -> None:
    """As by a watch that starts during a migration: its sends were seen before it was known as a source."""
    late = 2 * SILENCE_NS
    watch = MigrationWatch((SRC, DST))
    watch.saw([Transfer(late - MS, late, SRC, SRC, 9, 0, 5, 1, 1 << 20, 1, 1, 0, 0)])
    watch.missed_beginning(SRC)
    assert watch.verdict(late + QUIET_NS, (SRC, DST)) is None
    assert watch.verdict(late + SILENCE_NS, (SRC, DST)) == "lost-sight"


def wrote(at: int, socket: int, size: int = 1 << 20, tid: int = SRC) -> Transfer:
    return Transfer(at - MS, at, SRC, tid, 9, 0, socket, 3, size, MS, MS, 0, 0)


def test_the_carrier_is_where_the_fetching_thread_sends() -> None:
    """A disk that is copied moves more."""
    watch = MigrationWatch([SRC])
    watch.saw([logging(1, True), fetch(2 * MS), wrote(3 * MS, 70), wrote(3 * MS, 75, 100 << 20, tid=99), stop(4 * MS)])
    assert watch.connections == {SRC: 70}


def test_a_disk_or_a_log_is_no_carrier() -> None:
    watch = MigrationWatch([SRC])
    watch.saw([Socket(1, SRC, 9, 75, FILE, "", ""), logging(1, True), fetch(2 * MS), stop(4 * MS)])
    watch.saw([wrote(3 * MS, 75, 100 << 20, tid=99)])
    assert watch.connections == {}
    watch.saw([wrote(5 * MS, 75)])
    assert watch.connections == {SRC: 75}, "the fetching thread wrote it"


def test_opaque_is_what_leads_out_of_the_traced_processes() -> None:
    pipe = [Socket(1, SRC, 9, 70, PIPE, "", "")]
    unix = [Socket(1, SRC, 9, 71, AF_UNIX, "", "", 81)]
    tcp = [Socket(1, SRC, 9, 72, 2, "10.0.0.1:1", "10.0.0.2:2")]
    watch = MigrationWatch([SRC, DST])
    watch.saw([*pipe, *unix, *tcp, wrote(MS, 70, 9), wrote(MS, 71, 9)])
    assert watch.carriers.opaque == [], "too little to be the migration"
    watch.saw([wrote(2 * MS, inode) for inode in (70, 71, 72)])
    assert watch.carriers.opaque == pipe + unix
    watch.saw([Socket(2, DST, 9, 81, AF_UNIX, "", "", 71), Socket(2, DST, 9, 70, PIPE, "", "")])
    assert watch.carriers.opaque == [], "the other process has the other ends"


def test_a_source_that_replaces_itself_is_its_own_destination() -> None:
    """cpr-exec: the new program's slots have no logging, and its first entry is a start, not a return."""
    handed = [logging(1, True), fetch(2 * MS), Exec(3 * MS, SRC, 3 * MS - 5)]
    assert verdict([stop(1), *handed, logging(4 * MS, False)], 60_000 * MS, (SRC,)) is None
    events = [stop(1), *handed, logging(4 * MS, False), *start(9 * MS, SRC)]
    assert verdict(events, 9 * MS + QUIET_NS - 1, (SRC,)) is None
    assert verdict(events, 9 * MS + QUIET_NS, (SRC,)) == "migrated"
    state = Transfer(MS, 2 * MS, SRC, SRC, 9, 0, 90, 2, 100_000, 1, 1, 0, 0)  # its record comes after the execve
    late = [stop(1), *handed, state, logging(4 * MS, False), *start(9 * MS, SRC)]
    assert verdict(late, 9 * MS + QUIET_NS, (SRC,)) == "migrated"


@pytest.mark.parametrize("name", ["qemu-11.1-cpr-exec", "qemu-11.1-cpr-transfer"])
def test_live_updates_of_qemu_are_over_by_themselves(name: str) -> None:
    """The events as `record` received them. In the first, the state went through a file."""
    recording = read_recording(Path(__file__).parents[2] / "data" / f"{name}.rec")
    pids = tuple(target.pid for target in recording.header.targets)
    ended = next(e for e in recording.events if isinstance(e, Ending))
    events = [e for e in recording.events if not isinstance(e, Ending)]
    assert verdict(events, ended.at_ns + QUIET_NS, pids) == "migrated"
