# SPDX-License-Identifier: Apache-2.0
"""The part of the event model on vCPUs: entries to and returns from KVM_RUN, times outside of it, kicks.

In: nothing. Out: structs. The conventions are those of `events.py`, which exports them all.
"""

from __future__ import annotations

from ebpf_mig.recording.fields import (
    Bits64,
    Count,
    Duration,
    Event,
    Fd,
    Flag,
    Instant,
    MaybeDuration,
    Pid,
    Returned,
    Symbol,
)


class VcpuEnter(Event, frozen=True, tag=2):
    """A recorded KVM_RUN entry: the first of its thread, or the first after a gap or an error."""

    at_ns: Instant
    pid: Pid
    tid: Pid
    fd: Fd
    last_exit_ns: Instant
    """Return of this thread's previous KVM_RUN; 0 if none was seen."""
    last_ret: Returned
    """Its return value; -4 is -EINTR."""
    runs: Count
    """Number of KVM_RUN entries of this thread so far, including this one."""


class VcpuExit(Event, frozen=True, tag=3):
    """A KVM_RUN that returned an error. It is nearly always -EINTR: the vCPU was kicked."""

    at_ns: Instant
    pid: Pid
    tid: Pid
    fd: Fd
    enter_ns: Instant
    """Entry of the same call; 0 if the thread was already inside when tracing began."""
    ret: Returned
    preempted_ns: MaybeDuration = -1
    """The part of the call in which the thread was runnable, but another thread had its CPU; -1 unknown."""

    @property
    def on_cpu_ns(self) -> int:
        """The length of the call without the time for which the thread was preempted."""
        return self.at_ns - self.enter_ns - max(0, self.preempted_ns)


class VcpuState(Event, frozen=True, tag=4):
    """The in-kernel accounting of one vCPU thread, read when tracing ended or the thread exited."""

    at_ns: Instant
    pid: Pid
    tid: Pid
    fd: Fd
    enter_ns: Instant
    """Entry of the latest KVM_RUN."""
    exit_ns: Instant
    """Latest return of KVM_RUN; smaller than `enter_ns` while the thread is inside a call."""
    ret: Returned
    runs: Count
    in_ns: Duration
    """Time inside KVM_RUN, of all calls of which entry and return were seen."""
    out_ns: Duration
    """Time between KVM_RUN calls."""
    max_gap_ns: Duration


class VcpuSpan(Event, frozen=True, tag=14):
    """Time of one vCPU thread outside KVM_RUN from one fetch of its process to the next (or for 250 ms).

    A gap counts in the span in which it began. A vCPU that did not leave KVM_RUN has no span.
    """

    since_ns: Instant
    """Begin of the first gap; 0 for the first span of a thread."""
    until_ns: Instant
    """End of the last gap."""
    pid: Pid
    tid: Pid
    outside_ns: Duration
    longest_ns: Duration
    gaps: Count
    lock_ns: MaybeDuration = -1
    """Time inside KVM_RUN waiting for locks (mostly mmu_lock); -1 unknown."""


class Kick(Event, frozen=True, tag=5):
    """tgkill(2) from one thread of a traced process to another. VMMs stop vCPUs this way."""

    at_ns: Instant
    pid: Pid
    tid: Pid
    target_tid: Pid
    signal: Bits64


class VcpuSleep(Event, frozen=True, tag=30):
    """The sleeps of one vCPU thread inside KVM_RUN with the same kernel stack, after its guest was seen to start.

    Read when tracing ended. A vCPU that is halted sleeps, too: the stack tells why.
    """

    since_ns: Instant
    """Begin of the first."""
    until_ns: Instant
    """End of the last."""
    pid: Pid
    tid: Pid
    count: Count
    slept_ns: Duration
    """All together."""
    longest_ns: Duration
    pending: Flag = 0
    """1: meanwhile a kernel thread fetched a page for this vCPU (KVM's asynchronous page fault)."""
    stack: tuple[Symbol, ...] = ()
    """Kernel functions, innermost first; empty: not known."""


class PageFaults(Event, frozen=True, tag=31):
    """The page faults of one vCPU thread while it was traced, as the kernel counts them.

    Source: `minflt` and `majflt` in /proc/PID/task/TID/stat (proc(5)). Pages that KVM maps for the guest are among
    them (mm_account_fault, mm/memory.c, Linux 5.10 to 6.18), but not those that a userfaultfd handler filled: after the
    wait the page is there, and that is no fault (__get_user_pages, mm/gup.c).
    """

    at_ns: Instant
    """When it was read."""
    pid: Pid
    tid: Pid
    minor: Count
    """Served without reading: the page was in the page cache, or new."""
    major: Count
    """A file had to be read, or the fault was tried again after a wait."""
