# SPDX-License-Identifier: Apache-2.0
"""Cloud Hypervisor's logged downtime components, mapped to our phases, and the remainder.

In: a `TracedMigration` with its marks (`ch.NAME_ms`, `ch.event.NAME`), the phases, what was on the wire. Out: rows of
the breakdown. They are witnesses: they move no boundary.

Cloud Hypervisor sends a request, waits for its answer and goes on (vm-migration/src/protocol.rs), so on the migration's
main socket the last message is `Complete`, the one before `State`. In every version, the thread that kicks the vCPUs
drives the whole switchover, under different names. So kernel events bound the spans whose figures are in its log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import msgspec

from ebpf_mig.analysis import loading, pause, source_work
from ebpf_mig.analysis.attributed import Attribution
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.process import Process, key_of
from ebpf_mig.analysis.spans import covered, total, uncovered
from ebpf_mig.analysis.switchover import Switchover
from ebpf_mig.analysis.witnesses import MarkNames
from ebpf_mig.breakdown import Phase, Span, SwitchoverKind, Wire, Witness
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import RECEIVE, SEND, Ioctl, Transfer
from ebpf_mig.vmm.witness import NAMED_NS, NAMED_SHARE, Reference, VmmWitness

MS = 1_000_000
_SOURCE_PARTS = ("final_iter", "state", "send_state", "complete")
_ORDER = (*_SOURCE_PARTS, "recv_snapshot", "restore", "resume", "state_to_resume")
_ALSO = {"overhead": "final_iter that is not transfer", "state_to_resume": "from the state's header on"}
_FIGURES = frozenset({
    "complete_ms", "downtime_ms", "final_iter_ms", "overhead_ms", "send_state_ms", "state_ms", "recv_snapshot_ms",
    "restore_ms", "resume_ms", "state_to_resume_ms",
})  # fmt: skip
_EVENTS = frozenset({
    "starting", "booting", "booted", "deleted", "shutdown", "reboot", "pausing", "paused", "resuming", "resumed",
    "snapshotting", "snapshotted", "restoring", "restored", "migration-started", "migration-memory-iteration",
    "migration-finished", "migration-failed", "migration-receive-ready", "migration-receive-started",
    "migration-receive-finished", "migration-receive-failed", "migration-cancelled", "panic",
})  # fmt: skip
"""event!() of vmm/src and vm-migration (v52 to v54)."""
HEADER = 64
"""A message without a payload, as `Complete` is, has 16 bytes; TLS adds some."""


class CloudHypervisorWitness(VmmWitness):
    """Marks `ch.NAME_ms` are of its log, `ch.event.NAME` of its event monitor."""

    marks = MarkNames(
        downtime={"ch.downtime_ms": "from its pause call to the answer to Complete"},
        pairs=(("ch.paused..resumed", "ch.event.paused", "ch.event.resumed"),),
    )
    words = frozenset({f"ch.{word}" for word in _FIGURES} | {f"ch.event.{word}" for word in _EVENTS})
    parts: ClassVar = {
        "ch.state_ms": 0, "ch.send_state_ms": 0, "ch.final_iter_ms": 0, "ch.complete_ms": 0, "ch.unnamed_ms": 1,
        "ch.restore_ms": 3, "ch.recv_snapshot_ms": 3, "ch.resume_ms": 3, "ch.overhead_ms": 5,
        "ch.state_to_resume_ms": 5, "ch.paused..resumed": 3,
    }  # fmt: skip
    references = (
        Reference(
            "1.5 ms/GiB",
            "re-arming, Cloud Hypervisor, 64 GiB mostly dirty",
            "github.com/cloud-hypervisor/cloud-hypervisor/issues/8899",
            "published",
        ),
    )

    def rows(
        self,
        traced: TracedMigration,
        attribution: Attribution,
        found: Sequence[Witness],
        wires: Sequence[Wire] | None,
        late_ns: int,
    ) -> list[Witness]:
        """`found` with the downtime's row explained, and a row for each logged component."""
        if attribution.window is None or not any(m.name.startswith("ch.") for m in traced.material.marks):
            return list(found)
        matched = match_log_figures(traced, _snapshotted(traced))
        parts = _parts(traced, attribution.window, attribution.phases, wires, matched)
        return _explained(found, traced, attribution.window, matched, late_ns) + parts


WITNESS = CloudHypervisorWitness()


