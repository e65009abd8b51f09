# SPDX-License-Identifier: Apache-2.0
"""The clock of all time stamps: the host's CLOCK_MONOTONIC, as BPF programs read it (bpf_ktime_get_ns).

In: nothing. Out: instants in ns, also if this process has its own time namespace; and the same instant on the wall
clock. Timeouts use Python's clock instead.
"""

from __future__ import annotations

import functools
import time

from ebpf_mig.linux import namespaces

_ahead_ns = functools.cache(namespaces.clock_ahead_ns)


def monotonic_ns() -> int:
    """The current time on the host's clock, in ns."""
    return time.monotonic_ns() - _ahead_ns()


def bracket(tries: int = 5) -> tuple[int, int, int]:
    """(CLOCK_MONOTONIC, CLOCK_REALTIME, doubt) of one instant, in ns: the most precise of a few readings.

    The wall clock was read within `doubt` of the monotonic instant.
    """
    best: tuple[int, int, int] | None = None
    for _ in range(tries):
        before = monotonic_ns()
        real = time.time_ns()
        after = monotonic_ns()
        doubt = (after - before + 1) // 2
        if best is None or doubt < best[2]:
            best = (before + after) // 2, real, doubt
    assert best is not None  # noqa: S101 - tries is at least 1
    return best
