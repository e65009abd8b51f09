# SPDX-License-Identifier: Apache-2.0
"""Which signs become migrations, and which processes belong together: synthetic events, a synthetic clock."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from ebpf_mig.analysis.reception import LOADED_BYTES
from ebpf_mig.exporter import tracker as module
from ebpf_mig.exporter.track import PROBATION_NS, UNPROVEN_NS
from ebpf_mig.exporter.tracker import Ended, Tracks
from ebpf_mig.linux import descriptors, kvm
from ebpf_mig.linux.descriptors import PLACED
from ebpf_mig.recording.events import (
    FILE,
    NEIGHBOUR,
    PIPE,
    AnyEvent,
    CpuSteal,
    Exec,
    Ioctl,
    Mark,
    OffCpu,
    Socket,
    Transfer,
    VcpuEnter,
    VcpuExit,
)
from ebpf_mig.recording.kinds import KINDS
from ebpf_mig.tracing.lifecycle import QUIET_NS, SILENCE_NS
from ebpf_mig.tracing.witness import Witness
from tests.companion import Companion

SOURCE, DESTINATION, OTHER = 10, 20, 30
MS, S = 10**6, 10**9
SET_REGS = 0x4090AE82
GET_REGS = 0x8090AE81


def logging(pid: int, at: int, on: bool = True, size: int = 1 << 30) -> Ioctl:
    return Ioctl(at, at + 1, pid, pid, 5, kvm.SET_USER_MEMORY_REGION, 0, 0, int(on), 0, size)


def fetch(pid: int, at: int, slot: int) -> Ioctl:
    return Ioctl(at, at + 1, pid, pid, 5, kvm.GET_DIRTY_LOG, 0, slot)


def restore(pid: int, at: int) -> Ioctl:
    return Ioctl(at, at + 1, pid, pid, 6, SET_REGS, 0)


def run(pid: int, at: int) -> VcpuEnter:
    return VcpuEnter(at, pid, pid + 1, 6, 0, 0, 1)


def stop(pid: int, at: int) -> VcpuExit:
    return VcpuExit(at, pid, pid + 1, 6, at - 1, -4)


def move(pid: int, at: int, direction: int, size: int) -> Transfer:
    return Transfer(at, at + 1, pid, pid, 7, direction, pid * 100, 1, size, 1, 1, 0, 0)


def tcp(pid: int, local: str, remote: str) -> Socket:
    return Socket(1, pid, 7, pid * 100, 2, local, remote)


def unix(pid: int, peer: int) -> Socket:
    return Socket(1, pid, 7, pid * 100, 1, "", "", peer)


def ended(tracks: Tracks, now: int, alive: Sequence[int] = (SOURCE, DESTINATION, OTHER)) -> list[Ended]:
    return tracks.over(now, lambda pid: pid in alive)


def begun(*, fresh: Sequence[int] = (DESTINATION,), pids: Sequence[int] = (SOURCE, DESTINATION)) -> Tracks:
    tracks = Tracks()
    for pid in pids:
        tracks.begin(pid, "thread", 0, fresh=pid in fresh)
    return tracks


def test_a_sign_without_consequence_means_nothing() -> None:
    tracks = begun(pids=[SOURCE])
    tracks.saw([run(SOURCE, MS), logging(SOURCE, 2 * MS, size=65536), fetch(SOURCE, 3 * MS, 1)], 3 * MS)
    assert ended(tracks, PROBATION_NS - 1) == []
    (end,) = ended(tracks, PROBATION_NS)
    assert end.reason == "nothing" and end.pids == (SOURCE,) and not tracks


def test_a_source_alone_ends_when_its_last_bytes_were_answered_and_it_stays_stopped() -> None:
    tracks = begun(pids=[SOURCE])
    tracks.saw([logging(SOURCE, MS)], MS)
    assert ended(tracks, 5 * PROBATION_NS) == []
    tracks.saw([stop(SOURCE, 20 * S), move(SOURCE, 20 * S + MS, 0, 500_000)], 20 * S)
    assert ended(tracks, 30 * S) == [], "no events do not mean success"
    tracks.saw([move(SOURCE, 30 * S, 1, 8)], 30 * S)
    assert ended(tracks, 31 * S) == []
    (end,) = ended(tracks, 33 * S)
    assert end.reason == "handed-over" and len(end.events) == 4


def save(pid: int, at: int) -> Ioctl:
    return Ioctl(at, at + 1, pid, pid, 6, GET_REGS, 0)


def test_a_source_of_few_slots_whose_beginning_was_missed_shows_itself_when_it_hands_over() -> None:
    acts: list[AnyEvent] = [fetch(SOURCE, MS, 0), stop(SOURCE, 3 * MS), save(SOURCE, 4 * MS)]
    acts += [move(SOURCE, 5 * MS, 0, 500_000), move(SOURCE, 6 * MS, 1, 8)]
    for left_out in (None, *acts):
        tracks = begun(pids=[SOURCE])
        tracks.saw([event for event in acts if event is not left_out], 6 * MS)
        found = [end.reason for end in ended(tracks, 4 * S)]
        expected = {None: ["handed-over"], acts[-1]: []}.get(left_out, ["nothing"])
        assert found == expected, left_out


def test_a_source_that_ends_is_just_that() -> None:
    """The source's process may end before or after the handover. The events give the result, not the end."""
    for sent in (500_000, 0):
        tracks = begun(pids=[SOURCE])
        events: list[AnyEvent] = [logging(SOURCE, MS), stop(SOURCE, 2 * MS)]
        tracks.saw(events + ([move(SOURCE, 3 * MS, 0, sent)] if sent else []), 4 * MS)
        assert [end.reason for end in ended(tracks, 5 * MS, alive=())] == ["target-died"]