def _parts(
    traced: TracedMigration, window: Span, parts: Sequence[Phase], wires: Sequence[Wire] | None, found: LogSpans
) -> list[Witness]:
    """The components that have a span in the kernel's events, in the order of the downtime."""
    figures = {
        m.name[3:-3]: m.value for m in traced.material.marks if m.name.startswith("ch.") and m.name.endswith("_ms")
    }
    if not figures:
        return []
    origin = window[0]
    rows = []
    for name in (*_ORDER[:1], "overhead", *_ORDER[1:]):
        if name in figures and name in found.spans:
            begin, end = found.spans[name]
            why = _why(name, (begin - origin, end - origin), parts, wires or (), found)
            doubt = found.doubts.get(name, 0)
            if doubt >= MS:
                why += f"; {doubt / MS:.3f} of user time may be its neighbour's"
            row = _row(name, figures[name], (begin - origin, end - origin), end - begin, why)
            rows.append(msgspec.structs.replace(row, doubt_ns=doubt))
    rows += _unnamed(figures, found, origin, parts)
    return rows


def _explained(
    witnesses: Sequence[Witness], traced: TracedMigration, window: Span, matched: LogSpans, late_ns: int
) -> list[Witness]:
    """The downtime's row with its kernel span, and the position of that span relative to the blackout."""
    found, switchover = matched.spans.get("downtime"), traced.switchover
    if found is None or switchover is None or switchover.first_start is None:
        return list(witnesses)
    span = found[0] - window[0], found[1] - window[0]
    why = (
        f"from its pause call to the answer to Complete, {(span[1] - span[0]) / MS:.3f} by the kernel: "
        f"{(switchover.stop - found[0]) / MS:.3f} before the stop to {abs(found[1] - switchover.first_start) / MS:.3f} "
        f"{'after' if found[1] >= switchover.first_start else 'before'} the start"
    )
    if late_ns >= MS // 2:
        why += f"; its thread had lost the CPU for {late_ns / MS:.3f} before that"
    return [
        msgspec.structs.replace(w, explanation=why, span=span) if w.name == "ch.downtime_ms" else w for w in witnesses
    ]


def _row(name: str, ms: int, span: Span | None, ours: int, why: str) -> Witness:
    return Witness(name=f"ch.{name}_ms", value_ns=ms * MS, difference_ns=ms * MS - ours, explanation=why, span=span)


def _snapshotted(traced: TracedMigration) -> int | None:
    pid = traced.source.pid if traced.source else None
    return next((m.at_ns for m in traced.material.marks if m.name == "ch.event.snapshotted" and m.pid == pid), None)


