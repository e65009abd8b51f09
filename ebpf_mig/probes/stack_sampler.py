# SPDX-License-Identifier: Apache-2.0
"""Samples of kernel stacks inside dirty-log ioctls: when to take them, on which threads, how often.

In: the events as they arrive. Out: CPU clock events (perf_event_open(2)) that run our BPF program on the fetching
threads; and `Samples` events, which add up the equal stacks of one ioctl.

A sample is a timer interrupt: about 1 us on bare metal, and 12 us as measured in a virtual machine. So only threads
with long fetches are sampled. Sampling is slow while the guest runs, and fast from the first kick to the first send
after the final fetch. It never takes more than a hundredth of a fetch.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ebpf_mig.linux import clock, kvm
from ebpf_mig.linux.perf import ThreadClock
from ebpf_mig.recording.events import SEND, AnyEvent, Ioctl, Kick, Samples, Transfer, VcpuEnter
from ebpf_mig.recording.thresholds import FETCH_GAP_NS

FASTEST_NS = 100_000
"""The fast period: 10 kHz."""
SLOW_NS = 1_000_000
"""The period while the guest runs."""
WORTH_NS = 1_000_000
"""A fetch with less kernel time than this would get too few samples."""
WANTED = 200
"""Enough samples of the final fetch: the standard error is at most 3.5 percentage points."""
MOST_SHARE = 100
"""Sampling takes at most 1/MOST_SHARE of a thread's time."""
GIVE_UP_NS = 2_000_000_000
"""A kick without a fetch within this time was not the stop of a migration."""

_TRIAL_NS, _TRIES = 20_000, 12


def cost_ns(program_fd: int) -> int:
    """The cost of one sample in ns, measured on this thread in a few ms. OSError if sampling is impossible."""
    sampling = ThreadClock(threading.get_native_id(), program_fd, SLOW_NS)
    plain = min(_spin() for _ in range(_TRIES))
    sampling.pace(_TRIAL_NS)
    sampled = min(_spin() for _ in range(_TRIES))
    sampling.close()
    return max(0, sampled - plain) * _TRIAL_NS // sampled


def _spin() -> int:
    """The duration of a fixed piece of work, about 0.3 ms."""
    begin = time.perf_counter_ns()
    for _ in range(10_000):
        pass
    return time.perf_counter_ns() - begin


@dataclass
class _Process:
    """The sampling state of one traced process."""

    fetched_ns: dict[int, int] = field(default_factory=dict)
    """Kernel time of the latest fetch, by thread."""
    until_ns: int = 0
    """End of the latest dirty-log ioctl."""
    kicked_ns: int = 0
    """When the current stop began, as far as known; 0: the guest runs."""
    done: bool = False
    """Whether the final fetch is over."""
    clocks: dict[int, ThreadClock] = field(default_factory=dict)
    vcpus: set[int] = field(default_factory=set)


