# SPDX-License-Identifier: Apache-2.0
"""How the migration ended according to the events, and whether its guest was paused before and after.

In: a `TracedMigration`. Out: a `Result`, and two facts. Missing events never count as success. A guest that runs on
the source again is no failure by itself: savevm, a migration to a file and a pause all stop and resume a guest.

    completed   the destination's guest ran, and did not boot; or a guest ran that was loaded from a file into the same
                VM; or the VMM or the migration's driver reported it; or the guest did not resume on the source, and
                the destination answered the source's last bytes, or the source's VMM closed the connection and kept
                running
    failed      the VMM or the migration's driver reported it; or the destination's process ended, or the connection
                broke, and the source kept its guest; or something of a migration was seen, and the source's
                process ended while its guest ran, or had stopped and neither dirty logs nor state were read
    cancelled   the VMM or the migration's driver reported it
    saved       the state was seen to go to a file or into a pipe, and no destination was seen
    unknown     anything else
"""

from __future__ import annotations

import errno

from ebpf_mig.analysis import dirty_log, switchover
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.process import Process, key_of
from ebpf_mig.analysis.snapshot import SAVED_BYTES
from ebpf_mig.analysis.vcpu import Timeline
from ebpf_mig.breakdown import Result, SwitchoverKind, Transport
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import CLOSED, ENDED, FORWARDER, KEEPER, RECEIVE, SEND, Mark

_REPORTED = (Result.COMPLETED, Result.FAILED, Result.CANCELLED)
_DRIVERS = {"migrated": Result.COMPLETED, "failed": Result.FAILED, "cancelled": Result.CANCELLED}
"""Reasons of an `Ending` that state the result that the migration's driver got. In a recording without a driver,
`migrated` only means that a destination was seen to start, or, in old ones, that a lone source was silent for 2 s."""
_BROKEN = {errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}
"""What a call on a connection returns when the other end, or the way to it, is gone."""
LOCKED_NS = 100_000_000
"""A vCPU that is outside KVM_RUN for less than this when a migration begins, and was not kicked, may wait for the VMM:
QEMU sets the migration up under the lock that a vCPU needs for device access.
"""
KICKED_NS = 10_000_000
"""A kick this close to the stop of a vCPU is the pause's."""


def result(case: TracedMigration) -> Result:
    """The result, as listed above. vCPU events take precedence over any report."""
    found = case.switchover
    if (found is not None and found.kind == SwitchoverKind.COMPLETED) or _runs_anew(case):
        return Result.COMPLETED
    if _replaced_in_vain(case):
        return Result.FAILED
    reported = _reported(case)
    if found is not None and found.kind == SwitchoverKind.ABORTED:
        return _of_a_resumed_guest(case, reported)
    if reported:
        return reported
    if case.source is None:
        return Result.COMPLETED if _started(case.destination) and not booted(case) else Result.UNKNOWN
    if _saved(case):
        return Result.SAVED
    if found is None and (paused_before(case) or stopped_early(case)):
        return _of_a_paused_guest(case)
    if found is not None and _died_with_its_state(case, found.stop):
        return Result.FAILED
    if found is not None and _handed_over(case, found.stop):
        return Result.COMPLETED
    if found is None and not case.nothing_seen and (_other_side_is_gone(case) or _died_running(case)):
        return Result.FAILED
    return Result.UNKNOWN


def _of_a_resumed_guest(case: TracedMigration, reported: Result | None) -> Result:
    """The process that stopped its guest ran one again."""
    if reported in (Result.FAILED, Result.CANCELLED):
        return reported
    if case.loaded_again:
        return Result.COMPLETED
    if _saved(case):
        return Result.SAVED
    return Result.FAILED if _other_side_is_gone(case) else Result.UNKNOWN


def _runs_anew(case: TracedMigration) -> bool:
    """Whether a process that replaced itself by execve(2) ran the guest again; its stop may have been missed."""
    return case.destination is not None and case.destination.born is not None and _started(case.destination)


