# SPDX-License-Identifier: Apache-2.0
"""The guest's slowdown while it still runs: time that its vCPUs spent outside KVM_RUN in each pass, and a baseline.

In: a source process's `VcpuSpan` events. Out: stretches of the breakdown. Call it only if there are such
events: their absence does not mean that no time was lost.

"Outside" means outside the KVM_RUN call: in the VMM, or off the CPU. An exit that the kernel handles by itself is
inside, including a write-protect fault. Of these exits only the waiting for locks is known; measuring each would take a
probe on every VM exit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

from ebpf_mig.analysis.process import Process
from ebpf_mig.breakdown import Span, Stretch, VcpuShare
from ebpf_mig.recording.events import VcpuSpan

LONGEST_NS = 10_000_000_000
"""A span ends with the first exit after 250 ms. Longer spans than this are rare and have one long gap."""


def stretch(process: Process, begin: int, end: int, origin: int) -> Stretch:
    """The time that each vCPU lost in [begin, end). A span that began earlier counts in proportion to its overlap."""
    found: dict[int, list[VcpuSpan]] = defaultdict(list)
    locks = all(span.lock_ns >= 0 for span in process.spans)
    first = bisect_left(process.spans, begin - LONGEST_NS, key=lambda span: span.since_ns)
    for span in process.spans[first:]:
        if span.since_ns >= end:
            break
        if span.until_ns > begin:
            found[span.tid].append(span)
    return Stretch(
        begin=begin - origin,
        duration_ns=max(0, end - begin),
        vcpus=[_share(index, found[line.tid], (begin, end), locks) for index, line in process.vcpus.items()],
    )


def _share(index: int, spans: Sequence[VcpuSpan], within: Span, known: bool) -> VcpuShare:
    """One vCPU's row. `known`: the waiting for locks was traced."""
    begin, end = within
    outside = longest = locks = 0
    for span in spans:
        length = max(1, span.until_ns - span.since_ns)
        inside = min(span.until_ns, end) - max(span.since_ns, begin)
        whole = span.since_ns >= begin
        outside += span.outside_ns if whole else span.outside_ns * inside // length
        locks += span.lock_ns if whole else span.lock_ns * inside // length
        longest = max(longest, span.longest_ns)
    return VcpuShare(vcpu=index, outside_ns=outside, longest_gap_ns=longest, lock_wait_ns=locks if known else None)


def baseline(process: Process, since: int, logging: int | None, length: int, origin: int) -> Stretch | None:
    """The stretch of `length` before logging was switched on, shorter if tracing began later; None without one."""
    if logging is None:
        return None
    begin = max(since, logging - length)
    return stretch(process, begin, logging, origin) if begin < logging else None
