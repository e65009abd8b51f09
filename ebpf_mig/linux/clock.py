# SPDX-License-Identifier: Apache-2.0
"""The clock of every stamp: the host's CLOCK_MONOTONIC, as BPF programs read it (bpf_ktime_get_ns).

In: nothing. Out: instants in ns, also where this process has a time namespace of its own, and the same instant on the
wall clock. Only waiting for something uses Python's clock.
"""

from __future__ import annotations

import functools
import time

from ebpf_mig.linux import namespaces

_ahead_ns = functools.cache(namespaces.clock_ahead_ns)


def monotonic_ns() -> int:
    """Now, on the host's clock."""
    return time.monotonic_ns() - _ahead_ns()


def bracket(tries: int = 5) -> tuple[int, int, int]:
    """(CLOCK_MONOTONIC, CLOCK_REALTIME, doubt) of one instant, in ns: the tightest of a few brackets.

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
