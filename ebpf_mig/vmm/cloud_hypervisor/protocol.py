# SPDX-License-Identifier: Apache-2.0
"""A migration whose messages are each answered, taken apart: which message when, on either side.

In: a `TracedMigration`. Out: the spans that Cloud Hypervisor's log has figures of, between events of the kernel.
Absolute ns.

Cloud Hypervisor sends a request, waits for its answer and goes on (vm-migration/src/protocol.rs), so on the migration's
main socket the last message is `Complete`, the one before `State`. The thread that kicks the vCPUs drives all of
it, in every version, whatever it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ebpf_mig.analysis import pause, phases, source_work
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.process import RECEIVE, SEND, Process, key_of
from ebpf_mig.analysis.switchover import Switchover
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import Ioctl, Transfer

Span = tuple[int, int]
HEADER = 64
"""A message without a payload, as `Complete` is, has 16 bytes; TLS adds some."""


@dataclass(frozen=True)
class Message:
    """A request and its answer, seen from one side: all calls of one direction, then those of the other."""

    first: tuple[Transfer, ...]
    answer: tuple[Transfer, ...]

    @property
    def begin(self) -> int:
        return self.first[0].begin_ns

    @property
    def answered(self) -> int:
        return self.answer[-1].end_ns

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.first)


@dataclass(frozen=True)
class Talk:
    """What was found; spans by the name of the log's figure."""

    spans: dict[str, Span]
    second_fetch: Span | None = None
    """The dirty log fetched again after the vCPUs' state was read, with the sending of what it found (v53)."""
    doubts: dict[str, int] = field(default_factory=dict)
    """Ns of user time at a span's border that may belong to the neighbour: no call of the kernel tells."""


def messages(transfers: Sequence[Transfer], first: int) -> list[Message]:
    """Those that were answered, in order. `first`: the direction of the requests, SEND on the source."""
    found: list[Message] = []
    asked: list[Transfer] = []
    answer: list[Transfer] = []
    for transfer in transfers:
        if not transfer.bytes:
            continue
        if transfer.direction == first:
            if asked and answer:
                found.append(Message(tuple(asked), tuple(answer)))
                asked, answer = [], []
            asked.append(transfer)
        elif asked:
            answer.append(transfer)
    if asked and answer:
        found.append(Message(tuple(asked), tuple(answer)))
    return found


def follow(traced: TracedMigration, snapshotted: int | None = None) -> Talk:
    """The spans of a completed migration. `snapshotted`: when the VMM says that its state was saved, if it does."""
    source, found = traced.source, traced.switchover
    if source is None or found is None or found.kind != "completed":
        return Talk({})
    spans, second, serialising = _source(traced, source, found, snapshotted)
    loading, parsing = _destination(traced, found)
    doubts = dict.fromkeys(("state", "send_state"), serialising) | dict.fromkeys(("recv_snapshot", "restore"), parsing)
    return Talk(spans | loading, second, doubts)


def _source(
    traced: TracedMigration, source: Process, found: Switchover, snapshotted: int | None
) -> tuple[dict[str, Span], Span | None, int]:
    tid = pause.driver(source, found)
    own = [t for t in traced.transfers(source) if t.tid == tid and t.end_ns > found.stop]
    last = next((t for t in reversed(own) if t.direction == RECEIVE and t.bytes), None)
    if last is None:
        return {}, None, 0
    talk = messages([t for t in own if key_of(t) == key_of(last)], SEND)
    if len(talk) < 2 or talk[-1].bytes > HEADER:
        return {}, None, 0
    state, complete = talk[-2:]
    begin = _snapshot_begin(source, found, tid, state.begin)
    if begin is None:
        return {}, None, 0
    saved = max((i.end_ns for i in source.other_ioctls if begin <= i.begin_ns < state.begin), default=begin)
    second = _second_fetch(traced, begin, state, talk[:-2])
    done = max(saved, second[1] if second else 0)
    if second is None and snapshotted is not None:
        done = min(max(done, snapshotted), state.begin)
    spans = {
        "downtime": (found.requested, complete.answered),
        "state": (begin, done),
        "send_state": (done, state.answered),
        "complete": (complete.begin, complete.answered),
    }
    return spans | _final_iteration(traced, found, begin), second, state.begin - done


