# SPDX-License-Identifier: Apache-2.0
"""The finders that the rules are made of: each looks for one kind of evidence and returns the time that it explains.

In: `Facts`. Out: claims. A finder is made by a function that takes what differs between rules, so that a rule stays one
row of data.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from ebpf_mig.analysis.diagnosis.facts import Claim, Facts, cut, shared
from ebpf_mig.analysis.diagnosis.frames import callers, described, meaningful, plain
from ebpf_mig.analysis.long_calls import LongCall
from ebpf_mig.analysis.lost_cpu import PREEMPTED, QUEUED, RUNNABLE
from ebpf_mig.analysis.spans import merged, total
from ebpf_mig.analysis.waits import Sleep
from ebpf_mig.analysis.wire import SOCKETS_WITHOUT_WIRE, WIRELESS
from ebpf_mig.breakdown import FetchIoctl, Mode, PhaseName, Side, Span, Wire
from ebpf_mig.text import ms, size

Finder = Callable[[Facts], Iterable[Claim]]
_MOST_THREADS = 2
_SEND_PHASES = (PhaseName.MEMORY_SEND, PhaseName.STATE_SAVE, PhaseName.STATE_SEND)
WAITS_FOR_DATA = (PhaseName.HANDOVER, PhaseName.UNATTRIBUTED)
"""Phases in which the destination can only wait for the source and the network."""
EVEN = 0.7
"""In each eighth of the time, at least this share of the mean arrived: as a link carries."""
QUEUE_NS = 5_000_000
"""A link is slow if what it had to carry at one time kept it busy for this long."""
_WINDOW_SHARE = 0.5
"""The reader is slow if TCP was held up by the receive window for this share of its busy time, or if so much of the
source's sleep passed while much had arrived and was not read, or while the reader had no CPU."""


def asleep(functions: str, *phases: PhaseName, side: Side | None = None) -> Finder:
    """Waits in a stack that has one of the functions (a regular expression for a whole name)."""
    pattern = re.compile(functions, re.ASCII)

    def find(facts: Facts) -> Iterator[Claim]:
        yield from facts.own(lambda s: in_stack(pattern, s) and side in (None, s.side), *phases)

    return find


def in_stack(pattern: re.Pattern[str], sleep: Sleep) -> bool:
    """Whether one of the functions in the stack matches."""
    return any(pattern.fullmatch(plain(function)) for function in sleep.stack)


def lost_cpu(*words: str, vcpus: bool = False) -> Finder:
    """Waits of threads that could run and did not, for one of the reasons; `vcpus`: only those of two vCPUs or more."""

    def find(facts: Facts) -> Iterator[Claim]:
        if not vcpus:
            yield from _without_cpu(facts, words)
            return
        found = [claim for claim in _without_cpu(facts, words) if claim.sleep and claim.sleep.vcpu]
        if len({claim.sleep.thread for claim in found if claim.sleep}) > 1:
            yield from found

    return find


def contention(facts: Facts) -> Iterator[Claim]:
    """Waits for a CPU. Only two words prove that another thread had it; else it can be a quota or a hypervisor, too."""
    found = list(_without_cpu(facts, (PREEMPTED, QUEUED, RUNNABLE)))
    doubtful = {claim.side for claim in found if claim.sleep and claim.sleep.stack[0] == RUNNABLE}
    for claim in found:
        proven = "threads of {side} wait for a CPU that others use"
        yield claim if claim.side in doubtful else replace(claim, what=proven)


def _without_cpu(facts: Facts, words: Sequence[str]) -> Iterator[Claim]:
    """Waits of threads that could run and did not, for one of the reasons."""
    yield from facts.own(lambda s: s.stack[:1] != () and s.stack[0] in words)
    yield from _behind_the_disk(facts, words)