class Sampler:
    """Decides when to sample, and samples. `program_fd` is the loaded BPF program; `set_period` passes it the current
    period.

    `cost` is the cost of one sample in ns, from `cost_ns`.
    """

    def __init__(self, program_fd: int, set_period: Callable[[int], None], cost: int = 0) -> None:
        self._program_fd, self._set_period = program_fd, set_period
        self._least_ns = cost * MOST_SHARE
        self._processes: dict[int, _Process] = {}
        self._opened: dict[int, int] = {}
        self._samples: dict[tuple[int, int], Counter[tuple[int, tuple[str, ...]]]] = {}
        self.refusal = ""
        self.period_ns = 0

    def take(self, sample: Samples) -> None:
        """Keeps one sample until its ioctl is over."""
        same = self._samples.setdefault((sample.tid, sample.begin_ns), Counter())
        same[sample.period_ns, sample.stack] += 1

    def of(self, ioctl: Ioctl) -> list[Samples]:
        """The samples of a finished ioctl. None if sampling began during the ioctl, since they would overrepresent its
        end.
        """
        if not self._samples:
            return []
        counts = self._samples.pop((ioctl.tid, ioctl.begin_ns), None)
        for stale in [key for key in self._samples if key[0] == ioctl.tid and key[1] < ioctl.begin_ns]:
            del self._samples[stale]
        if not counts or self._opened.get(ioctl.tid, 0) > ioctl.begin_ns:
            return []
        return [
            Samples(ioctl.begin_ns, ioctl.pid, ioctl.tid, period, count, stack)
            for (period, stack), count in sorted(counts.items())
        ]

    def follow(self, events: Sequence[AnyEvent]) -> None:
        """Processes events in order and adjusts the sampling period."""
        for event in events:
            if isinstance(event, Ioctl):
                if event.cmd in kvm.DIRTY_LOG:
                    self._fetched(event)
            elif isinstance(event, Kick):
                self._kicked(event)
            elif isinstance(event, VcpuEnter):
                self._process(event.pid).vcpus.add(event.tid)
                if (process := self._process(event.pid)).kicked_ns and event.at_ns > process.kicked_ns:
                    process.kicked_ns, process.done = 0, False
            elif isinstance(event, Transfer) and event.direction == SEND:
                self._sent(event)
        self._set_pace()

    def forget(self, pid: int) -> None:
        """Stops sampling a process."""
        process = self._processes.pop(pid, None)
        for tid, sampling in process.clocks.items() if process else ():
            sampling.close()
            self._opened.pop(tid, None)
        self._set_pace()

    def close(self) -> None:
        """Stops all sampling; idempotent."""
        for pid in list(self._processes):
            self.forget(pid)

    def _process(self, pid: int) -> _Process:
        return self._processes.setdefault(pid, _Process())

    def _fetched(self, ioctl: Ioctl) -> None:
        process = self._process(ioctl.pid)
        before = process.fetched_ns.get(ioctl.tid, 0) if ioctl.begin_ns - process.until_ns < FETCH_GAP_NS else 0
        process.fetched_ns[ioctl.tid] = took = before + ioctl.end_ns - ioctl.begin_ns
        process.until_ns = max(process.until_ns, ioctl.end_ns)
        known = ioctl.tid in process.clocks or ioctl.tid in process.vcpus
        if took >= WORTH_NS and not known and self._program_fd >= 0:
            self._watch(process, ioctl.tid)

    def _watch(self, process: _Process, tid: int) -> None:
        try:
            process.clocks[tid] = sampling = ThreadClock(tid, self._program_fd, SLOW_NS)
            sampling.pace(self.period_ns)
        except OSError as error:
            self.refusal = error.strerror or str(error)
            return
        self._opened[tid] = clock.monotonic_ns()

    def _kicked(self, kick: Kick) -> None:
        process = self._process(kick.pid)
        if process.clocks and not process.kicked_ns:
            process.kicked_ns, process.done = kick.at_ns, False

    def _sent(self, send: Transfer) -> None:
        process = self._process(send.pid)
        if process.kicked_ns and process.kicked_ns < process.until_ns <= send.begin_ns:
            process.done = True

    def _wanted(self, process: _Process) -> int:
        if not process.clocks or process.done:
            return 0
        if process.kicked_ns and clock.monotonic_ns() - max(process.kicked_ns, process.until_ns) < GIVE_UP_NS:
            longest = max(process.fetched_ns.values(), default=0)
            return max(min(max(longest // WANTED, FASTEST_NS), SLOW_NS), self._least_ns)
        return max(SLOW_NS, self._least_ns)

    def _set_pace(self) -> None:
        """Sets one period for all: concurrent migrations on a host share the shortest period that one of them needs."""
        wanted = [period for process in self._processes.values() if (period := self._wanted(process))]
        period = min(wanted, default=0)
        if period == self.period_ns:
            return
        self._set_period(period or self.period_ns)
        self.period_ns = period
        for process in self._processes.values():
            for sampling in process.clocks.values():
                with contextlib.suppress(OSError):  # the thread is gone
                    sampling.pace(period)


def sampler(program_fd: int, set_period: Callable[[int], None]) -> tuple[Sampler, str]:
    """A sampler, and the reason if it takes no samples although its program was loaded."""
    try:
        return Sampler(program_fd, set_period, cost_ns(program_fd) if program_fd >= 0 else 0), ""
    except OSError as error:
        return Sampler(-1, set_period), f"perf_event_open: {error.strerror or error}"