def test_replies_of_a_monitor_are_no_act_of_the_migration() -> None:
    tracks = begun(pids=[SOURCE])
    tracks.saw([logging(SOURCE, MS), stop(SOURCE, S), move(SOURCE, S, 0, 500_000), move(SOURCE, S + MS, 1, 8)], S)
    for tenth in range(11, 40):
        reply = Transfer(tenth * S // 10, tenth * S // 10 + 1, SOURCE, SOURCE, 9, 0, 77, 1, 300, 1, 1, 0, 0)
        tracks.saw([reply], tenth * S // 10)
        done = ended(tracks, tenth * S // 10)
        if done:
            break
    assert [end.reason for end in done] == ["handed-over"] and tenth == 31


def test_a_destination_that_migrates_on_at_once_begins_another_migration() -> None:
    """A to B to C: B's guest runs for a moment, then B logs dirty memory itself."""
    tracks = begun(pids=[SOURCE, DESTINATION, OTHER], fresh=[DESTINATION, OTHER])
    link = [tcp(SOURCE, "1.1.1.1:1", "1.1.1.1:2"), tcp(DESTINATION, "1.1.1.1:2", "1.1.1.1:1")]
    tracks.saw([logging(SOURCE, MS), *link], MS)
    first = [stop(SOURCE, 2 * MS), restore(DESTINATION, 3 * MS), run(DESTINATION, 4 * MS)]
    tracks.saw([*first, logging(DESTINATION, 5 * MS), stop(SOURCE, 5 * MS)], 5 * MS)
    (end,) = ended(tracks, 5 * MS)
    assert set(end.pids) == {SOURCE, DESTINATION} and end.reason == "migrated"
    assert logging(DESTINATION, 5 * MS) not in end.events and stop(SOURCE, 5 * MS) in end.events
    assert SOURCE not in tracks and DESTINATION in tracks
    onward = [
        Socket(6 * MS, DESTINATION, 8, 2001, 2, "1.1.1.1:3", "1.1.1.1:4"),
        tcp(OTHER, "1.1.1.1:4", "1.1.1.1:3"),
    ]
    tracks.saw([*onward, stop(DESTINATION, 7 * MS), restore(OTHER, 8 * MS), run(OTHER, 9 * MS)], 9 * MS)
    (end,) = ended(tracks, S)
    assert set(end.pids) == {DESTINATION, OTHER} and end.reason == "migrated"
    assert logging(DESTINATION, 5 * MS) in end.events and logging(SOURCE, MS) not in end.events


def at(event: Socket, ms: int) -> Socket:
    return replace(event, at_ns=ms * MS)


@pytest.mark.parametrize("first", [1, 5, 8, 11, 15])
def test_a_chain_that_is_read_late_is_two_migrations(first: int) -> None:
    """A busy machine: all of A to B to C is read in two batches, or at once. C is no part of the first migration."""
    tracks = begun(pids=[SOURCE, DESTINATION, OTHER], fresh=[DESTINATION, OTHER])
    events = [
        at(tcp(SOURCE, "1.1.1.1:1", "1.1.1.1:2"), 1),
        at(tcp(DESTINATION, "1.1.1.1:2", "1.1.1.1:1"), 1),
        logging(SOURCE, 2 * MS),
        stop(SOURCE, 3 * MS),
        restore(DESTINATION, 4 * MS),
        run(DESTINATION, 5 * MS),
        logging(SOURCE, 6 * MS, on=False),
        at(tcp(DESTINATION, "1.1.1.1:3", "1.1.1.1:4"), 7),
        at(tcp(OTHER, "1.1.1.1:4", "1.1.1.1:3"), 7),
        move(OTHER, 8 * MS, 1, 1000),
        logging(DESTINATION, 9 * MS),
        stop(DESTINATION, 10 * MS),
        restore(OTHER, 11 * MS),
        run(OTHER, 12 * MS),
        logging(DESTINATION, 13 * MS, on=False),
    ]
    tracks.saw(events[:first], 13 * MS)
    tracks.saw(events[first:], 13 * MS)
    one, two = ended(tracks, S)
    assert (set(one.pids), one.reason) == ({SOURCE, DESTINATION}, "migrated")
    assert (set(two.pids), two.reason) == ({DESTINATION, OTHER}, "logging-ended")
    assert run(OTHER, 12 * MS) in two.events and stop(SOURCE, 3 * MS) in one.events


@pytest.mark.parametrize("first", [1, 4, 6, 9])
def test_a_retry_that_is_read_late_is_a_try_of_its_own(first: int) -> None:
    tracks = begun(pids=[SOURCE, DESTINATION, OTHER], fresh=[DESTINATION, OTHER])
    events = [
        at(tcp(SOURCE, "1.1.1.1:1", "1.1.1.1:2"), 1),
        at(tcp(DESTINATION, "1.1.1.1:2", "1.1.1.1:1"), 1),
        logging(SOURCE, 2 * MS),
        logging(SOURCE, 3 * MS, on=False),
        at(tcp(SOURCE, "1.1.1.1:3", "1.1.1.1:4"), 4),
        at(tcp(OTHER, "1.1.1.1:4", "1.1.1.1:3"), 4),
        logging(SOURCE, 5 * MS),
        stop(SOURCE, 6 * MS),
        restore(OTHER, 7 * MS),
        run(OTHER, 8 * MS),
    ]
    tracks.saw(events[:first], 8 * MS)
    tracks.saw(events[first:], 8 * MS)
    one, two = ended(tracks, S)
    assert (set(one.pids), one.reason) == ({SOURCE, DESTINATION}, "logging-ended")
    assert set(two.pids) == {SOURCE, OTHER} and two.reason == "migrated"


def test_a_destination_that_migrates_on_before_its_guest_has_run() -> None:
    """Its manager does not wait for that. The first run then belongs to both migrations."""
    entered = VcpuEnter(4 * MS, DESTINATION, 21, 6, 0, 0, 1)
    at_once = [entered, VcpuExit(4 * MS + 9, DESTINATION, 21, 6, 4 * MS, -4)]
    preempted = [entered, VcpuExit(9 * MS // 2 + MS, DESTINATION, 21, 6, 4 * MS, -4, MS)]
    for before in ([], at_once, preempted):
        tracks = begun()
        link = [tcp(SOURCE, "1.1.1.1:1", "1.1.1.1:2"), tcp(DESTINATION, "1.1.1.1:2", "1.1.1.1:1")]
        first = [logging(SOURCE, MS), *link, stop(SOURCE, 2 * MS), restore(DESTINATION, 3 * MS), *before]
        tracks.saw([*first, logging(DESTINATION, 5 * MS)], 5 * MS)
        assert ended(tracks, 6 * MS) == []
        began = run(DESTINATION, 7 * MS)
        tracks.saw([began, stop(DESTINATION, 8 * MS), stop(SOURCE, 8 * MS)], 8 * MS)
        (end,) = ended(tracks, 8 * MS)
        assert set(end.pids) == {SOURCE, DESTINATION} and end.reason == "migrated"
        assert began in end.events and stop(DESTINATION, 8 * MS) not in end.events
        assert stop(SOURCE, 8 * MS) in end.events
        assert tracks.pids == [DESTINATION]
    tracks = begun()
    tracks.saw([*first, logging(DESTINATION, 5 * MS)], 5 * MS)
    (end,) = ended(tracks, 5 * MS + QUIET_NS)
    assert set(end.pids) == {SOURCE, DESTINATION}, "it is not waited for for long"


def test_a_connection_that_was_seen_before_logging_joins_the_next_migration() -> None:
    """QEMU connects before it logs. Both ends may be read before that, in one batch with it or in the one before."""
    link = [at(tcp(SOURCE, "1.1.1.1:1", "1.1.1.1:2"), 4), at(tcp(DESTINATION, "1.1.1.1:2", "1.1.1.1:1"), 4)]
    again = logging(SOURCE, 5 * MS)
    for batches in ([[*link, again]], [link, [again]], [[again, *link]], [[link[0], again, link[1]]]):
        tracks = begun()
        tracks.saw([logging(SOURCE, MS), logging(SOURCE, 2 * MS, on=False)], 2 * MS)
        for batch in batches:
            tracks.saw(batch, 5 * MS)
        (end,) = ended(tracks, 5 * MS)
        assert end.reason == "logging-ended"
        tracks.saw([stop(SOURCE, 7 * MS), restore(DESTINATION, 8 * MS), run(DESTINATION, 9 * MS)], 9 * MS)
        (end,) = ended(tracks, S)
        assert set(end.pids) == {SOURCE, DESTINATION} and end.reason == "migrated"
        assert not tracks


def test_a_process_that_showed_a_sign_after_its_migration_is_kept() -> None:
    """It may migrate on. The connection for that may have been seen already."""
    tracks = begun(pids=[SOURCE, DESTINATION, OTHER], fresh=[DESTINATION, OTHER])
    link = [tcp(SOURCE, "1.1.1.1:1", "1.1.1.1:2"), tcp(DESTINATION, "1.1.1.1:2", "1.1.1.1:1")]
    tracks.saw([logging(SOURCE, MS), *link, stop(SOURCE, 2 * MS), restore(DESTINATION, 3 * MS)], 3 * MS)
    tracks.saw([run(DESTINATION, 4 * MS)], 4 * MS)
    tracks.saw([Socket(300 * MS, DESTINATION, 8, 2001, 2, "1.1.1.1:3", "1.1.1.1:4")], 300 * MS)
    (end,) = ended(tracks, 4 * MS + QUIET_NS)
    assert set(end.pids) == {SOURCE, DESTINATION} and end.over and end.last_ns == 4 * MS
    tracks.keep(DESTINATION, end, "connect", 305 * MS)
    assert DESTINATION in tracks and SOURCE not in tracks
    tracks.saw([logging(DESTINATION, 306 * MS), tcp(OTHER, "1.1.1.1:4", "1.1.1.1:3")], 306 * MS)
    tracks.saw([stop(DESTINATION, 307 * MS), restore(OTHER, 308 * MS), run(OTHER, 309 * MS)], 309 * MS)
    (end,) = ended(tracks, S)
    assert set(end.pids) == {DESTINATION, OTHER} and end.reason == "migrated"


def test_each_try_of_a_migration_is_there() -> None:
    tracks = begun(pids=[SOURCE])
    tries = [logging(SOURCE, MS), logging(SOURCE, 2 * MS, on=False), logging(SOURCE, 3 * MS)]
    tracks.saw([*tries, logging(SOURCE, 4 * MS, on=False), logging(SOURCE, 5 * MS)], 5 * MS)
    found = ended(tracks, 5 * MS)
    assert [(end.reason, len(end.events), end.begin_ns, end.end_ns) for end in found] == [
        ("logging-ended", 2, 0, 3 * MS),
        ("logging-ended", 2, 3 * MS, 5 * MS),
    ]
    assert SOURCE in tracks


def test_a_destination_alone_is_one_that_was_loaded_and_received() -> None:
    for received, reason in ((200_000, "migrated"), (3000, "nothing")):
        tracks = begun(pids=[DESTINATION])
        tracks.saw([move(DESTINATION, MS, 1, received), restore(DESTINATION, 2 * MS), run(DESTINATION, 3 * MS)], 3 * MS)
        assert [end.reason for end in ended(tracks, 3 * S)] == [reason]


def test_a_running_guest_that_is_reset_is_no_destination() -> None:
    tracks = begun(pids=[SOURCE])
    tracks.saw([move(SOURCE, MS, 1, 10**9), restore(SOURCE, 2 * MS), run(SOURCE, 3 * MS)], 3 * MS)
    assert [end.reason for end in ended(tracks, 3 * S)] == ["nothing"]


def test_both_ends_of_a_connection_are_one_migration_and_a_bystander_is_not() -> None:
    pairs = [
        (tcp(SOURCE, "1.1.1.1:1", "1.1.1.1:2"), tcp(DESTINATION, "1.1.1.1:2", "1.1.1.1:1")),
        (unix(SOURCE, DESTINATION * 100), unix(DESTINATION, SOURCE * 100)),
        (unix(SOURCE, 0), unix(DESTINATION, SOURCE * 100)),
    ]
    for first, second in pairs:
        for link in ([first, second], [second, first]):
            if link == [unix(DESTINATION, SOURCE * 100), unix(SOURCE, 0)]:
                continue  # impossible: an inode is reported before it is a peer, or both sides name each other
            tracks = begun(pids=[SOURCE, DESTINATION, OTHER], fresh=[DESTINATION, OTHER])
            tracks.saw([logging(SOURCE, MS), *link], MS)
            tracks.saw([stop(SOURCE, 2 * MS), restore(DESTINATION, 3 * MS), run(DESTINATION, 4 * MS)], 4 * MS)
            found = {end.pids: end.reason for end in ended(tracks, 3 * S)}
            assert {frozenset(pids): reason for pids, reason in found.items()} == {
                frozenset({SOURCE, DESTINATION}): "migrated",
                frozenset({OTHER}): "nothing",
            }


def test_two_migrations_at_a_time_stay_apart() -> None:
    tracks = begun(pids=[SOURCE, OTHER], fresh=[])
    handed = [stop(OTHER, 2 * MS), move(OTHER, 2 * MS, 0, 1 << 20), move(OTHER, 3 * MS, 1, 9)]
    tracks.saw([logging(SOURCE, MS), logging(OTHER, MS), *handed], 2 * MS)
    (end,) = ended(tracks, 5 * S)
    assert end.pids == (OTHER,) and SOURCE in tracks and OTHER not in tracks
    assert {getattr(event, "pid", None) for event in end.events} == {OTHER}


def test_a_missed_beginning_shows_by_fetches_or_by_filling_another_vm() -> None:
    tracks = begun(pids=[SOURCE])
    tracks.saw([*(fetch(SOURCE, MS, slot) for slot in range(3)), move(SOURCE, MS, 0, 100_000)], MS)
    assert ended(tracks, 10 * S) == []
    tracks.saw([logging(SOURCE, 10 * S, on=False)], 10 * S)
    assert [end.reason for end in ended(tracks, 11 * S)] == ["logging-ended"]
    tracks = begun()
    link = [tcp(SOURCE, "1.1.1.1:1", "1.1.1.1:2"), tcp(DESTINATION, "1.1.1.1:2", "1.1.1.1:1")]
    tracks.saw([*link, move(DESTINATION, MS, 1, 2 << 20)], MS)
    assert ended(tracks, 10 * S) == []
    tracks.saw([logging(SOURCE, 10 * S, on=False)], 10 * S)
    assert [end.reason for end in ended(tracks, 11 * S, alive=[SOURCE])] == ["logging-ended"]


@pytest.mark.parametrize(("part", "kept"), [(26_214, True), (3_000, False)], ids=["256 KiB/s", "30 kB/s"])
def test_a_slow_stream_is_awaited_and_a_chat_is_not(part: int, kept: bool) -> None:
    """QEMU sends what its max-bandwidth allows in 100 ms at once. Each part is read by itself."""
    tracks = begun(pids=[SOURCE])
    times = [number * 100 * MS for number in range(100)]
    for at in times:
        tracks.saw([move(SOURCE, at, 0, part)], at)
        if done := ended(tracks, at):
            break
    assert bool(done) is not kept
    if kept:
        tracks.saw([fetch(SOURCE, at, slot) for slot in range(3)] + [move(SOURCE, at, 0, LOADED_BYTES)], at)
        assert ended(tracks, at + PROBATION_NS) == [], "a migration: it fetches dirty logs and sends"
    else:
        assert [end.reason for end in done] == ["nothing"] and at < PROBATION_NS + 200 * MS


def test_a_busy_disk_is_let_go_in_the_end() -> None:
    tracks = begun(pids=[SOURCE])
    for second in range(UNPROVEN_NS // S + 10):
        tracks.saw([move(SOURCE, second * S, 0, 10**7)], second * S)
        done = ended(tracks, second * S)
        if done:
            break
    assert [end.reason for end in done] == ["nothing"] and second * S >= UNPROVEN_NS


def test_files_are_no_sign_of_a_migration() -> None:
    """A VM that boots reads its firmware, kernel and disk, and a busy one writes its disk."""
    tracks = begun()
    files = [Socket(1, pid, 9, PLACED | pid, FILE, "", "") for pid in (SOURCE, DESTINATION)]
    read = [replace(move(DESTINATION, MS, 1, 64 << 20), socket=PLACED | DESTINATION)]
    written = [replace(move(SOURCE, MS, 0, 64 << 20), socket=PLACED | SOURCE)]
    tracks.saw([*files, *read, *written, restore(DESTINATION, 3 * MS), run(DESTINATION, 4 * MS)], 4 * MS)
    assert {end.reason for end in ended(tracks, 3 * S)} == {"nothing"}


@pytest.mark.parametrize("first", [SOURCE, DESTINATION])
def test_a_pipe_makes_one_migration_of_two_halves(first: int) -> None:
    tracks = begun()
    pipes = [Socket(1, pid, 9, 70, PIPE, "", "") for pid in (first, SOURCE + DESTINATION - first)]
    tracks.saw([logging(SOURCE, MS), *pipes], MS)
    tracks.saw([stop(SOURCE, 2 * MS), restore(DESTINATION, 3 * MS), run(DESTINATION, 4 * MS)], 4 * MS)
    (end,) = ended(tracks, 3 * S)
    assert set(end.pids) == {SOURCE, DESTINATION}


def test_silence_ends_the_wait() -> None:
    tracks = begun(pids=[SOURCE])
    tracks.saw([logging(SOURCE, MS)], MS)
    assert ended(tracks, SILENCE_NS) == []
    assert [end.reason for end in ended(tracks, SILENCE_NS + MS)] == ["lost-sight"]


def test_memory_is_bounded_and_what_was_left_out_is_counted() -> None:
    tracks = begun(pids=[SOURCE])
    tracks.saw([logging(SOURCE, MS)], MS)
    for _ in range(7):
        tracks.saw([move(SOURCE, MS, 0, 10)] * (module.KEPT_EVENTS // 6), MS)
    tracks.saw([stop(SOURCE, S), move(SOURCE, S, 1, 1), move(SOURCE, 2 * S, 0, 1)], S)
    tracks.saw([logging(SOURCE, 3 * S, on=False)], 3 * S)
    (end,) = ended(tracks, 10 * S)
    assert len(end.events) <= module.KEPT_EVENTS and end.thinned > 0
    assert end.events[0] == logging(SOURCE, MS) and end.events[-2].begin_ns == 2 * S
    assert len(end.events) + end.thinned == 1 + 7 * (module.KEPT_EVENTS // 6) + 4


def test_every_kind_of_event_of_a_process_is_kept() -> None:
    tracks = begun()
    seen: list[AnyEvent] = []
    for kind in KINDS:
        if kind.stream:
            values = {"pid": SOURCE, "tid": 11, "name": "t", "local": "", "remote": ""}
            fields = [values.get(name, 0) for name in kind.event.__struct_fields__ if name in values or name != "stack"]
            seen.append(kind.event(*fields[: len(kind.event.__struct_fields__) - len(kind.event.__struct_defaults__)]))  # type: ignore[arg-type]
    tracks.saw(seen, MS)
    (kept,) = [e for e in tracks.abandon() if SOURCE in e.pids]
    assert [replace(e, had_vm=0) if isinstance(e, Exec) else e for e in kept.events] == seen


def test_a_vm_that_replaced_itself_was_updated_though_its_stop_was_missed() -> None:
    """cpr-exec is over in milliseconds: the costly probes are attached once the new program starts."""
    tracks = begun(fresh=(), pids=(SOURCE,))
    tracks.saw([Exec(10, SOURCE, had_vm=1)], 10)
    tracks.saw([restore(SOURCE, 20), run(SOURCE, 30)], 40)
    (found,) = ended(tracks, 40 + 10**10)
    assert (found.pids, found.reason) == ((SOURCE,), "migrated")


@pytest.mark.parametrize("late", [False, True])
def test_an_execve_that_was_seen_by_the_standing_probe_only(late: bool) -> None:
    """cpr-exec starts threads first: the sign of execve may come before or after the new program's first events."""
    tracks = Tracks()
    tracks.begin(SOURCE, "thread", 20, fresh=False)
    if late:
        tracks.saw([restore(SOURCE, 30), run(SOURCE, 40)], 50)
    tracks.replaced(SOURCE, 10)
    tracks.replaced(SOURCE, 11)
    if not late:
        tracks.saw([restore(SOURCE, 30), run(SOURCE, 40)], 50)
    (found,) = ended(tracks, 50 + 10**10)
    assert (found.pids, found.reason) == ((SOURCE,), "migrated")
    assert [event for event in found.events if isinstance(event, Exec)] == [Exec(10, SOURCE, had_vm=1)]


@pytest.mark.parametrize("fresh", [True, False])
def test_a_watched_vm_that_calls_execve_had_a_vm(fresh: bool) -> None:
    """Nothing of the old program may be seen: its guest was stopped before."""
    tracks = begun(fresh=(SOURCE,) if fresh else (), pids=(SOURCE,))
    tracks.saw([Exec(10, SOURCE)], 10)
    (found,) = tracks.abandon()
    assert found.events == [Exec(10, SOURCE, had_vm=int(not fresh))]


def test_an_execve_that_was_traced_is_not_added_again() -> None:
    tracks = Tracks()
    tracks.begin(SOURCE, "thread", 20, fresh=False)
    tracks.replaced(SOURCE, 30)
    assert [found.events for found in tracks.abandon()] == [[]]


def test_a_vm_may_be_kept_on_probation_for_longer() -> None:
    tracks = begun(fresh=(), pids=(SOURCE,))
    tracks.extend(SOURCE, 10**10)
    assert ended(tracks, 10**10 - 1) == []
    assert [found.reason for found in ended(tracks, 10**10)] == ["nothing"]


def test_our_own_readings_do_not_keep_a_waiting_destination_traced() -> None:
    tracks = begun(pids=[DESTINATION])
    tracks.saw([restore(DESTINATION, 1)], 1)
    for now in range(0, PROBATION_NS + S, 20 * MS):
        tracks.saw([CpuSteal(now, DESTINATION, -1, 5), OffCpu(now, now + 1, DESTINATION, DESTINATION, 0)], now)
        if over := ended(tracks, now):
            break
    assert [one.reason for one in over] == ["nothing"] and now <= PROBATION_NS + 20 * MS


def test_who_is_beside_a_source_is_known_before_it_is_proven() -> None:
    """If the begin was missed, it is proven when it ends, and then the process beside it can be gone. That process is
    not followed before.
    """
    us = os.getpid()
    tracks = Tracks(Witness)
    tracks.begin(us, "thread", 0, fresh=False)
    with Companion(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as beside:
        assert beside.stdin is not None
        descriptor = beside.stdin.fileno()
        key = descriptors.carrier_key(us, descriptor)
        assert key is not None
        sent = replace(move(us, MS, 0, 1 << 20), socket=key, tid=9)
        tracks.saw([Socket(1, us, descriptor, key, PIPE, "", ""), sent], MS)
        assert ended(tracks, MS, [us]) == [] and tracks.hops == set()
    fetches = [replace(fetch(us, 2 * MS, slot), tid=9) for slot in range(3)]
    tracks.saw([*fetches, replace(sent, begin_ns=3 * MS, end_ns=3 * MS + 1)], 3 * MS)
    assert ended(tracks, 3 * MS, [us]) == [] and tracks.hops == {beside.pid}
    (end,) = tracks.abandon()
    marks = [event for event in end.events if isinstance(event, Mark) and event.name == NEIGHBOUR]
    assert [(mark.pid, mark.value, mark.detail) for mark in marks] == [(us, key, f"cat {beside.pid}")]