def sleepers(rows: Iterable[tuple[Sleep, int]]) -> list[str]:
    """`19.400 ms in 6 sleeps of NAME in synchronize_srcu (...)`, the longest first. `rows` have the ns of each."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(list)
    for sleep, ns in rows:
        sums[sleep.thread, described(sleep.stack, sleep.user)].append(ns)
    longest = sorted(sums.items(), key=lambda item: (-sum(item[1]), item[0]))[:_MOST_THREADS]
    return [
        f"{ms(sum(parts))} ms in {len(parts)} {'sleeps' if len(parts) > 1 else 'sleep'} of {thread}"
        + (_where(place) if place else ", no stack")
        for (thread, place), parts in longest
    ]


def _where(place: str) -> str:
    return f" {place}" if place.startswith("(") else f" in {place}"


def manager(facts: Facts) -> Iterator[Claim]:
    """Waits until a command came from the manager."""
    for wait in facts.breakdown.management or ():
        come = "1 command" if wait.commands == 1 else f"{wait.commands} commands"
        evidence = f"{ms(wait.duration_ns)} ms of the {wait.side}, asleep until a command arrived ({come})"
        yield Claim([(wait.begin, wait.begin + wait.duration_ns)], Side.BOTH, [evidence])


def lock(name: str) -> Finder:
    """Waits for a lock inside the ioctls of the final fetch, by the kernel's contention tracepoints."""

    def find(facts: Facts) -> Iterator[Claim]:
        waited = [(i, ns) for i in ioctls(facts) if (ns := (i.lock_wait_ns or {}).get(name, 0))]
        if waited:
            took = sum(ns for _, ns in waited)
            calls = f"{len(waited)} ioctl{'s' if len(waited) > 1 else ''}"
            evidence = f"{ms(took)} ms in {calls} of the final fetch, by lock:contention_begin and _end"
            yield Claim([(i.begin, i.begin + min(ns, i.duration_ns)) for i, ns in waited], Side.SOURCE, [evidence])

    return find


def ioctls(facts: Facts) -> list[FetchIoctl]:
    """The ioctls of the final fetch."""
    return [ioctl for fetch in facts.breakdown.dirty_log.fetches for ioctl in fetch.ioctls]


def fetch(facts: Facts) -> Iterator[Claim]:
    """The final dirty-log fetch, with what it read."""
    log = facts.breakdown.dirty_log
    if log.final is None or log.final.kernel_ns is None or log.final.user_ns is None:
        return
    sizes = {slot.slot: slot.size_bytes for slot in log.slots}
    slots = {ioctl.slot for ioctl in ioctls(facts)}
    known = sum(sizes.get(slot, 0) for slot in slots)
    evidence = [f"kernel {ms(log.final.kernel_ns)} ms, user space {ms(log.final.user_ns)} ms"]
    if slots:
        evidence.append(f"{len(ioctls(facts))} ioctls on {len(slots)} memslots of {size(known)}")
    if (split := log.final.split) is not None and (on_cpu := sum(split.parts.values())):
        part, ns = max(split.parts.items(), key=lambda item: item[1])
        evidence.append(f"on the CPU in these ioctls: {part} {100 * ns / on_cpu:.0f} %")
    yield Claim(facts.phase(PhaseName.FETCH_KERNEL, PhaseName.FETCH_USER), Side.SOURCE, evidence)


def in_flight(*reasons: str, phases: Sequence[PhaseName] = (*_SEND_PHASES, *WAITS_FOR_DATA)) -> Finder:
    """Stretches in which sent bytes had not been received, for one of the reasons, while somebody waited for them."""

    def find(facts: Facts) -> Iterator[Claim]:
        rows = [wire for wire in facts.wires if wire.reason in reasons]
        spans = shared([(wire.sent, wire.received) for wire in rows], facts.phase(*phases))
        if spans:
            yield Claim(spans, Side.BOTH, [flight(wire) for wire in rows[:2]])

    return find


def flight(wire: Wire) -> str:
    """`44.279 ms: 31.2 KiB of state, ...`."""
    what = f" of {wire.message}" if wire.message else ""
    return f"{ms(wire.in_flight_ns)} ms: {size(wire.bytes)}{what}, {wire.evidence}"


def limited_link(facts: Facts) -> Iterator[Claim]:
    """Time in which a queue of sent bytes arrived only as fast as the link carried them.

    Within one host there is no link: what arrives there comes as fast as the CPUs work. A queue that the link drains in
    less than QUEUE_NS is the ordinary one between two CPUs. A stream that comes in bursts is not limited by the link.
    Neither is one that a program in between passes on, or that lies unread most of the time: these can be what is slow.
    """
    use = facts.link
    if use is None or not use.rate or use.steadiness < EVEN or not facts.direct:
        return
    ends = [(u.local.rpartition(":")[0], u.remote.rpartition(":")[0]) for u in facts.breakdown.sockets]
    if any(local == remote for local, remote in ends if local):
        return
    if total(shared(use.limited, use.unread)) > _WINDOW_SHARE * use.limited_ns:
        return
    if use.queued_bytes * 1e9 >= QUEUE_NS * use.rate:
        carried = f"{size(use.limited_bytes)} arrived at {use.rate * 8 / 1e6:.0f} Mbit/s for {ms(use.limited_ns)} ms"
        yield Claim(use.limited, Side.BOTH, [f"{carried}, with up to {size(use.queued_bytes)} in the queue"])


