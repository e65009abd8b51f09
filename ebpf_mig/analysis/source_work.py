# SPDX-License-Identifier: Apache-2.0
"""The source's work between its last vCPU's stop and the last byte that the destination needs, labelled by kind.

In: its dirty-log ioctls, sends, replies and other KVM ioctls after the stop. Out: labelled intervals that may
overlap; `phases.py` turns them into a partition.

No order of the steps is assumed. QEMU up to 9.2 reads the vCPUs' registers before it fetches; from 10.0 on it reads
them after it has sent the memory. Cloud Hypervisor from v53 on fetches once more after it has saved the state.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ebpf_mig.analysis.dirty_log import Burst, is_clear
from ebpf_mig.analysis.process import Process, begun, key_of
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import RECEIVE, SEND, Ioctl, Kick, OffCpu, Transfer

CLUSTER_NS = 1_000_000
"""Without replies to separate messages, sends further apart than this belong to different messages."""
REQUEST_NS = 1_000_000
"""A vCPU's thread that reads its registers this long after it was asked for them is waited for."""
PAGE = 4096

FETCH, CLEAR, MEMORY, STATE, SAVE, REPLY = range(6)
"""Labels of intervals. Where intervals overlap, the lower label has priority."""

Interval = tuple[int, int, int]
"""Begin, end, label."""


@dataclass(frozen=True, slots=True)
class Work:
    """The source's work as labelled intervals."""

    intervals: list[Interval]
    state_from: int | None
    """Begin of the first send of state after the stop."""
    memory: list[Transfer]
    """The sends that carried the final pages."""
    quiet_until: int
    """End of the last ioctl of the stop itself (clock reads, device stops)."""
    fetched: int | None
    """Begin of the first fetch after the stop."""
    coalesced: int
    """The number of batches of sends during which state was saved."""
    preempted: Sequence[tuple[int, int]] = ()
    """Stretches in which a sending thread was preempted, in order."""


@dataclass(frozen=True, slots=True)
class Activity:
    """All of the source's activity after its last vCPU's stop, in order. `observe` collects it once."""

    stop: int
    bursts: Sequence[Burst]
    """Its dirty-log fetches."""
    sends: Sequence[Transfer]
    """On the migration's sockets."""
    replies: Sequence[Transfer]
    """Receives by the sending threads, in order of their end."""
    ioctls: Sequence[Ioctl]
    """Its KVM ioctls, without those on the dirty log."""
    waits: Sequence[OffCpu]
    """Its threads' times off the CPU."""
    kicks: Sequence[Kick] = ()
    """Signals to its vCPUs' threads."""

    def work(self, until: int) -> Work:
        """The activity that began before `until`, by kind. A first call finds where the source's part ended."""
        bursts = [b for b in self.bursts if b.begin < until]
        fetched = min((burst.begin for burst in bursts if burst.fetched), default=None)
        sends = [t for t in self.sends if t.begin_ns < until and not _announces(t, self.stop, fetched)]
        others = [i for i in self.ioctls if i.begin_ns < until]
        known = [*(b.begin for b in bursts), *(max(self.stop, t.begin_ns) for t in sends)]
        saves = _saves(others, known)
        carries_state = _state_sends(bursts, sends, self.replies, saves)
        intervals = [(i.begin_ns, i.end_ns, CLEAR if is_clear(i) else FETCH) for burst in bursts for i in burst.ioctls]
        intervals += [(i.begin_ns, i.end_ns, SAVE) for i in saves]
        intervals += _request(self.kicks, saves, min(known, default=until))
        intervals += [(max(t.begin_ns, t.end_ns - t.in_call_ns), t.end_ns, REPLY) for t in self.replies]
        coalesced = 0
        state_from: list[int] = []
        for send, state in zip(sends, carries_state, strict=True):
            pieces = [(send.begin_ns, send.end_ns, STATE if state else MEMORY)]
            if not state and send.calls > 1:
                pieces = _split_batch(send, saves)
                coalesced += len(pieces) - 1
            intervals += pieces
            state_from += [begin for begin, _, label in pieces if label == STATE]
        return Work(
            intervals=intervals,
            state_from=min(state_from, default=None),
            memory=[t for t, state in zip(sends, carries_state, strict=True) if not state],
            quiet_until=max(
                (i.end_ns for i in others if not saves or i.begin_ns < saves[0].begin_ns), default=self.stop
            ),
            fetched=fetched,
            coalesced=coalesced,
            preempted=_preempted(self.waits, {send.tid for send in sends}, self.stop),
        )


def observe(source: Process, stop: int, bursts: Sequence[Burst], transfers: Sequence[Transfer]) -> Activity:
    """The activity of `source` from `stop` on.

    `bursts` are its fetches. `transfers` are its transfers on the migration's sockets, in both directions.
    """
    late = [t for t in transfers if t.end_ns > stop]
    answers = [t for t in late if t.direction == RECEIVE]
    senders = {(t.tid, t.socket or key_of(t)) for t in transfers if t.direction == SEND} if answers else set()
    return Activity(
        stop=stop,
        bursts=[burst for burst in bursts if burst.begin >= stop],
        sends=[t for t in late if t.direction == SEND],
        replies=sorted((t for t in answers if (t.tid, key_of(t)) in senders), key=lambda reply: reply.end_ns),
        ioctls=begun(source.other_ioctls, stop),
        waits=source.off_cpu,
        kicks=[kick for kick in source.kicks if kick.at_ns >= stop],
    )


