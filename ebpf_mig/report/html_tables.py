# SPDX-License-Identifier: Apache-2.0
"""The tables of the HTML report.

In: a breakdown. Out: HTML fragments, empty if there is nothing to show. Durations in ms with three decimals; a dash
if not measured.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence

from ebpf_mig.breakdown import (
    Breakdown,
    Clock,
    FetchIoctl,
    FinalFetch,
    PhaseName,
    Split,
    Stretch,
    bounds,
)
from ebpf_mig.report import answer, details
from ebpf_mig.report.reference import REARM
from ebpf_mig.report.rows import PhaseRow, phase_rows, words_for
from ebpf_mig.report.terms import term
from ebpf_mig.report.timeline import SIDES
from ebpf_mig.text import printable

_MANY = 40
"""Rows that a table shows without being opened."""
_WIDE = 7
"""Columns that fit on a tablet."""


def escaped(text: str, limit: int = 400) -> str:
    """Text from the recording, escaped for HTML, also inside quotes."""
    return html.escape(printable(text, limit))


def milliseconds(ns: float | None) -> str:
    """`12.345`, or a dash."""
    return "-" if ns is None else f"{ns / 1e6:.3f}"


def size(count: int | None) -> str:
    """Bytes in the largest binary unit that keeps them at 1 or above."""
    if count is None:
        return "-"
    power = min(max(count.bit_length() - 1, 0) // 10, 4)
    return f"{count} B" if power == 0 else f"{count / (1 << 10 * power):.1f} {'KMGT'[power - 1]}iB"


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
    rows = [f"<td>{v.vcpu}</td>" + _ns(v.blackout_ns) + _ns(v.kick_ns) + _ns(v.stop) + _ns(v.start) for v in b.vcpus]
    yield table("vcpus", ("vCPU", "#blackout ms", "#kick to stop ms", "#stop at ms", "#start at ms"), rows)


def page_faults(b: Breakdown) -> Iterator[str]:
    """What each vCPU waited for after the start."""
    rows = [
        f"<td>{v.vcpu}</td><td>{w.source}</td>{_count(w.count)}{_ns(w.waited_ns)}{_ns(w.longest_ns)}{_ns(w.last_ns)}"
        for v in b.page_faults or ()
        for w in v.waits
    ]
    heads = ("vCPU", "pages from", "#waits", "#waited ms", "#longest ms", "#last, after the start ms")
    yield table("page-faults", heads, rows)
    counts = [f"<td>{v.vcpu}</td>{_count(v.minor)}{_count(v.major)}" for v in b.page_faults or ()]
    yield table("page-fault-counts", ("vCPU", "#minor", "#major"), counts)


def fetch(b: Breakdown) -> Iterator[str]:
    """The final fetch, what it caused, and each of its ioctls."""
    final = b.dirty_log.final
    if final is None:
        return
    pages = "pages not known" if final.pages is None else f"{final.pages} pages"
    both = None if final.kernel_ns is None or final.user_ns is None else final.kernel_ns + final.user_ns
    yield f"<p><b>{milliseconds(both)} ms</b>: "
    yield f"in the kernel {milliseconds(final.kernel_ns)}, in the VMM {milliseconds(final.user_ns)}. "
    yield f"It caused {milliseconds(final.send_ns)} ms of sending: {pages}, "
    yield f"{size(final.bytes)}.</p>\n"
    if final.split is not None:
        yield f"<p>On the CPU in its ioctls, ms: {_split(final.split)}.</p>\n"
    yield from _rearm(final)
    sizes = {slot.slot: slot.size_bytes for slot in b.dirty_log.slots}
    rows = [
        f"<td class='w'>{escaped(i.ioctl)}</td><td>{slot_name(i.slot)}</td>"
        f"<td class='n'>{size(sizes.get(i.slot))}</td>{_ns(i.begin)}{_ns(i.duration_ns)}"
        f"<td>{_locks(i)}</td><td class='n'>{milliseconds(i.off_cpu_ns)}</td><td>{_split(i.split)}</td>"
        for one in b.dirty_log.fetches
        for i in one.ioctls
    ]
    head = ("ioctl", "slot", "#size", "#at ms", "#ms", "lock waits ms", "#off CPU ms", "inside ms")
    yield table("fetch", head, rows)


def _locks(ioctl: FetchIoctl) -> str:
    if ioctl.lock_wait_ns is None:
        return "-"
    waits = [f"{escaped(name)} {milliseconds(ns)}" for name, ns in ioctl.lock_wait_ns.items() if ns]
    return ", ".join(waits) or "none"


def _rearm(final: FinalFetch) -> Iterator[str]:
    """The avoidable work, next to published figures."""
    rearm = final.rearm
    if rearm is None:
        return
    bounds = f" ± {milliseconds(rearm.error_ns)}" if rearm.error_ns else ""
    yield f"<p><b>Avoidable: {milliseconds(rearm.ns)}{bounds} ms</b> of it re-armed {rearm.pages} pages that no vCPU "
    yield f"could write to any more: {rearm.ms_per_gib:.3g} ms/GiB, {rearm.ns_per_page:.3g} ns/page.</p>\n"
    rows = [f"<td>{escaped(r.what)}</td><td>{escaped(r.figure)}</td><td>{escaped(r.source)}</td>" for r in REARM]
    yield table("rearm", ("for comparison", "figure", "source"), rows)


def _split(split: Split | None) -> str:
    """The parts of a call, sampled ones with their 95 % error, and their source."""
    if split is None:
        return "-"
    errors = split.errors
    parts = [
        f"{name} {milliseconds(ns)}" + ("" if errors[name] is None else f" ± {milliseconds(errors[name])}")
        for name, ns in split.parts.items()
    ]
    how = f"{split.samples} samples" if isinstance(split.samples, int) else escaped(split.samples)
    return f"{', '.join(parts)} ({how})"


def passes(b: Breakdown) -> Iterator[str]:
    """The passes in order; the bars are the bytes sent, so that convergence is visible."""
    most = max((p.bytes or 0 for p in b.dirty_log.passes), default=0) or 1
    rows = [
        f"<td>{at}</td>{_ns(p.begin)}{_ns(p.kernel_ns)}{_ns(p.user_ns)}{_ns(p.user_off_cpu_ns)}"
        f"{_count(p.pages)}{_count(p.pages_at_most)}<td class='n'>{size(p.bytes)}</td>{_ns(p.send_ns)}"
        f"{_ns(p.blocked_ns)}{_count(p.dirty_pages_per_s)}{_stretch(p.brownout)}{_stretch(p.baseline)}"
        f"<td>{_tcp(p.tcp_info)}</td><td class='bars'>"
        "<svg class='bar' viewBox='0 0 1000 10' preserveAspectRatio='none' aria-hidden='true'>"
        f"<rect class='source' x='0' y='0' height='10' width='{1000 * (p.bytes or 0) / most:.1f}'/></svg></td>"
        for at, p in enumerate(b.dirty_log.passes, 1)
    ]
    head = (
        "pass",
        "#at ms",
        "#kernel ms",
        "#user ms",
        "#off CPU ms",
        "#pages",
        "#whole pages, at most",
        "#sent",
        "#sending ms",
        "#blocked ms",
        "#dirty pages/s",
        "#vCPUs out, longest ms",
        "#before logging",
        "TCP",
        "",
    )
    yield table("passes", head, rows)
    switches = [
        f"<td>{'on' if s.on else 'off'}</td>{_ns(s.begin)}{_ns(s.kernel_ns)}{_count(s.slots)}{_ns(s.in_blackout_ns)}"
        for s in b.dirty_log.logging
    ]
    yield table("logging", ("logging", "#at ms", "#kernel ms", "#slots", "#in the blackout ms"), switches)


def _stretch(stretch: Stretch | None) -> str:
    """The share of time that all vCPUs together were outside KVM_RUN, and the longest gap."""
    if stretch is None or not stretch.vcpus or not stretch.duration_ns:
        return "<td class='n'>-</td>"
    share = sum(v.outside_ns for v in stretch.vcpus) / stretch.duration_ns / len(stretch.vcpus)
    longest = max(v.longest_gap_ns for v in stretch.vcpus)
    return f"<td class='n'>{100 * share:.2f} %, {milliseconds(longest)}</td>"


def _tcp(info: dict[str, int] | None) -> str:
    """What limited TCP, in whole ms because TCP counts in jiffies."""
    if not info:
        return "-"
    busy, rwnd, sndbuf = (info.get(name, 0) // 1000 for name in ("busy_us", "rwnd_limited_us", "sndbuf_limited_us"))
    bounds = f" (± {info.get('resolution_us', 0) // 1000})"
    retransmits = f", {info['retransmits']} retransmits" if info.get("retransmits") else ""
    return f"busy {busy} ms, receiver's window {rwnd}, send buffer {sndbuf}{bounds}{retransmits}"


def sockets(b: Breakdown) -> Iterator[str]:
    """Bytes per socket, and the time in and between the calls."""
    rows = [
        f"<td class='w'>{escaped(s.role)}</td><td class='n'>{size(s.bytes)}</td><td class='n'>{s.calls}</td>"
        f"{_ns(s.in_call_ns)}{_ns(s.copy_ns)}{_ns(s.blocked_ns)}{_ns(s.between_ns)}<td>{_tcp(s.tcp_info)}</td>"
        f"<td>{escaped(s.local)} &rarr; {escaped(s.remote)}</td>"
        for s in b.sockets
    ]
    head = ("socket", "#bytes", "#calls", "#in calls ms", "#copying ms", "#blocked ms", "#between ms", "TCP", "ends")
    yield table("sockets", head, rows)


def wire(b: Breakdown) -> Iterator[str]:
    """Bytes in flight: sent and not yet received."""
    rows = [
        f"{_ns(w.sent)}{_ns(w.received)}{_ns(w.in_flight_ns)}<td class='n'>{size(w.bytes)}</td>"
        f"<td class='w'>{escaped(w.reason)}</td><td class='why'>{escaped(w.evidence)}</td>"
        for w in b.wire or []
    ]
    yield table("wire", ("#sent at ms", "#received at ms", "#in flight ms", "#bytes", "reason", "evidence"), rows)


def waits(b: Breakdown) -> Iterator[str]:
    """The longest waits of the threads on the critical path."""
    rows = [
        f"<td class='w'>{escaped(w.phase)}</td><td>{escaped(w.thread)}</td>{_ns(w.duration_ns)}"
        f"<td class='stack'>{' &lt; '.join(map(escaped, [*w.stack, *w.user_stack]))}</td>"
        for w in b.waits or []
    ]
    yield table("waits", ("phase", "thread", "#ms", "kernel stack, innermost first"), rows)


def witnesses(b: Breakdown) -> Iterator[str]:
    """The witnesses: downtime figures from other sources."""
    rows = [
        f"<td>{escaped(w.name)}</td>{_ns(w.value_ns)}{_ns(w.value_ns - w.difference_ns)}"
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


def table(name: str, head: Sequence[str], rows: Iterable[str]) -> str:
    """A table, nothing without rows; a `#` before a column's name aligns it as numbers."""
    lines = [f"<tr>{_labelled(row, head)}</tr>\n" for row in rows]
    if not lines:
        return ""
    cells = "".join(
        f"<th class='n' scope='col'>{term(h[1:])}</th>"
        if h.startswith("#")
        else f"<th scope='col'>{term(h)}</th>"
        if h
        else "<td></td>"
        for h in head
    )
    wide = " class='wide'" if len(head) > _WIDE else ""
    whole = f"<div class='scroll'><table id='{name}'{wide}>\n<thead><tr>{cells}</tr></thead>\n"
    whole += f"<tbody>\n{''.join(lines)}</tbody></table></div>\n"
    return whole if len(lines) <= _MANY else f"<details><summary>{len(lines)} rows</summary>\n{whole}</details>\n"


def _labelled(row: str, head: Sequence[str]) -> str:
    """The cells of a row with the heads of their columns: on a narrow screen, a row is a list of them."""
    first, *cells = row.split("<td")
    labels = (html.escape(h.lstrip("#")) for h in head)
    return first + "".join(f"<td data-label='{label}'{cell}" for label, cell in zip(labels, cells, strict=False))


def slot_name(slot: int) -> str:
    """The memslot's number, and its address space if that is not the first."""
    return f"{slot & 0xFFFF}" + (f" of space {slot >> 16}" if slot >> 16 else "")


def _count(value: int | None) -> str:
    return f"<td class='n'>{'-' if value is None else value}</td>"


def _ns(value: int | None) -> str:
    return f"<td class='n'>{milliseconds(value)}</td>"
