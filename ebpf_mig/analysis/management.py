# SPDX-License-Identifier: Apache-2.0
"""When the VMM was ready and waited for its manager to tell it to go on.

In: a process, the thread that the command wakes, and a span to look at. Out: `Managed` spans, which become the phase
`management`.

The kernel shows it on the monitor's socket and in the scheduler: the thread had nothing left to do and fell asleep, a
command arrived, and the thread went on. The span ends with the first byte of the command; reading and executing it is
the VMM's own time. The VMM's log is not used.

A monitor is recognised by how it is read: QEMU takes its commands one byte at a time (monitor/monitor.c,
`monitor_can_read`, 7.2 to 11.1). No connection of data is read like that. Waits shorter than `LONG_WAIT_NS` are not
recorded, so a manager that answers faster is not seen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ebpf_mig.analysis.loading import is_clock
from ebpf_mig.analysis.process import Process, begun
from ebpf_mig.analysis.spans import FOREVER, covered
from ebpf_mig.breakdown import Side, Span
from ebpf_mig.recording.events import RECEIVE, SEND, Ioctl, OffCpu, Transfer

COMMAND_GAP_NS = 1_000_000
"""Bytes of one command follow each other faster than this."""
COMMAND_BYTES = 3
"""Fewer bytes are the end of a line, which QEMU reads after it has answered."""
LINE_NS = 20_000
"""After the end of a line it is at least this long until the next command is there; bytes of one come faster."""
WAKE_NS = 1_000_000
"""A command that finds the thread awake ends its wait if it slept until this long before: it may read its commands
itself, have woken for a timer, or have lost the CPU."""
TIDY_NS = 1_000_000
"""A thread that had nothing left to do falls asleep within this time on the CPU. QEMU needs up to 0.2 ms."""
STATE_BYTES = 4096
"""A send of this much is pages or state. QEMU 10.0 announces the switchover in fewer bytes."""


@dataclass(frozen=True, slots=True)
class Managed:
    """A wait for the manager. Instants are absolute, in ns."""

    side: Side
    begin: int
    """The thread's last act before it fell asleep; or the begin of the sleep, if it was busy in between."""
    end: int
    """The first byte of the command that ended the wait."""
    commands: int
    """How many commands came meanwhile, the last included. Others are questions, e.g. for the status."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command on a monitor."""

    socket: int
    at: int
    """Its first byte was received, ns."""
    answered: int
    """The next send on the socket began, ns; FOREVER if there was none."""


def monitors(process: Process, migration: Collection[int]) -> list[int]:
    """The sockets on which it reads commands, by key. `migration`: the migration's own."""
    found = []
    for (direction, key), transfers in process.streams.items():
        calls = sum([t.calls for t in transfers])
        if direction == RECEIVE and key not in migration and calls and calls == sum([t.bytes for t in transfers]):
            found.append(key)
    return sorted(found)


def commands(process: Process, keys: Iterable[int], since: int, until: int) -> list[Command]:
    """The commands on these monitors that arrived in [since, until), in order."""
    found: list[Command] = []
    for key in keys:
        sent = [t.begin_ns for t in process.streams.get((SEND, key), ())]
        near = begun(process.streams[RECEIVE, key], since - COMMAND_GAP_NS)
        for group in (_without_line_end(one, sent) for one in _groups(near, sent)):
            at = group[0].end_ns if group[0].calls == 1 else group[0].begin_ns
            if since <= at < until and sum(t.bytes for t in group) >= COMMAND_BYTES:
                following = bisect_left(sent, group[-1].begin_ns)
                found.append(Command(key, at, sent[following] if following < len(sent) else FOREVER))
    return sorted(found, key=lambda command: command.at)


def _groups(receives: Sequence[Transfer], sent: Sequence[int]) -> list[list[Transfer]]:
    """Receives that belong to one command: without a pause between them, and without an answer."""
    groups: list[list[Transfer]] = []
    for one in receives:
        last = groups[-1][-1] if groups else None
        answers = bisect_left(sent, one.begin_ns) - bisect_left(sent, last.begin_ns) if last else 0
        if last is not None and not answers and one.begin_ns - last.end_ns <= COMMAND_GAP_NS:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _without_line_end(group: list[Transfer], sent: Sequence[int]) -> list[Transfer]:
    """Without the end of the line before, which is read right after the answer, and maybe before the next command."""
    if bisect_left(sent, group[0].begin_ns) == bisect_left(sent, group[0].begin_ns - COMMAND_GAP_NS):
        return group
    for size in range(1, min(COMMAND_BYTES, len(group))):
        if group[size].begin_ns - group[size - 1].end_ns >= LINE_NS and sum(t.bytes for t in group[:size]) == size:
            return group[size:]
    return group


def of_source(
    source: Process, tids: Collection[int], migration: Collection[int], since: int, until: int
) -> list[Managed]:
    """The last wait, from the stop (`since`) on, of a thread that may move the migration; empty if there was none.

    The thread tells the manager something, falls asleep on a futex, and goes on after a command. It has sent nothing
    large yet: after the state it waits for the destination. If it waited for something else, with QEMU's big lock held,
    the thread that executes the command would be waiting for that lock when it wakes.
    """
    keys = monitors(source, migration)
    found = [wait for tid in sorted(tids) for wait in _of_mover(source, tid, keys, migration, since, until)]
    return [max(found, key=lambda wait: (wait.end, wait.begin))] if found else []