_BUFFER = re.compile(
    r"sk_stream_wait_memory|sock_alloc_send_pskb|unix_stream_sendmsg|sock_wait_for_wmem|pipe_write"
    r"|vsock_(connectible|stream)_sendmsg"
)


def full_buffer(facts: Facts) -> Iterator[Claim]:
    """The source sleeps because its send buffer is full."""
    yield from facts.own(lambda s: in_stack(_BUFFER, s) and s.side != Side.DESTINATION)


def slow_reader(facts: Facts) -> Iterator[Claim]:
    """The source sleeps because its send buffer is full, and the evidence says that the reader does not empty it."""
    found = list(full_buffer(facts))
    evidence = []
    if not found or not facts.direct:
        return
    if (transport := facts.breakdown.migration.transport) in SOCKETS_WITHOUT_WIRE:
        evidence.append(f"{WIRELESS[transport]} has no wire: only its reader can be slow")
    for use in facts.breakdown.sockets:
        info = use.tcp_info or {}
        held, busy = info.get("rwnd_limited_us", 0), info.get("busy_us", 0)
        if use.role.startswith("source") and busy and held >= _WINDOW_SHARE * busy:
            evidence.append(f"TCP: limited by the receive window for {held // 1000} of {busy // 1000} ms busy")
    full = merged(span for claim in found for span in claim.spans)
    if facts.link is not None:
        unread = total(shared(full, facts.link.unread))
        if unread >= _WINDOW_SHARE * total(full):
            evidence.append(f"for {ms(unread)} of {ms(total(full))} ms, 64 KiB or more had arrived and were not read")
    starved = facts.lost_cpu(Side.DESTINATION)
    if (took := total(shared(full, starved))) >= _WINDOW_SHARE * total(full):
        evidence.append(f"for {ms(took)} of {ms(total(full))} ms, the destination's thread could run and had no CPU")
    if evidence:
        yield from found
        yield Claim([], found[0].side, evidence)


_BLOCK = re.compile(
    r"blk\w*|submit_bio\w*|bio_\w+|jbd2_\w+|filemap_fdata\w+|folio_wait_writeback|wbt_wait|rq_qos_wait|iomap_dio\w*"
    r"|(ext4|xfs|btrfs|f2fs|nfs)_\w+|\w*fsync\w*|fdatasync\w*|io_schedule|dio_\w+|generic_file_\w+",
    re.ASCII,
)
_IDLE = re.compile(r"\w*poll\w*|futex_\w+|do_futex|schedule_hrtimeout\w*|ep_\w+|io_\w*getevents|read_events", re.ASCII)


_WAITS_FOR_DISK = (PhaseName.QUIESCE, PhaseName.STATE_SAVE, PhaseName.SYNC, PhaseName.UNATTRIBUTED)
_FILES = (PhaseName.MEMORY_SEND, PhaseName.STATE_SEND, PhaseName.MEMORY_LOAD, PhaseName.STATE_LOAD)
"""The phases in which a guest that goes through files waits for a disk, too. Over a network it waits for the peer."""


def block_device(facts: Facts) -> Iterator[Claim]:
    """After the stop, the source waits for a block device: itself, or while one of its workers does."""
    yield from facts.own(lambda s: in_stack(_BLOCK, s) and s.side != Side.DESTINATION, *_quiet(facts))
    idle = _idle(facts)
    for sleep in _workers(facts):
        if in_stack(_BLOCK, sleep):
            yield Claim(shared([(sleep.begin, sleep.end)], idle), sleep.side, sleep=sleep)


def _behind_the_disk(facts: Facts, words: Sequence[str]) -> Iterator[Claim]:
    """A worker's wait for a CPU right after a block device answered it, while the VMM waits for its workers."""
    answered = {(sleep.thread, sleep.end) for sleep in _workers(facts) if in_stack(_BLOCK, sleep)}
    idle = _idle(facts) if answered else []
    for sleep in _workers(facts):
        if sleep.stack[:1] and sleep.stack[0] in words and (sleep.thread, sleep.begin) in answered:
            yield Claim(shared([(sleep.begin, sleep.end)], idle), sleep.side, sleep=sleep)


def _quiet(facts: Facts) -> Sequence[PhaseName]:
    """The phases in which the source may wait for a block device."""
    through_files = facts.breakdown.migration.mode in (Mode.SNAPSHOT, Mode.RESTORE)
    return (*_WAITS_FOR_DISK, *(_FILES if through_files else ()))


