# SPDX-License-Identifier: Apache-2.0
"""The tables of the HTML report.

In: a breakdown. Out: HTML fragments, nothing where there is nothing to show. Durations in ms with three decimals; what
was not measured is a dash.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence

from ebpf_mig.breakdown import Breakdown, Endpoint, FetchIoctl, Phase
from ebpf_mig.printable import printable

SIDES = {"source": "src", "destination": "dst"}
_MANY = 40
PARTS = ("walk", "flush", "copy", "other")
Split = dict[str, int | str]


def escaped(text: str, limit: int = 400) -> str:
    """Text of others, made harmless in HTML, also inside quotes."""
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
    """The blackout, or why there is none."""
    if b.blackout_ns is None:
        if b.window_ns is None and b.migration.result in {"failed", "cancelled"}:
            return "no blackout: the migration ended before the vCPUs stopped"
        return "blackout not measured"
    word = "aborted blackout" if b.migration.result in {"failed", "cancelled"} else "blackout"
    return f"{word} {milliseconds(b.blackout_ns)} ms"


def facts(b: Breakdown) -> Iterator[str]:
    """What was migrated, from where to where, and how far the page can be trusted."""
    m = b.migration
    vmm = " ".join(filter(None, (m.vmm, m.vmm_version))) or "unknown VMM"
    total = "" if m.total_ns is None else f" after {milliseconds(m.total_ns)} ms"
    yield f"<p>{escaped(vmm)}, {escaped(m.mode)} over {escaped(m.transport)}, {m.connections} connection"
    yield f"{'s' if m.connections != 1 else ''}, <b>{escaped(m.result)}</b>{total}</p>\n"
    yield f"<p class='soft'>{_end('source', m.source)} &rarr; {_end('destination', m.destination)}</p>\n"
    verdict = escaped(b.completeness.verdict)
    why = "".join(f"; {escaped(reason)}" for reason in b.completeness.reasons)
    yield f"<p class='{verdict}'>{verdict}{why}</p>\n"


def _end(side: str, end: Endpoint | None) -> str:
    return f"{side} not traced" if end is None else f"{side} pid {end.pid} on {escaped(end.host or '?')}"


def waterfall(b: Breakdown) -> Iterator[str]:
    """Every phase with its place in the window."""
    if not b.window_ns:
        return
    rows = [
        (
            f"<td class='w'>{p.phase}</td><td>{SIDES.get(p.side, p.side)}</td>{_ns(p.duration_ns)}"
            f"<td class='n'>{100 * p.duration_ns / b.window_ns:.1f} %</td><td class='bars'>{_bar(p, b.window_ns)}</td>"
        )
        for p in b.phases
    ]
    rows.append(
        f"<td>window</td><td></td><td class='n'>{milliseconds(b.window_ns)}</td><td class='n'>100.0 %</td><td></td>"
    )
    yield table("phases", ("phase", "side", "#ms", "#share", ""), rows)


def _bar(phase: Phase, window: int) -> str:
    name = "unattributed" if phase.phase == "unattributed" else phase.side
    bars = "".join(
        f"<rect class='{name}' x='{1000 * begin / window:.2f}' width='{max(1000 * (end - begin) / window, 1.5):.2f}' "
        "y='0' height='10'/>"
        for begin, end in _drawable(phase.spans, window)
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


def vcpus(b: Breakdown) -> Iterator[str]:
    """When each vCPU stopped and started."""
    rows = [f"<td>{v.vcpu}</td>" + _ns(v.blackout_ns) + _ns(v.kick_ns) + _ns(v.stop) + _ns(v.start) for v in b.vcpus]
    yield table("vcpus", ("vCPU", "#blackout ms", "#kick to stop ms", "#stop at ms", "#start at ms"), rows)


def fetch(b: Breakdown) -> Iterator[str]:
    """The final fetch, what it caused, and each of its ioctls."""
    final = b.dirty_log.final
    if final is None:
        return
    pages = "pages not known" if final.pages is None else f"{final.pages} pages"
    yield f"<p><b>{milliseconds(final.kernel_ns + final.user_ns)} ms</b>: "
    yield f"in the kernel {milliseconds(final.kernel_ns)}, in the VMM {milliseconds(final.user_ns)}. "
    yield f"It caused {milliseconds(final.send_ns)} ms of sending: {pages}, "
    yield f"{size(final.bytes)}.</p>\n"
    sizes = {slot.slot: slot.size_bytes for slot in b.dirty_log.slots}
    rows = [
        f"<td class='w'>{escaped(i.ioctl)}</td><td>{slot_name(i.slot)}</td>"
        f"<td class='n'>{size(sizes.get(i.slot))}</td>{_ns(i.begin)}{_ns(i.duration_ns)}"
        f"<td>{_locks(i)}</td><td class='n'>{milliseconds(i.off_cpu_ns)}</td><td>{_split(i)}</td>"
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


def _split(ioctl: FetchIoctl) -> str:
    """The parts of the call; sampled ones with their error at 95 %."""
    if ioctl.split is None:
        return "-"
    parts: list[str] = []
    for name in PARTS:
        ns = ioctl.split.get(name)
        if isinstance(ns, int):
            error = error_of(ioctl.split, name, ioctl.duration_ns)
            parts.append(f"{name} {milliseconds(ns)}" + ("" if error is None else f" ± {milliseconds(error)}"))
    return ", ".join(parts) or "-"


def error_of(whole: Split, name: str, total: int) -> int | None:
    """How far a part may lie off at 95 %: as the breakdown says, else from the number of samples; None if exact."""
    samples, said = whole.get("samples"), whole.get(f"{name}_error")
    if isinstance(said, int):
        return said
    if not isinstance(samples, int) or samples < 1 or total <= 0:
        return None
    share = min(max(int(whole.get(name, 0)) / total, 0), 1)
    return round(1.96 * math.sqrt(share * (1 - share) / samples) * total)


def passes(b: Breakdown) -> Iterator[str]:
    """The passes in order; the bar is what was sent, so that convergence can be seen."""
    most = max((p.bytes for p in b.dirty_log.passes), default=0) or 1
    rows = [
        f"<td>{at}</td>{_ns(p.begin)}{_ns(p.kernel_ns)}{_ns(p.user_ns)}{_count(p.pages)}"
        f"<td class='n'>{size(p.bytes)}</td>{_ns(p.send_ns)}{_ns(p.blocked_ns)}"
        f"{_count(p.dirty_pages_per_s)}<td class='bars'>"
        "<svg class='bar' viewBox='0 0 1000 10' preserveAspectRatio='none' aria-hidden='true'>"
        f"<rect class='source' x='0' y='0' height='10' width='{1000 * p.bytes / most:.1f}'/></svg></td>"
        for at, p in enumerate(b.dirty_log.passes, 1)
    ]
    head = (
        "pass",
        "#at ms",
        "#kernel ms",
        "#user ms",
        "#pages",
        "#sent",
        "#sending ms",
        "#blocked ms",
        "#dirty pages/s",
        "",
    )
    yield table("passes", head, rows)


def sockets(b: Breakdown) -> Iterator[str]:
    """Who moved how much, and where the time in and between the calls went."""
    rows = [
        f"<td class='w'>{escaped(s.role)}</td><td class='n'>{size(s.bytes)}</td><td class='n'>{s.calls}</td>"
        f"{_ns(s.in_call_ns)}{_ns(s.copy_ns)}{_ns(s.blocked_ns)}{_ns(s.between_ns)}"
        f"<td>{escaped(s.local)} &rarr; {escaped(s.remote)}</td>"
        for s in b.sockets
    ]
    head = ("socket", "#bytes", "#calls", "#in calls ms", "#copying ms", "#blocked ms", "#between ms", "ends")
    yield table("sockets", head, rows)


def wire(b: Breakdown) -> Iterator[str]:
    """Sent and not yet received."""
    rows = [
        f"{_ns(w.sent)}{_ns(w.received)}{_ns(w.in_flight_ns)}<td class='n'>{size(w.bytes)}</td>"
        f"<td class='w'>{escaped(w.reason)}</td><td class='why'>{escaped(w.evidence)}</td>"
        for w in b.wire or []
    ]
    yield table("wire", ("#sent at ms", "#received at ms", "#in flight ms", "#bytes", "reason", "evidence"), rows)


def waits(b: Breakdown) -> Iterator[str]:
    """The longest sleeps of the threads that mattered."""
    rows = [
        f"<td class='w'>{escaped(w.phase)}</td><td>{escaped(w.thread)}</td>{_ns(w.duration_ns)}"
        f"<td class='stack'>{' &lt; '.join(map(escaped, w.stack))}</td>"
        for w in b.waits or []
    ]
    yield table("waits", ("phase", "thread", "#ms", "kernel stack, innermost first"), rows)


def witnesses(b: Breakdown) -> Iterator[str]:
    """What others measured."""
    rows = [
        f"<td>{escaped(w.name)}</td>{_ns(w.value_ns)}{_ns(w.value_ns - w.difference_ns)}"
        f"<td class='n'>{w.difference_ns / 1e6:+.3f}</td><td>{escaped(w.explanation)}</td>"
        for w in b.witnesses
    ]
    yield table("witnesses", ("witness", "#says ms", "#ours ms", "#difference ms", "why"), rows)


def completeness(b: Breakdown) -> Iterator[str]:
    """Losses, how we traced, what it cost, clocks, notes."""
    state = b.completeness
    rows = [f"<td>lost: {escaped(name)}</td><td>{count}</td>" for name, count in sorted(state.lost.items())]
    rows += [f"<td>unpaired: {escaped(name)}</td><td>{count}</td>" for name, count in sorted(state.unpaired.items())]
    rows += [
        f"<td>attached: {escaped(name)}</td><td>{escaped(tier)}</td>" for name, tier in sorted(state.attach.items())
    ]
    cost = "not measured" if state.observer_ns is None else f"{milliseconds(state.observer_ns)} ms in all"
    rows.append(f"<td>cost of the observation</td><td>{cost}</td>")
    clock = f"{b.clock.offset_ns / 1e6:+.3f} ± {milliseconds(b.clock.bound_ns)} ms"
    rows.append(f"<td>clock of the destination</td><td>{clock}</td>")
    yield table("completeness", ("what", "how much"), rows)
    if b.notes:
        yield "<ul>" + "".join(f"<li>{escaped(note)}</li>" for note in b.notes) + "</ul>\n"


def table(name: str, head: Sequence[str], rows: Iterable[str]) -> str:
    """A table, nothing without rows; a `#` before a column's name aligns it as numbers."""
    lines = [f"<tr>{row}</tr>\n" for row in rows]
    if not lines:
        return ""
    cells = "".join(
        f"<th class='n' scope='col'>{h[1:]}</th>" if h.startswith("#") else f"<th scope='col'>{h}</th>" for h in head
    )
    whole = f"<div class='scroll'><table id='{name}'>\n<thead><tr>{cells}</tr></thead>\n"
    whole += f"<tbody>\n{''.join(lines)}</tbody></table></div>\n"
    return whole if len(lines) <= _MANY else f"<details><summary>{len(lines)} rows</summary>\n{whole}</details>\n"


def slot_name(slot: int) -> str:
    """The memslot's number, and its address space if that is not the first."""
    return f"{slot & 0xFFFF}" + (f" of space {slot >> 16}" if slot >> 16 else "")


def _count(value: int | None) -> str:
    return f"<td class='n'>{'-' if value is None else value}</td>"


def _ns(value: int | None) -> str:
    return f"<td class='n'>{milliseconds(value)}</td>"