def _why(name: str, span: Span, parts: Sequence[Phase], wires: Sequence[Wire], found: LogSpans) -> str:
    least = max(NAMED_NS, (span[1] - span[0]) // NAMED_SHARE)
    shares: list[tuple[str, int]] = [(phase.phase, covered(phase.spans, span)) for phase in parts]
    shares.append(("after the start", span[1] - span[0] - sum(ns for _, ns in shares)))
    clauses = [", ".join(f"{phase} {ns / MS:.3f}" for phase, ns in shares if ns >= least)]
    if name in _ALSO:
        clauses.insert(0, _ALSO[name])
    second = found.second_fetch
    if name == "state" and second is not None:
        clauses.append(f"of which {(second[1] - second[0]) / MS:.3f} ms is a second dirty-log fetch")
    stalled = sum(covered([(w.sent, w.received)], span) for w in wires)
    if stalled >= MS and name not in ("final_iter", "overhead"):
        longest = max(wires, key=lambda w: covered([(w.sent, w.received)], span))
        clauses.append(f"of which {stalled / MS:.3f} ms sent but not received ({longest.reason})")
    return "; ".join(filter(None, clauses))


def _unnamed(figures: dict[str, int], found: LogSpans, origin: int, parts: Sequence[Phase]) -> list[Witness]:
    """The part of its total that is in none of its components: the pause, and the gaps between components."""
    if "downtime" not in found.spans or not all(name in figures for name in ("downtime", *_SOURCE_PARTS)):
        return []
    begin, end = found.spans["downtime"]
    known = sorted(found.spans[name] for name in _SOURCE_PARTS if name in found.spans)
    ours = end - begin - total(known)
    rest = figures["downtime"] - sum(figures[name] for name in _SOURCE_PARTS)
    gaps = uncovered(known, (begin, end))
    shares = [(p.phase, sum(covered(p.spans, (b - origin, e - origin)) for b, e in gaps)) for p in parts]
    why = "in its total, in none of its parts: " + ", ".join(f"{p} {ns / MS:.3f}" for p, ns in shares if ns >= NAMED_NS)
    return [_row("unnamed", rest, None, ours, why)]


@dataclass(frozen=True)
class Message:
    """A request and its answer, seen from one side: all calls in one direction, then those in the other."""

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
class LogSpans:
    """The spans that the kernel's events show for the figures in the log, by the figure's name."""

    spans: dict[str, Span]
    second_fetch: Span | None = None
    """The second dirty-log fetch, after the vCPUs' state was read, and the sending of its pages (v53)."""
    doubts: dict[str, int] = field(default_factory=dict)
    """Ns of user time at a span's border that may belong to its neighbour. No system call separates them."""


def messages(transfers: Sequence[Transfer], first: int) -> list[Message]:
    """The answered requests, in order. `first`: the direction of the requests, SEND on the source."""
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


def match_log_figures(traced: TracedMigration, snapshotted: int | None = None) -> LogSpans:
    """The spans of a completed migration. `snapshotted`: when the VMM reports that its state was saved, if known."""
    source, found = traced.source, traced.switchover
    if source is None or found is None or found.kind != SwitchoverKind.COMPLETED:
        return LogSpans({})
    spans, second, serialising = _source(traced, source, found, snapshotted)
    loading, parsing = _destination(traced, found)
    doubts = dict.fromkeys(("state", "send_state"), serialising) | dict.fromkeys(("recv_snapshot", "restore"), parsing)
    return LogSpans(spans | loading, second, doubts)


def _source(
    traced: TracedMigration, source: Process, found: Switchover, snapshotted: int | None
) -> tuple[dict[str, Span], Span | None, int]:
    tid = pause.driver(source, found)
    own = [t for t in traced.transfers(source) if t.tid == tid and t.end_ns > found.stop]
    last = next((t for t in reversed(own) if t.direction == RECEIVE and t.bytes), None)
    if last is None:
        return {}, None, 0
    requests = messages([t for t in own if key_of(t) == key_of(last)], SEND)
    if len(requests) < 2 or requests[-1].bytes > HEADER:
        return {}, None, 0
    state, complete = requests[-2:]
    begin = _snapshot_begin(source, found, tid, state.begin)
    if begin is None:
        return {}, None, 0
    saved = max((i.end_ns for i in source.other_ioctls if begin <= i.begin_ns < state.begin), default=begin)
    second = _second_fetch(traced, begin, state, requests[:-2])
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
    """The driver reads the CPUID that all vCPUs share, then each vCPU (vmm/src/vm.rs, `snapshot`)."""
    work = [i for i in source.other_ioctls if i.tid == tid and found.stop <= i.begin_ns < before]
    read = next((n for n, i in enumerate(work) if source_work.is_vcpu_read(i)), None)
    if read is None:
        return None
    shared = next((i.begin_ns for i in work[:read] if kvm.name_of(i.cmd) == "GET_SUPPORTED_CPUID"), None)
    return shared if shared is not None else work[read].begin_ns


def _second_fetch(traced: TracedMigration, begin: int, state: Message, before: Sequence[Message]) -> Span | None:
    """From its first ioctl to the answer to the pages it sent, or to its last ioctl."""
    fetches = [b for b in traced.bursts if b.fetched and begin <= b.begin < state.begin]
    if not fetches:
        return None
    ends = [b.end for b in fetches] + [m.answered for m in before if m.begin >= fetches[0].begin]
    return fetches[0].begin, max(ends)


def _final_iteration(traced: TracedMigration, found: Switchover, snapshot: int) -> dict[str, Span]:
    """The final fetch and the sending of its pages, by any number of threads."""
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
    restores = [i for i in process.ioctls if loading.is_restore(i) and found.stop <= i.begin_ns < found.first_start]
    if not restores:
        return {}, 0
    loader = restores[-1].tid
    own = [t for t in process.ended(traced.transfers(process), found.requested + 1) if t.tid == loader]
    requests = messages(own, RECEIVE)
    requests = [m for m in requests if m.first[-1].end_ns < found.first_start]
    if len(requests) < 2 or requests[-1].bytes > HEADER:
        return {}, 0
    state, complete = requests[-2:]
    header = state.first[0].end_ns
    work = [i for i in process.ioctls if i.tid == loader]
    restoring, parsing = _restoring(work, state)
    return restoring | {
        "resume": (complete.first[-1].end_ns, complete.answer[0].begin_ns),
        "state_to_resume": (header, complete.answer[0].begin_ns),
    }, parsing


def _restoring(work: Sequence[Ioctl], state: Message) -> tuple[dict[str, Span], int]:
    """In kernel events, restoring begins with the first call after the payload: the query of the supported CPUID."""
    received = state.first[-1].end_ns
    first = next((i.begin_ns for i in work if i.begin_ns >= received), None)
    if first is None:
        return {}, 0
    # Between header and payload it ends the thread that accepts connections. None of its figures includes that.
    begin = state.first[1].begin_ns if len(state.first) > 1 else state.first[0].end_ns
    spans = {"recv_snapshot": (begin, first), "restore": (first, state.answer[0].begin_ns)}
    return spans, first - received
