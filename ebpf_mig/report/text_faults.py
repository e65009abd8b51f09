# SPDX-License-Identifier: Apache-2.0
"""Rows of the terminal report on the pages that vCPUs waited for after the guest's start.

In: parts of a breakdown. Out: rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from ebpf_mig.breakdown import Breakdown, Mode, PageSource, VcpuFaults
from ebpf_mig.report.rows import Row, figure, ms

_FROM_FILES = frozenset({Mode.RESTORE, Mode.SNAPSHOT})
_WORDS = {
    PageSource.USERFAULTFD: "userfaultfd",
    PageSource.FILE: "its file",
    PageSource.SWAP: "swap",
    PageSource.BACKGROUND: "the kernel's background fetch",
    PageSource.OTHER: "other page faults",
    PageSource.UNKNOWN: "unknown",
}


def rows(b: Breakdown) -> Iterator[Row]:
    """What all vCPUs waited for, the longest wait, and the kernel's own count of page faults."""
    found = b.page_faults
    if found is None:
        return
    waits = [(one.longest_ns, -vcpu.vcpu, one) for vcpu in found for one in vcpu.waits if _is_known(one.source)]
    counted = _counted(found)
    if waits:
        longest, vcpu, _ = max(waits, key=lambda wait: wait[:2])
        total = sum(one.waited_ns for _, _, one in waits)
        text = f"vCPUs waited for pages after the start: {_by_source(found)}"
        yield figure("page faults", total, f"{text}; longest {ms(longest)} (vCPU {-vcpu}){counted}")
    elif counted and b.migration.mode in _FROM_FILES:
        yield Row("page faults", f"no vCPU waited for a page after the start{counted}")
    for one in found:
        if one.waits and len(found) > 1:
            each = _by_source([one])
            yield Row("", f"vCPU {one.vcpu}: {each}; longest {ms(max(w.longest_ns for w in one.waits))}", verbose=True)
    unknown = sum(one.count for vcpu in found for one in vcpu.waits if not _is_known(one.source))
    if unknown:
        yield Row("", f"{unknown} sleeps of vCPUs without a stack: halted, or waiting for a page", verbose=not waits)


def _is_known(source: PageSource) -> bool:
    return source != PageSource.UNKNOWN


def _by_source(found: list[VcpuFaults]) -> str:
    """`userfaultfd 23 times, 12.345; its file 3 times, 0.840`."""
    parts = []
    for source in filter(_is_known, PageSource):
        mine = [one for vcpu in found for one in vcpu.waits if one.source == source]
        if mine:
            count = sum(one.count for one in mine)
            times = f"{count} time{'s' if count != 1 else ''}"
            parts.append(f"{_WORDS[source]} {times}, {ms(sum(one.waited_ns for one in mine))}")
    return "; ".join(parts)


def _counted(found: list[VcpuFaults]) -> str:
    """`; 512 page faults, 3 of them major`, of the vCPUs whose threads were still there."""
    known = [(one.minor, one.major) for one in found if one.minor is not None and one.major is not None]
    if not known:
        return ""
    minor, major = map(sum, zip(*known, strict=True))
    return f"; the kernel counted {minor + major} page faults, {major} of them major"
