# SPDX-License-Identifier: Apache-2.0
"""The HTML report's tables of the dirty log: the final fetch, the pre-copy passes, logging switched on and off.

In: a breakdown. Out: HTML fragments, empty if there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Iterator

from ebpf_mig.breakdown import Breakdown, FetchIoctl, FinalFetch, Split, Stretch
from ebpf_mig.report.html_markup import count_cell, escaped, limits_of_tcp, milliseconds, ns_cell, size, table
from ebpf_mig.report.reference import REARM


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
        f"<td class='w'>{escaped(i.ioctl)}</td><td>{_slot_name(i.slot)}</td>"
        f"<td class='n'>{size(sizes.get(i.slot))}</td>{ns_cell(i.begin)}{ns_cell(i.duration_ns)}"
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
        f"<td>{at}</td>{ns_cell(p.begin)}{ns_cell(p.kernel_ns)}{ns_cell(p.user_ns)}{ns_cell(p.user_off_cpu_ns)}"
        f"{count_cell(p.pages)}{count_cell(p.pages_at_most)}<td class='n'>{size(p.bytes)}</td>{ns_cell(p.send_ns)}"
        f"{ns_cell(p.blocked_ns)}{count_cell(p.dirty_pages_per_s)}{_stretch(p.brownout)}{_stretch(p.baseline)}"
        f"<td>{limits_of_tcp(p.tcp_info)}</td><td class='bars'>"
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
        f"<td>{'on' if s.on else 'off'}</td>{ns_cell(s.begin)}{ns_cell(s.kernel_ns)}{count_cell(s.slots)}"
        f"{ns_cell(s.in_blackout_ns)}"
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


def _slot_name(slot: int) -> str:
    """The memslot's number, and its address space if that is not the first."""
    return f"{slot & 0xFFFF}" + (f" of space {slot >> 16}" if slot >> 16 else "")
