# SPDX-License-Identifier: Apache-2.0
"""The tables of the HTML report, except those of the dirty log.

In: a breakdown. Out: HTML fragments, empty if there is nothing to show. Durations in ms with three decimals; a dash
if not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ebpf_mig.breakdown import (
    Breakdown,
    Clock,
    PhaseName,
    bounds,
)
from ebpf_mig.report import answer, details
from ebpf_mig.report.html_markup import count_cell, escaped, limits_of_tcp, milliseconds, ns_cell, size, table
from ebpf_mig.report.rows import PhaseRow, phase_rows, words_for
from ebpf_mig.report.terms import term
from ebpf_mig.report.timeline import SIDES
from ebpf_mig.text import printable


def headline(b: Breakdown) -> str:
    """The downtime, or why there is none."""
    return answer.headline(b)


def facts(b: Breakdown) -> Iterator[str]:
    """What was migrated, from where to where, and how far the page can be trusted."""
    yield f"<p>{escaped(answer.migration(b), 1000)}</p>\n"
    yield f"<p class='soft'>{escaped(answer.ends(b), 1000)}</p>\n"
    verdict = escaped(b.completeness.verdict)
    why = "".join(f"; {escaped(reason)}" for reason in b.completeness.reasons)
    yield f"<p class='{verdict}'>{escaped(answer.verdict(b))}{why}</p>\n"


def diagnosis(b: Breakdown) -> Iterator[str]:
    """What dominates, why, what is innocent, and what would help."""
    rows = list(answer.rows(b))
    if not rows:
        return
    yield "<dl id='diagnosis'>\n"
    for row in rows:
        yield (f"<dt>{term(row.label)}</dt>" if row.label else "") + f"<dd>{escaped(row.text, 1000)}</dd>\n"
    yield "</dl>\n"


def waterfall(b: Breakdown) -> Iterator[str]:
    """Every phase with its place in the window; shares are of the downtime."""
    if not b.window_ns:
        return
    seen = list(phase_rows(b, every=True))
    rows = [_phase(row, b.window_ns) for row in seen]
    mode = b.migration.mode
    rows += [
        f"<td class='w'>{term(p.phase)}</td><td>{words_for(p.phase, mode)}</td><td>{SIDES.get(p.side, p.side)}</td>"
        "<td class='n'>not seen</td><td class='n'>-</td><td></td>"
        for p in b.phases
        if p.phase not in {row.phase for row in seen}
    ]
    if b.blackout_ns is not None:
        took = bounds.limited(b.blackout_ns, b.clock.bound_ns, b.clock)
        rows.append(
            f"<td>{term('downtime')}</td><td></td><td></td><td class='n'>{took}</td><td class='n'>100 %</td><td></td>"
        )
    took = bounds.limited(b.window_ns, b.window_bound_ns, b.clock)
    rows.append(f"<td>{term('window')}</td><td></td><td></td><td class='n'>{took}</td><td></td><td></td>")
    yield table("phases", ("phase", "what happens", "side", "#ms", "#share", ""), rows)


def _phase(row: PhaseRow, window: int) -> str:
    return (
        f"<td class='w'>{term(row.phase)}</td><td>{row.words}</td><td>{SIDES.get(row.side, row.side)}</td>"
        f"<td class='n'>{row.took}</td><td class='n'>{escaped(row.where)}</td>"
        f"<td class='bars'>{_bar(row, window)}</td>"
    )


def _bar(row: PhaseRow, window: int) -> str:
    name = row.phase if row.phase == PhaseName.UNATTRIBUTED else row.side
    bars = "".join(
        f"<rect class='{name}' x='{1000 * begin / window:.2f}' width='{max(1000 * (end - begin) / window, 1.5):.2f}' "
        "y='0' height='10'/>"
        for begin, end in _drawable(row.spans, window)
    )
    return f"<svg class='bar' viewBox='0 0 1000 10' preserveAspectRatio='none' aria-hidden='true'>{bars}</svg>"


def _drawable(spans: Sequence[tuple[int, int]], window: int) -> Iterator[tuple[int, int]]:
    """Spans with neighbours nearer than a pixel run together: there can be thousands."""
    last: tuple[int, int] | None = None
    for begin, end in spans:
        if last is not None and begin - last[1] < window // 2000:
            last = (last[0], end)
            continue
        if last is not None:
            yield last
        last = (begin, end)
    if last is not None:
        yield last


def glance(b: Breakdown) -> Iterator[str]:
    """The rows that the terminal report prints below the phases."""
    rows = [
        f"<td>{term(printable(row.label))}</td><td class='why'>{escaped(row.text, 2000)}</td>"
        for row in details.rows(b)
        if not row.verbose
    ]
    yield table("glance", ("what", "how much"), rows)


def vcpus(b: Breakdown) -> Iterator[str]:
    """When each vCPU stopped and started."""
    rows = [
        f"<td>{v.vcpu}</td>" + ns_cell(v.blackout_ns) + ns_cell(v.kick_ns) + ns_cell(v.stop) + ns_cell(v.start)
        for v in b.vcpus
    ]
    yield table("vcpus", ("vCPU", "#blackout ms", "#kick to stop ms", "#stop at ms", "#start at ms"), rows)


def page_faults(b: Breakdown) -> Iterator[str]:
    """What each vCPU waited for after the start."""
    rows = [
        f"<td>{v.vcpu}</td><td>{w.source}</td>{count_cell(w.count)}{ns_cell(w.waited_ns)}{ns_cell(w.longest_ns)}{ns_cell(w.last_ns)}"
        for v in b.page_faults or ()
        for w in v.waits
    ]
    heads = ("vCPU", "pages from", "#waits", "#waited ms", "#longest ms", "#last, after the start ms")
    yield table("page-faults", heads, rows)
    counts = [f"<td>{v.vcpu}</td>{count_cell(v.minor)}{count_cell(v.major)}" for v in b.page_faults or ()]
    yield table("page-fault-counts", ("vCPU", "#minor", "#major"), counts)


def sockets(b: Breakdown) -> Iterator[str]:
    """Bytes per socket, and the time in and between the calls."""
    rows = [
        f"<td class='w'>{escaped(s.role)}</td><td class='n'>{size(s.bytes)}</td><td class='n'>{s.calls}</td>"
        f"{ns_cell(s.in_call_ns)}{ns_cell(s.copy_ns)}{ns_cell(s.blocked_ns)}{ns_cell(s.between_ns)}<td>{limits_of_tcp(s.tcp_info)}</td>"
        f"<td>{escaped(s.local)} &rarr; {escaped(s.remote)}</td>"
        for s in b.sockets
    ]
    head = ("socket", "#bytes", "#calls", "#in calls ms", "#copying ms", "#blocked ms", "#between ms", "TCP", "ends")
    yield table("sockets", head, rows)


def wire(b: Breakdown) -> Iterator[str]:
    """Bytes in flight: sent and not yet received."""
    rows = [
        f"{ns_cell(w.sent)}{ns_cell(w.received)}{ns_cell(w.in_flight_ns)}<td class='n'>{size(w.bytes)}</td>"
        f"<td class='w'>{escaped(w.reason)}</td><td class='why'>{escaped(w.evidence)}</td>"
        for w in b.wire or []
    ]
    yield table("wire", ("#sent at ms", "#received at ms", "#in flight ms", "#bytes", "reason", "evidence"), rows)


def waits(b: Breakdown) -> Iterator[str]:
    """The longest waits of the threads on the critical path."""
    rows = [
        f"<td class='w'>{escaped(w.phase)}</td><td>{escaped(w.thread)}</td>{ns_cell(w.duration_ns)}"
        f"<td class='stack'>{' &lt; '.join(map(escaped, [*w.stack, *w.user_stack]))}</td>"
        for w in b.waits or []
    ]
    yield table("waits", ("phase", "thread", "#ms", "kernel stack, innermost first"), rows)


def witnesses(b: Breakdown) -> Iterator[str]:
    """The witnesses: downtime figures from other sources."""
    rows = [
        f"<td>{escaped(w.name)}</td>{ns_cell(w.value_ns)}{ns_cell(w.value_ns - w.difference_ns)}"
        f"<td class='n'>{w.difference_ns / 1e6:+.3f}</td><td>{escaped(w.explanation)}</td>"
        for w in b.witnesses
    ]
    yield table("witnesses", ("witness", "#says ms", "#ours ms", "#difference ms", "why"), rows)


def completeness(b: Breakdown) -> Iterator[str]:
    """Losses, attach tiers, overhead, clocks, notes."""
    state = b.completeness
    rows = ["<td>lost</td><td>not known</td>"] if state.lost is None else []
    rows += [f"<td>lost: {escaped(name)}</td><td>{count}</td>" for name, count in sorted((state.lost or {}).items())]
    rows += [
        f"<td>unpaired: {escaped(name)}</td><td>{count}</td>" for name, count in sorted((state.unpaired or {}).items())
    ]
    rows += [
        f"<td>attached: {escaped(name)}</td><td>{escaped(tier)}</td>" for name, tier in sorted(state.attach.items())
    ]
    cost = "not measured" if state.observer_ns is None else f"{milliseconds(state.observer_ns)} ms in all"
    if state.tracing is not None:
        parts = (state.tracing.programs_ns, state.tracing.calls_ns, state.tracing.process_ns)
        names = ("programs", "system calls", "our process")
        listed = ", ".join(
            f"{name} {milliseconds(ns)}" for name, ns in zip(names, parts, strict=True) if ns is not None
        )
        cost += f"; in the window {milliseconds(sum(ns or 0 for ns in parts))} ms of CPU time: {listed}"
    rows.append(f"<td>cost of the observation</td><td>{cost}</td>")
    clock = bounds.alignment(b.clock) if b.clock != Clock() else "one clock"
    rows.append(f"<td>clock of the destination</td><td>{clock}</td>")
    yield table("completeness", ("what", "how much"), rows)
    if b.notes:
        yield "<ul>" + "".join(f"<li>{escaped(note)}</li>" for note in b.notes) + "</ul>\n"
