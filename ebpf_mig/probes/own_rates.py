# SPDX-License-Identifier: Apache-2.0
"""What tracing takes where our programs take no time stamp: in each run, and in each system call of the host.

In: attached programs. Out: an `OwnRates`. The same system call, made by this process, is timed before and after the
programs are attached. It shows what the kernel adds to a call once a program listens to system calls, together with two
runs that end after their first test. The kernel's run statistics say how much of it these two runs are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

from ebpf_mig.linux import clock
from ebpf_mig.recording.events import OwnRates

BATCHES, CALLS = 30, 100
"""3000 calls take about 2 ms. The fastest batch counts: nothing interrupted it."""
USUAL_RUN_NS = 55
"""A run that ends after its first test, where it cannot be measured: 52 to 60 ns on Linux 6.18."""
_PROGRAMS = ("on_sys_enter", "on_sys_exit")
_Ran = Mapping[str, tuple[int, int, int]]


def time_call() -> float:
    """What a getppid(2) of this process takes, with Python's loop around it, in ns."""
    call, best = os.getppid, float("inf")
    for _ in range(BATCHES):
        begin = time.perf_counter_ns()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter_ns() - begin) / CALLS)
    return best


def measure(alone_ns: float, statistics: Callable[[], _Ran]) -> OwnRates:
    """The rates, after the programs were attached. `alone_ns`: `time_call` before that. `statistics`: (ns, runs,
    misses) of each loaded function.
    """
    before = statistics()
    if not any(name in before for name in _PROGRAMS):
        return OwnRates(clock.monotonic_ns(), USUAL_RUN_NS, 0)
    traced_ns = time_call()
    after = statistics()
    seen = [name for name in _PROGRAMS if name in before]
    run_ns, runs = (sum(after[name][i] - before[name][i] for name in seen) for i in (0, 1))
    longer = max(0, round(traced_ns - alone_ns))
    return OwnRates(clock.monotonic_ns(), round(run_ns / runs) if run_ns else USUAL_RUN_NS, longer)