def _preempted(waits: Sequence[OffCpu], tids: Collection[int], since: int) -> list[tuple[int, int]]:
    """When one of the threads was preempted. If several overlap, the first counts."""
    found: list[tuple[int, int]] = []
    for wait in waits:
        if wait.preempted and wait.tid in tids and wait.end_ns > since and (not found or wait.begin_ns >= found[-1][1]):
            found.append((wait.begin_ns, wait.end_ns))
    return found


def is_vcpu_read(ioctl: Ioctl) -> bool:
    """Whether the ioctl reads a vCPU's registers. On a stopped VM it saves state."""
    return kvm.name_of(ioctl.cmd) in kvm.VCPU_STATE_GET


def _announces(send: Transfer, stop: int, fetched: int | None) -> bool:
    """Whether the send announces the switchover: a few bytes between stop and final fetch (QEMU 10.0 and later)."""
    return fetched is not None and stop <= send.begin_ns < fetched and send.bytes < PAGE


def _saves(others: Sequence[Ioctl], recognised: Sequence[int]) -> list[Ioctl]:
    """KVM ioctls that save state: all from the first read of registers on, or from the first fetch or send on.

    Earlier ones belong to the stop itself. QEMU's run-state handlers read clock, PIT and TSC and remove ioeventfds.
    Cloud Hypervisor notifies the guest of the pause (KVMCLOCK_CTRL).
    """
    reads = [i.begin_ns for i in others if is_vcpu_read(i)]
    starts = [*recognised, *reads[:1]]
    return [i for i in others if i.begin_ns >= min(starts)] if starts else []


def _request(kicks: Sequence[Kick], saves: Sequence[Ioctl], since: int) -> list[Interval]:
    """The wait for the first vCPU's thread to read its registers: it was asked to after the first fetch or send.

    `do_run_on_cpu()` of QEMU (cpu-common.c) queues the work and kicks the thread. A short wait is left out: it belongs
    to what came before.
    """
    read = next((i for i in saves if is_vcpu_read(i)), None)
    if read is None:
        return []
    asked = [k.at_ns for k in kicks if k.target_tid == read.tid and since <= k.at_ns <= read.begin_ns - REQUEST_NS]
    return [(asked[-1], read.begin_ns, SAVE)] if asked else []


def _split_batch(send: Transfer, saves: Sequence[Ioctl]) -> list[Interval]:
    """The parts of a batch of calls. If state was saved during it, it carried memory before that and state after."""
    begins = [i.begin_ns for i in saves]
    first, until = bisect_left(begins, send.begin_ns), bisect_left(begins, send.end_ns)
    within = [i for i in saves[first:until] if i.end_ns <= send.end_ns]
    if not within:
        return [(send.begin_ns, send.end_ns, MEMORY)]
    done = max(i.end_ns for i in within)
    return [(send.begin_ns, within[0].begin_ns, MEMORY), (done, send.end_ns, STATE)]


def _state_sends(
    bursts: Sequence[Burst], sends: Sequence[Transfer], replies: Sequence[Transfer], saves: Sequence[Ioctl]
) -> list[bool]:
    """For each send: whether it carries state."""
    fetches = [burst for burst in bursts if burst.fetched]
    begins = [i.begin_ns for i in saves]
    if fetches:
        at = bisect_left(begins, fetches[0].end)
    elif sends and begins:
        at = bisect_left(begins, sends[0].begin_ns)
        if at == len(begins):
            # No state is saved after the first send, so all state was saved before it: no memory is left to send.
            return [True] * len(sends)
    else:
        at = len(begins)
    if at == len(begins):
        return [False] * len(sends)
    state_from = begins[at]
    result = [send.begin_ns >= state_from for send in sends]
    later = [burst.begin for burst in fetches if burst.begin >= state_from]
    for index, fetch in enumerate(later):
        end = later[index + 1] if index + 1 < len(later) else None
        nth = bisect_left(begins, fetch)
        if nth < len(begins) and (end is None or begins[nth] < end):
            end = begins[nth]
        _memory_after(fetch, end, sends, replies, result)
    return result


def _memory_after(
    fetch: int, end: int | None, sends: Sequence[Transfer], replies: Sequence[Transfer], result: list[bool]
) -> None:
    """Marks the first message after a later fetch as memory, if it looks like pages.

    Cloud Hypervisor sends the pages that this fetch found, if any, and then the state. Each message gets a reply.
    Messages with pages are whole multiples of the page size; its other messages are not.
    """
    first = bisect_left(sends, fetch, key=lambda send: send.begin_ns)
    until = bisect_left(sends, end, key=lambda send: send.begin_ns) if end is not None else len(sends)
    last = first
    while last + 1 < until:
        here, following = sends[last], sends[last + 1]
        reply = bisect_left(replies, here.end_ns, key=lambda reply: reply.end_ns)
        if reply < len(replies) and replies[reply].end_ns <= following.begin_ns:
            break
        if not replies and following.begin_ns - here.end_ns > CLUSTER_NS:
            break
        last += 1
    message = range(first, min(last + 1, until))
    if any(sends[i].bytes and sends[i].bytes % PAGE == 0 for i in message):
        for i in message:
            result[i] = False