def _of_a_paused_guest(case: TracedMigration) -> Result:
    """No vCPU stopped for the migration; its destination may be set going at any time later."""
    together = case.material.ended_together(case.source, case.destination)
    gone = _stream_broke(case) or (_destination_ended(case) and not together)
    taken = _handed_over(case, case.since) or (_loaded_there(case) and not gone and not _shut_down(case))
    if _started(case.destination) or (not _runs(case.source) and taken):
        return Result.COMPLETED
    return Result.FAILED if gone else Result.UNKNOWN


def stopped_early(case: TracedMigration) -> bool | None:
    """Whether the guest had stopped before the switchover, and not for it; None if unknown.

    If tracing began late, that stop was not seen: then no vCPU ran at all while dirty logs were fetched.
    """
    if case.source is None or _absent(case, "vcpu"):
        return None
    if case.stopped_early:
        return True
    never = _ran(case, case.source) is False and not paused_before(case) and case.switchover is None
    return never and bool(case.bursts) and not case.live_update


def paused_before(case: TracedMigration) -> bool | None:
    """Whether no vCPU of the source ran when the migration began; None if unknown."""
    source = case.source
    if source is None or _absent(case, "vcpu"):
        return None
    if case.snapshot is not None and case.snapshot.background:
        return False  # it stops the guest by itself, and does not write a paused one in this way
    began = case.began if case.began is not None else dirty_log.switched_on(source, None)
    if began is None:
        return None
    if case.switchover is not None and case.switchover.dark < began:
        return False  # a snapshot stops the guest by itself
    if not source.vcpus:
        ran = _ran(case, source)
        return None if ran is None else not ran
    return all(_was_paused(source, line, began, case.material.header.begin_ns) for line in source.vcpus.values())


def _ran(case: TracedMigration, source: Process) -> bool | None:
    """Whether a vCPU ran while it was traced; None if unknown.

    A vCPU that never leaves KVM_RUN for long has no event, only its account at the end. Without an end, no account was
    read.
    """
    if source.vcpus or source.states or source.spans:
        return True
    return None if case.material.ending is None or case.material.truncated else False


def _was_paused(source: Process, line: Timeline, at: int, since: int) -> bool:
    """Whether a vCPU was out at that instant, and not only waiting for a lock. `since`: begin of the recording."""
    gap = line.covering(at)
    if gap is None:
        return False
    if switchover.was_to_run(source, line, at, at):
        return False  # a VMM does not run a vCPU that is paused: this one waited for a lock or a CPU
    left = gap.begin or since
    if gap.end is None or left <= at - LOCKED_NS:
        return True
    return any(left - KICKED_NS <= kick.at_ns <= left + KICKED_NS for kick in source.kicks_by_tid.get(line.tid, ()))


def paused_after(case: TracedMigration) -> bool | None:
    """Whether no vCPU ran on either side when tracing ended; None if unknown, or if neither side has the guest."""
    if _absent(case, "vcpu"):
        return None
    source, destination, found = case.source, case.destination, case.switchover
    if found is None and paused_before(case) and _runs(source):
        return False
    if _started(destination) or (found is not None and found.kind != SwitchoverKind.STOPPED):
        return False
    ended = result(case)
    if ended not in (Result.COMPLETED, Result.SAVED) or (destination is None and ended != Result.SAVED):
        return None
    known = source is not None and bool(source.vcpus or source.states)
    runs = known and not (source and source.gaps and source.gaps[-1][1] is None)
    return not runs


def _runs(source: Process | None) -> bool:
    """Whether its guest was last seen to run again after a stop."""
    return source is not None and bool(source.gaps) and source.gaps[-1][1] is not None


def _absent(case: TracedMigration, signal: str) -> bool:
    return case.material.header.attach.get(signal, "absent").startswith("absent")


