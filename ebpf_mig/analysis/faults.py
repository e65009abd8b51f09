# SPDX-License-Identifier: Apache-2.0
"""What vCPUs waited for after the guest's start: pages that come from a file, or that a userfaultfd handler serves.

In: a `TracedMigration`. Out: rows of the breakdown. It is the same for a restore, for postcopy, and for a source that
runs on while its memory is saved (QEMU's background-snapshot, which write-protects it by userfaultfd).

The kernel half sums up sleeps by stack (`VcpuSleep`). A halted vCPU sleeps, too, in kvm_vcpu_block: that is no wait.
Names of functions are those of Linux 5.10 to 6.18.
"""

from __future__ import annotations

from collections import defaultdict

from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.process import Process
from ebpf_mig.breakdown import PageSource, PageWaits, VcpuFaults
from ebpf_mig.recording.events import VcpuSleep

_USERFAULT = "handle_userfault"
"""fs/userfaultfd.c: also for write protection."""
_FAULTS = frozenset({"handle_mm_fault", "__handle_mm_fault", "faultin_page", "fixup_user_fault"})
"""One of them is below every page fault: mm/memory.c, mm/gup.c."""
_FILES = frozenset({"do_fault", "__do_fault", "do_read_fault", "do_cow_fault", "do_shared_fault", "filemap_fault"})
_SWAP = "do_swap_page"


def observe(traced: TracedMigration) -> list[VcpuFaults] | None:
    """One row for each vCPU of the process that has the guest in the end; None if nothing was traced, or none runs."""
    found, process = traced.switchover, traced.destination
    start, since = (found.first_start, found.stop) if found is not None else (None, 0)
    if start is not None and process is not None:
        lines = process.vcpus.values()
        if not any(line.start_after(start) == start for line in lines):
            process = None  # the guest came back
    process = process or traced.source
    if process is None:
        return None
    if found is None:
        start = min((line.first_run for line in process.vcpus.values() if line.first_run is not None), default=None)
    if start is None or not (process.vcpu_sleeps or process.page_faults):
        return None
    return _rows(process, since, start)


def _rows(process: Process, since: int, start: int) -> list[VcpuFaults]:
    sleeps: dict[int, list[VcpuSleep]] = defaultdict(list)
    for sleep in process.vcpu_sleeps:
        if sleep.since_ns >= since and sleep.until_ns > start:
            sleeps[sleep.tid].append(sleep)
    counts = {event.tid: event for event in process.page_faults}
    rows = []
    for index, line in process.vcpus.items():
        count = counts.get(line.tid) if line.first_run is not None else None
        rows.append(
            VcpuFaults(
                vcpu=index,
                waits=_waits(sleeps[line.tid], start),
                minor=count.minor if count else None,
                major=count.major if count else None,
            )
        )
    return rows


def _waits(sleeps: list[VcpuSleep], start: int) -> list[PageWaits]:
    by_source: dict[PageSource, list[VcpuSleep]] = defaultdict(list)
    for sleep in sleeps:
        if (source := source_of(sleep)) is not None:
            by_source[source].append(sleep)
    return [
        PageWaits(
            source=source,
            count=sum(s.count for s in by_source[source]),
            waited_ns=sum(s.slept_ns for s in by_source[source]),
            longest_ns=max(s.longest_ns for s in by_source[source]),
            last_ns=max(s.until_ns for s in by_source[source]) - start,
        )
        for source in PageSource
        if source in by_source
    ]


def source_of(sleep: VcpuSleep) -> PageSource | None:
    """Where the page came from that a vCPU slept for; None if it slept for something else."""
    frames = {frame.partition(".")[0] for frame in sleep.stack}
    if _USERFAULT in frames:
        return PageSource.USERFAULTFD
    if _SWAP in frames:
        return PageSource.SWAP
    if frames & _FAULTS:
        return PageSource.FILE if frames & _FILES else PageSource.OTHER
    if sleep.pending:
        return PageSource.BACKGROUND
    return None if frames else PageSource.UNKNOWN