def _of_mover(
    source: Process, tid: int, keys: Collection[int], migration: Collection[int], since: int, until: int
) -> list[Managed]:
    if not keys:
        return []
    sends = [t for t in begun(source.transfers, since) if t.tid == tid and t.direction == SEND]
    large = next((t.begin_ns for t in sends if t.socket in migration and t.bytes >= STATE_BYTES), FOREVER)
    until = min(until, large)
    messages = [t for t in sends if t.socket in keys]
    acts = _acts(source, tid, since, keys)
    found: list[Managed] = []
    for at, message in enumerate(messages):
        if message.begin_ns >= until:
            break
        following = min(until, next((a for a in acts if a >= message.end_ns), FOREVER))
        following = min(following, messages[at + 1].begin_ns) if at + 1 < len(messages) else following
        off = _off(source, tid, message.begin_ns, following)
        came = commands(source, keys, message.end_ns, following)
        came = [c for c in came if any(_ends(source, tid, w, c) for w in off)]
        off = [w for w in off if w.preempted or any(w.begin_ns <= c.at < w.end_ns for c in came)]
        found += _wait(Side.SOURCE, message.end_ns, off, came)
    return found


def _ends(source: Process, tid: int, wait: OffCpu, command: Command) -> bool:
    """Whether the command can have ended the sleep of the thread `tid`."""
    if wait.preempted or not on_futex(wait) or not wait.begin_ns <= command.at < wait.end_ns:
        return False
    executing = {t.tid for t in source.streams.get((SEND, command.socket), ()) if t.tid != tid} or {source.pid}
    return not any(
        w.tid in executing and on_futex(w) and command.at < w.begin_ns <= wait.end_ns < w.end_ns
        for w in source.off_cpu
        if not w.preempted
    )


def of_destination(destination: Process, migration: Collection[int], since: int, until: int | None) -> list[Managed]:
    """Waits of the thread that starts the guest, between the end of the loading and its first work to start it."""
    keys = monitors(destination, migration)
    if not keys or until is None:
        return []
    starting = [i for i in begun(destination.ioctls, since) if i.begin_ns < until and is_clock(i)]
    tid = starting[0].tid if starting else destination.pid
    resumed = starting[0].begin_ns if starting else until
    came = commands(destination, keys, since, resumed)
    if not came:
        return []
    answers = {(c.socket, c.answered) for c in came}
    own: list[Ioctl | Transfer] = [i for i in destination.ioctls if i.tid == tid]
    own += [t for t in destination.transfers if (t.tid == tid and t.direction == SEND) or t.socket in migration]
    worked = [e.end_ns for e in own if e.begin_ns < resumed and (_socket(e), e.begin_ns) not in answers]
    ready = max([since, *(at for at in worked if at <= came[-1].at)])
    off = [w for w in _off(destination, tid, ready, resumed) if not w.stack or not on_futex(w)]
    return _wait(Side.DESTINATION, ready, off, [c for c in came if c.at >= ready])


def _socket(event: Ioctl | Transfer) -> int:
    return event.socket if isinstance(event, Transfer) else 0


def on_futex(wait: OffCpu) -> bool:
    """It waits for another thread. An unknown stack counts as one."""
    return not wait.stack or any("futex" in frame for frame in wait.stack)


def _acts(process: Process, tid: int, since: int, keys: Collection[int]) -> list[int]:
    """When the thread did something that the kernel shows, other than to talk on monitors (`keys`), in order."""
    found = [i.begin_ns for i in begun(process.ioctls, since) if i.tid == tid]
    found += [t.begin_ns for t in begun(process.transfers, since) if t.tid == tid and t.socket not in keys]
    return sorted([*found, *(k.at_ns for k in process.kicks if k.tid == tid and k.at_ns >= since)])


def _off(process: Process, tid: int, since: int, until: int) -> list[OffCpu]:
    """When it was off the CPU, from a begin in [since, until) on."""
    return [w for w in process.off_cpu if w.tid == tid and since <= w.begin_ns < until]


def _wait(side: Side, ready: int, off: Sequence[OffCpu], came: Sequence[Command]) -> list[Managed]:
    """From the thread's last act (`ready`) to the last command that found it asleep.

    If it used the CPU for longer before it fell asleep, that was its own work, and the wait begins with the sleep.
    """
    sleeps = [w for w in off if not w.preempted]
    woken = [c for c in came if any(w.begin_ns <= c.at <= w.end_ns + WAKE_NS for w in sleeps)]
    if not woken:
        return []
    asleep = min(w.begin_ns for w in sleeps)
    lost = [(w.begin_ns, w.end_ns) for w in off if w.preempted]
    begin = ready if asleep - ready - covered(lost, (ready, asleep)) <= TIDY_NS else asleep
    return [Managed(side, begin, woken[-1].at, sum(c.at > begin for c in woken))]


def spans(managed: Iterable[Managed]) -> list[Span]:
    """The same as spans."""
    return [(one.begin, one.end) for one in managed]
