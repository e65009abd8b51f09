# SPDX-License-Identifier: Apache-2.0
"""The VMM's own parts of its downtime, each next to the phases that it covers, and what none of them has.

In: a `TracedMigration` with its marks (`ch.NAME_ms`, `ch.event.NAME`), the phases, what was on the wire. Out: rows of
the breakdown. They are witnesses: none of them moves a boundary.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ebpf_mig.analysis.attribution import Attribution
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.spans import covered, total, uncovered
from ebpf_mig.breakdown import Phase, Span, Wire, Witness
from ebpf_mig.vmm.cloud_hypervisor import protocol
from ebpf_mig.vmm.cloud_hypervisor.protocol import Talk

MS = 1_000_000
_SOURCE_PARTS = ("final_iter", "state", "send_state", "complete")
_NAMED_NS, _NAMED_SHARE = 10_000, 50
"""Shares shorter than this, or than a fiftieth of the whole, are left out of the explanations."""
_ORDER = (*_SOURCE_PARTS, "recv_snapshot", "restore", "resume", "state_to_resume")
_ALSO = {"overhead": "final_iter that is not transfer", "state_to_resume": "from the state's header on"}


def gather(
    traced: TracedMigration,
    attribution: Attribution,
    witnesses: Sequence[Witness],
    wires: Sequence[Wire] | None,
    late_ns: int,
) -> list[Witness]:
    """`witnesses` with the downtime's row explained, and a row for each part that the VMM logged.

    `late_ns`: how long the thread that kicks had lost the CPU after it had begun to count.
    """
    if attribution.window is None:
        return list(witnesses)
    found = protocol.follow(traced, _snapshotted(traced))
    parts = _parts(traced, attribution.window, attribution.phases, wires, found)
    return _explained(witnesses, traced, attribution.window, found, late_ns) + parts


def _parts(
    traced: TracedMigration, window: Span, parts: Sequence[Phase], wires: Sequence[Wire] | None, found: Talk
) -> list[Witness]:
    """Those that the kernel's events have a span of; in the order of the downtime."""
    told = {m.name[3:-3]: m.value for m in traced.material.marks if m.name.startswith("ch.") and m.name.endswith("_ms")}
    if not told:
        return []
    origin = window[0]
    rows = []
    for name in (*_ORDER[:1], "overhead", *_ORDER[1:]):
        if name in told and name in found.spans:
            begin, end = found.spans[name]
            why = _why(name, (begin - origin, end - origin), parts, wires or (), found)
            doubt = found.doubts.get(name, 0)
            if doubt >= MS:
                why += f"; {doubt / MS:.3f} of user time may be its neighbour's"
            row = _row(name, told[name], (begin - origin, end - origin), end - begin, why)
            rows.append(msgspec.structs.replace(row, doubt_ns=doubt))
    rows += _unnamed(told, found, origin, parts)
    return rows


def _explained(
    witnesses: Sequence[Witness], traced: TracedMigration, window: Span, talk: Talk, late_ns: int
) -> list[Witness]:
    """The downtime's row with what it is for the kernel, and how that lies about the blackout."""
    found, switchover = talk.spans.get("downtime"), traced.switchover
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


def _why(name: str, span: Span, parts: Sequence[Phase], wires: Sequence[Wire], found: Talk) -> str:
    least = max(_NAMED_NS, (span[1] - span[0]) // _NAMED_SHARE)
    shares = [(phase.phase, covered(phase.spans, span)) for phase in parts]
    shares.append(("after the start", span[1] - span[0] - sum(ns for _, ns in shares)))
    said = [", ".join(f"{phase} {ns / MS:.3f}" for phase, ns in shares if ns >= least)]
    if name in _ALSO:
        said.insert(0, _ALSO[name])
    second = found.second_fetch
    if name == "state" and second is not None:
        said.append(f"of which {(second[1] - second[0]) / MS:.3f} ms is a second dirty-log fetch")
    stalled = sum(covered([(w.sent, w.received)], span) for w in wires)
    if stalled >= MS and name not in ("final_iter", "overhead"):
        longest = max(wires, key=lambda w: covered([(w.sent, w.received)], span))
        said.append(f"of which {stalled / MS:.3f} ms sent but not received ({longest.reason})")
    return "; ".join(filter(None, said))


def _unnamed(told: dict[str, int], found: Talk, origin: int, parts: Sequence[Phase]) -> list[Witness]:
    """What is in its total and in none of its parts: the pause, and what lies between the parts."""
    if "downtime" not in found.spans or not all(name in told for name in ("downtime", *_SOURCE_PARTS)):
        return []
    begin, end = found.spans["downtime"]
    known = sorted(found.spans[name] for name in _SOURCE_PARTS if name in found.spans)
    ours = end - begin - total(known)
    rest = told["downtime"] - sum(told[name] for name in _SOURCE_PARTS)
    gaps = uncovered(known, (begin, end))
    shares = [(p.phase, sum(covered(p.spans, (b - origin, e - origin)) for b, e in gaps)) for p in parts]
    why = "in its total, in none of its parts: " + ", ".join(
        f"{p} {ns / MS:.3f}" for p, ns in shares if ns >= _NAMED_NS
    )
    return [_row("unnamed", rest, None, ours, why)]
