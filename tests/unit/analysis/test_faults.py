# SPDX-License-Identifier: Apache-2.0
"""What a vCPU waited for, by its kernel stack. The stacks are those of real kernels."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from ebpf_mig.analysis import faults
from ebpf_mig.breakdown import PageSource, PageWaits
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import AnyEvent, PageFaults, VcpuSleep, VcpuState
from ebpf_mig.recording.file import Recording
from ebpf_mig.report import text
from tests.unit.scripts import qemu_7_2

BELOW = ("__handle_mm_fault", "handle_mm_fault", "__get_user_pages", "get_user_pages_unlocked", "hva_to_pfn")
STACKS = {
    PageSource.USERFAULTFD: ("handle_userfault", "do_anonymous_page", *BELOW),
    PageSource.FILE: ("io_schedule", "folio_wait_bit_common", "filemap_fault", "__do_fault", *BELOW),
    PageSource.SWAP: ("io_schedule", "folio_wait_bit_common", "do_swap_page", *BELOW),
    PageSource.OTHER: ("rwsem_down_read_slowpath", "down_read", "handle_mm_fault"),
    PageSource.UNKNOWN: (),
    None: ("kvm_vcpu_block.isra.0", "kvm_vcpu_halt", "vcpu_run", "kvm_arch_vcpu_ioctl_run"),
}
MS = 1_000_000


def sleep(stack: tuple[str, ...], pending: int = 0) -> VcpuSleep:
    return VcpuSleep(1, 2, 3, 4, count=1, slept_ns=1, longest_ns=1, pending=pending, stack=stack)


@pytest.mark.parametrize("source", list(STACKS), ids=str)
def test_the_stack_says_where_the_page_came_from(source: PageSource | None) -> None:
    assert faults.source_of(sleep(STACKS[source])) == source


def test_a_halt_with_a_page_outstanding_is_a_wait_for_it() -> None:
    assert faults.source_of(sleep(STACKS[None], pending=1)) == PageSource.BACKGROUND
    assert faults.source_of(sleep(STACKS[PageSource.FILE], pending=1)) == PageSource.FILE


def with_sleeps(*sleeps: tuple[int, int, int, tuple[str, ...]], faults_of: tuple[int, int] | None) -> Recording:
    """A migration after whose start the destination's vCPU slept: begin, end (ns after the start), times, stack."""
    recording = qemu_7_2().recording
    b = analyse(recording)
    assert b.traced.destination is not None and b.traced.switchover is not None
    start, pid = b.traced.switchover.first_start, b.traced.destination.pid
    (line,) = b.traced.destination.vcpus.values()
    assert start is not None
    more: list[AnyEvent] = [
        VcpuSleep(start + begin, start + end, pid, line.tid, times, times * MS, 2 * MS, 0, stack)
        for begin, end, times, stack in sleeps
    ]
    if faults_of is not None:
        more.append(PageFaults(start + 1000 * MS, pid, line.tid, *faults_of))
    return replace(recording, events=[*recording.events, *more])


def test_sums_by_source_and_the_row_of_the_report() -> None:
    userfault, halt = STACKS[PageSource.USERFAULTFD], STACKS[None]
    write_protected = ("handle_userfault", "do_wp_page", *BELOW)
    sleeps = ((MS, 9 * MS, 4, userfault), (2 * MS, 30 * MS, 3, write_protected), (0, 90 * MS, 50, halt))
    b = analyse(with_sleeps(*sleeps, faults_of=(40, 2))).breakdown
    assert b.page_faults is not None
    (row,) = b.page_faults
    assert row.waits == [
        PageWaits(source=PageSource.USERFAULTFD, count=7, waited_ns=7 * MS, longest_ns=2 * MS, last_ns=30 * MS)
    ]
    assert (row.minor, row.major) == (40, 2)
    shown = " ".join(text.render(b).split())
    assert (
        "page faults 7.000 ms, vCPUs waited for pages after the start: userfaultfd 7 times, 7.000; longest 2.000 "
        "(vCPU 0); the kernel counted 42 page faults, 2 of them major" in shown
    )


def test_sleeps_without_a_stack_are_a_doubt_and_no_wait() -> None:
    b = analyse(with_sleeps((0, MS, 3, ()), faults_of=None)).breakdown
    assert "3 sleeps of vCPUs without a stack" in " ".join(text.render(b, verbose=True).split())


def test_an_old_recording_has_no_row() -> None:
    b = analyse(qemu_7_2().recording).breakdown
    assert b.page_faults is None and "page faults" not in text.render(b)


def test_it_belongs_to_one_vcpu_thread() -> None:
    recording = with_sleeps((0, MS, 3, STACKS[PageSource.FILE]), faults_of=(1, 1))
    others = [
        replace(event, tid=event.tid + 1) if isinstance(event, VcpuSleep | PageFaults) else event
        for event in recording.events
        if not isinstance(event, VcpuState)
    ]
    b = analyse(replace(recording, events=others)).breakdown
    assert b.page_faults is not None
    assert [(row.waits, row.minor, row.major) for row in b.page_faults] == [([], None, None)]