def _idle(facts: Facts) -> list[Span]:
    """When a thread that drives the migration waits for something in these phases."""
    return [span for claim in facts.own(lambda s: in_stack(_IDLE, s), *_quiet(facts)) for span in claim.spans]


def _workers(facts: Facts) -> list[Sleep]:
    """Sleeps of the source's other threads."""
    return [sleep for sleep in facts.sleeps or () if sleep.side != Side.DESTINATION and not sleep.phases]


_POLL = re.compile(r"\w*poll\w*|ep_\w+|schedule_hrtimeout\w*", re.ASCII)
_RECEIVE = re.compile(r"sk_wait_data|\w*recvmsg\w*|unix_stream_(data_wait|read_generic)|pipe_read", re.ASCII)
_ANONYMOUS = ("futex_wait", "nanosleep")


def named_waits(facts: Facts) -> Iterator[Claim]:
    """Other waits, by the function in which the thread slept; those without a name are left to later rules."""
    for claim in facts.own(lambda s: bool(s.stack) and not s.stack[0].startswith("(")):
        assert claim.sleep is not None  # noqa: S101 - `own` sets it
        name = meaningful(claim.sleep.stack)
        if name[0] not in _ANONYMOUS and not in_stack(_RECEIVE, claim.sleep) and not in_stack(_POLL, claim.sleep):
            yield replace(claim, what=f"{{side}} sleeps in {described(claim.sleep.stack)}")


def inside_kvm(facts: Facts) -> Iterator[Claim]:
    """Long ioctls of the threads that drive the migration, other than those of the dirty log, by name."""
    kinds: dict[tuple[Side, str, str], list[LongCall]] = defaultdict(list)
    for call in facts.calls:
        if not (call.side == Side.DESTINATION and facts.breakdown.came_back):
            kinds[call.side, call.name, call.thread].append(call)
    for (side, name, thread), calls in kinds.items():
        spans = merged(span for call in calls for span in cut(facts.phase(*call.phases), call))
        took = ms(sum(call.end - call.begin for call in calls))
        evidence = f"{took} ms in {len(calls)} {'calls' if len(calls) > 1 else 'call'} of {thread}"
        yield Claim(spans, side, [evidence, *_withheld(facts, side)], f"{{side}} is inside KVM's ioctl {name}")


def no_data(facts: Facts) -> Iterator[Claim]:
    """The destination is ready and waits for data, and no rule says why it does not come."""
    yield from facts.own(
        lambda s: s.side == Side.DESTINATION and (in_stack(_RECEIVE, s) or in_stack(_POLL, s)), *WAITS_FOR_DATA
    )


def other_threads(facts: Facts) -> Iterator[Claim]:
    """Waits for other threads of the same process. A vCPU that is not started yet waits by design."""
    for claim in facts.own(lambda s: meaningful(s.stack) == ("futex_wait",) and not s.vcpu):
        yield _called(claim, "{side} waits for another of its own threads")


def no_name(facts: Facts) -> Iterator[Claim]:
    """Waits whose stack names no cause: on a timer, in poll, or without a stack."""
    for claim in facts.own(lambda s: not s.vcpu and not (s.stack and s.stack[0].startswith("("))):
        yield _called(claim, "{side} sleeps")


def _called(claim: Claim, what: str) -> Claim:
    """With the VMM's own function that waits, if it was recorded."""
    behind = callers(claim.sleep.user) if claim.sleep else ()
    return replace(claim, what=f"{what}, in {behind[0]}") if behind else claim


def at_work(facts: Facts) -> Iterator[Claim]:
    """What is left of each phase: no long wait was seen in it."""
    if facts.sleeps is None:
        return
    words = {
        PhaseName.HANDOVER: "nobody was seen to wait for 0.1 ms or more between the hosts",
        PhaseName.UNATTRIBUTED: "no rule explains the time",
    }
    for one in facts.breakdown.phases:
        what = words.get(one.phase, f"{{side}} is at work in {one.phase}, or in waits below 0.1 ms")
        if one.spans:
            yield Claim(one.spans, one.side, _withheld(facts, one.side), what)


def _withheld(facts: Facts, side: Side) -> list[str]:
    """A thread whose CPU is stolen seems to be at work: the kernel above the hypervisor does not switch it out."""
    rows = [row for row in facts.breakdown.stolen or () if Side.BOTH in (side, row.side) or row.side == side]
    return [f"a hypervisor withheld {ms(rows[0].stolen_ns)} ms of CPU {rows[0].cpu} around the window"] if rows else []