def _started(destination: Process | None) -> bool:
    """Whether its guest ran for the first time after its vCPU state was loaded."""
    if destination is None:
        return False
    firsts = [line.first_run for line in destination.vcpus.values() if line.first_run is not None]
    return bool(firsts)


def booted(case: TracedMigration) -> bool:
    """Whether the process that was traced alone ran a guest whose state did not come in over a connection."""
    alone = case.destination if case.source is None else None
    if alone is None or alone.born is not None or not _started(alone):
        return False
    return not (alone.was_loaded or case.restored is not None or case.material.absent("socket"))


def _reported(case: TracedMigration) -> Result | None:
    """The result that the VMM reported last, or that the migration's driver reported; None without a report."""
    ending, marks = case.material.ending, case.material.marks
    driven = _DRIVERS.get(ending.reason if ending else "")
    # The driver knows that it cancelled the migration, even if the VMM then reports a failure (QEMU 7.2, 10.0).
    if driven == Result.CANCELLED:
        return driven
    reported = _reported_by_vmm(marks)
    if reported:
        return reported
    was_driven = any(not mark.name.startswith("session.") or mark.name == "session.trigger" for mark in marks)
    return driven if was_driven or driven == Result.FAILED else None


def _reported_by_vmm(marks: list[Mark]) -> Result | None:
    """The last outcome that a VMM reported."""
    for mark in reversed(marks):
        _, _, word = mark.name.rpartition(".")
        if ".MIGRATION." in f".{mark.name}" and word in _REPORTED:
            return Result(word)
    return None


def _handed_over(case: TracedMigration, stop: int) -> bool:
    """Whether the other end answered after the source's last bytes, or the source's VMM closed the connection.

    QEMU's destination reports completion on the return path (`migrate_send_rp_shut`, migration/migration.c). Cloud
    Hypervisor's destination answers the completion request. Without a return path, QEMU closes the connection after a
    success and leaves the guest stopped. To cancel or after an error, it shuts the connection down before it closes it
    (`qemu_file_shutdown` in `migrate_fd_cancel`).
    """
    last = max((t.end_ns for t in case.sends), default=None)
    if last is None:
        return False
    answers = [t for t in case.source_transfers if t.direction == RECEIVE and t.bytes and t.end_ns > max(last, stop)]
    closed = [mark for mark in case.material.marks if mark.name == CLOSED and mark.value in case.channels.source]
    return bool(answers or (closed and not _shut_down(case)))


def _loaded_there(case: TracedMigration) -> bool:
    """Whether the destination wrote its vCPUs' state after the source's last send.

    It does so once all state has come (QEMU: `cpu_synchronize_all_post_init` at the end of `qemu_loadvm_state`), but
    also when the stream ends too early, before it gives up.
    """
    last = max((t.begin_ns for t in case.sends), default=None)
    if last is None or case.destination is None:
        return False
    return any(i.begin_ns >= last and kvm.name_of(i.cmd) in kvm.VCPU_STATE_SET for i in case.destination.ioctls)


def _saved(case: TracedMigration) -> bool:
    """Whether the source's state was read and went to a file, or into a pipe that no process is known to pass on.

    A migration over something that is not seen (RDMA, io_uring) is none, whatever other threads write meanwhile: a
    console into a pipe, or a disk that is flushed at the stop. So the thread that fetches or stops the guest has to
    write to the pipe.
    """
    source = case.source
    if source is None or _started(case.destination):
        return False
    if not any(kvm.name_of(i.cmd) in kvm.VCPU_STATE_GET for i in source.other_ioctls):
        return False
    if case.snapshot is not None and not case.snapshot.background:
        return True
    if case.channels.transport == Transport.PIPE and (_passed_on(case) or case.channels.ends):
        return False
    if case.channels.transport == Transport.PIPE:
        drivers = source.fetchers | ({case.switchover.stopper} if case.switchover else set())
        return sum(t.bytes for t in case.sends if not drivers or t.tid in drivers) >= SAVED_BYTES
    return case.channels.transport == Transport.FILE and sum(t.bytes for t in case.sends) >= SAVED_BYTES