def _snapshot_begin(source: Process, found: Switchover, tid: int | None, before: int) -> int | None:
    """The driver asks for the CPUID that all vCPUs share, then reads each vCPU (vmm/src/vm.rs, `snapshot`)."""
    work = [i for i in source.other_ioctls if i.tid == tid and found.stop <= i.begin_ns < before]
    read = next((n for n, i in enumerate(work) if source_work.is_vcpu_read(i)), None)
    if read is None:
        return None
    shared = next((i.begin_ns for i in work[:read] if kvm.name_of(i.cmd) == "GET_SUPPORTED_CPUID"), None)
    return shared if shared is not None else work[read].begin_ns


def _second_fetch(traced: TracedMigration, begin: int, state: Message, before: Sequence[Message]) -> Span | None:
    """From its first ioctl to the answer to what it found, or to its last ioctl."""
    fetches = [b for b in traced.bursts if b.fetched and begin <= b.begin < state.begin]
    if not fetches:
        return None
    ends = [b.end for b in fetches] + [m.answered for m in before if m.begin >= fetches[0].begin]
    return fetches[0].begin, max(ends)


def _final_iteration(traced: TracedMigration, found: Switchover, snapshot: int) -> dict[str, Span]:
    """The final fetch and the sending of what it found, by however many threads."""
    fetches = [b for b in traced.bursts if b.fetched and found.stop <= b.begin < snapshot]
    if not fetches or traced.postcopy:
        return {}
    begin = fetches[0].begin
    sent = [t for t in traced.transfers(traced.source) if t.bytes and t.end_ns > begin and t.begin_ns < snapshot]
    end = max([fetches[-1].end, *(t.end_ns for t in sent if t.end_ns <= snapshot)])
    first = min((t.begin_ns for t in sent if t.direction == SEND and t.begin_ns >= begin), default=fetches[-1].end)
    return {"final_iter": (begin, end), "overhead": (begin, first)}


def _destination(traced: TracedMigration, found: Switchover) -> tuple[dict[str, Span], int]:
    process = traced.destination
    if process is None or found.first_start is None:
        return {}, 0
    restores = [i for i in process.ioctls if phases.is_restore(i) and found.stop <= i.begin_ns < found.first_start]
    if not restores:
        return {}, 0
    loader = restores[-1].tid
    own = [t for t in process.ended(traced.transfers(process), found.requested + 1) if t.tid == loader]
    talk = messages(own, RECEIVE)
    talk = [m for m in talk if m.first[-1].end_ns < found.first_start]
    if len(talk) < 2 or talk[-1].bytes > HEADER:
        return {}, 0
    state, complete = talk[-2:]
    header = state.first[0].end_ns
    work = [i for i in process.ioctls if i.tid == loader]
    restoring, parsing = _restoring(work, state)
    return restoring | {
        "resume": (complete.first[-1].end_ns, complete.answer[0].begin_ns),
        "state_to_resume": (header, complete.answer[0].begin_ns),
    }, parsing


def _restoring(work: Sequence[Ioctl], state: Message) -> tuple[dict[str, Span], int]:
    """Restoring begins, for the kernel, with the first question after the payload: which CPUID is supported."""
    received = state.first[-1].end_ns
    first = next((i.begin_ns for i in work if i.begin_ns >= received), None)
    if first is None:
        return {}, 0
    # Between header and payload it ends the thread that accepts connections; that is in none of its figures.
    begin = state.first[1].begin_ns if len(state.first) > 1 else state.first[0].end_ns
    spans = {"recv_snapshot": (begin, first), "restore": (first, state.answer[0].begin_ns)}
    return spans, first - received