def kept(case: TracedMigration) -> bool:
    """Whether a state that was saved is in a file. Behind a pipe there may be anything, also another host."""
    if case.channels.transport != Transport.PIPE:
        return True
    return any(mark.name == KEEPER and mark.value in case.channels.source for mark in case.material.marks)


def _passed_on(case: TracedMigration) -> bool:
    """Whether a process with sockets of its own reads the source's carrier."""
    carriers = case.channels.source
    return any(mark.name == FORWARDER and mark.value in carriers for mark in case.material.marks)


def _replaced_in_vain(case: TracedMigration) -> bool:
    """The process called execve(2) and ended before its new program ran the guest."""
    source, ending = case.source, case.material.ending
    of_source = [p for p in case.material.processes.values() if source is not None and p.pid == source.pid]
    if not any(process.execs for process in of_source) or any(_started(p) for p in of_source if p is not source):
        return False
    gone = case.material.ended_ns(of_source[0].pid) is not None
    return gone or (ending is not None and ending.reason == "target-died")


def _died_running(case: TracedMigration) -> bool:
    """Whether tracing ended because the source's process ended while its guest ran."""
    ending, source = case.material.ending, case.source
    return ending is not None and ending.reason == "target-died" and source is not None and bool(source.vcpus)


def _died_with_its_state(case: TracedMigration, stop: int) -> bool:
    """Whether the source's process ended after its guest had stopped, and had read neither its dirty logs nor its
    vCPUs' state since.
    """
    ending, source = case.material.ending, case.source
    if ending is None or source is None or ending.lost or _absent(case, "state") or _absent(case, "dirty-log"):
        return False
    ended = case.material.ended_ns(source.pid) is not None
    late = [i for i in source.ioctls if i.end_ns >= stop]
    read = any(kvm.is_dirty_log(i.cmd) or kvm.name_of(i.cmd) in kvm.VCPU_STATE_GET for i in late)
    return (ended or ending.reason == "target-died") and not read


def _shut_down(case: TracedMigration) -> bool:
    """Whether the source itself shut its main connection down. QEMU does so with further ones after a success, too."""
    source = case.source
    if source is None:
        return False
    main = {key_of(t) for t in case.sends if t.tid in source.fetchers} or case.channels.source
    own = [error for error in source.socket_errors if error.ret == 0 and error.direction == SEND]
    return any(error.socket in main and error.at_ns >= case.since for error in own)


def _destination_ended(case: TracedMigration) -> bool:
    """Whether the traced destination's process ended before its guest ran. Where no process is known to be it, any."""
    gone = {mark.pid for mark in case.material.marks if mark.name == ENDED}
    if case.destination is not None:
        return case.destination.pid in gone
    others = gone - ({case.source.pid} if case.source else set())
    return bool(others) and (case.source is None or case.source.pid not in gone)


def _other_side_is_gone(case: TracedMigration) -> bool:
    return _destination_ended(case) or _stream_broke(case)


def _stream_broke(case: TracedMigration) -> bool:
    """Whether the connection broke before the source itself shut it down, as QEMU does to cancel a migration.

    Where the shutdown would not be seen, EPIPE and a closed connection say nothing: the shutdown causes both.
    """
    source = case.source
    if source is None:
        return False
    seen = case.material.traced("shutdown") or case.material.header.attach.get("socket") == "tracepoint"
    for error in source.socket_errors:
        if error.socket not in case.channels.source or error.at_ns < case.since:
            continue
        if error.ret == 0 and error.direction == SEND:
            return False
        if -error.ret in _BROKEN or (seen and error.ret in (0, -errno.EPIPE)):
            return True
    return False
