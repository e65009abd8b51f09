# SPDX-License-Identifier: Apache-2.0
"""The clocks that stamps are made with, one against the other.

In: nothing. Out: instants in ns, and how far two readings can lie apart.
"""

from __future__ import annotations

import time


def bracket(tries: int = 5) -> tuple[int, int, int]:
    """(CLOCK_MONOTONIC, CLOCK_REALTIME, doubt) of one instant, in ns: the tightest of a few brackets.

    The wall clock was read within `doubt` of the monotonic instant.
    """
    best: tuple[int, int, int] | None = None
    for _ in range(tries):
        before = time.monotonic_ns()
        real = time.time_ns()
        after = time.monotonic_ns()
        doubt = (after - before + 1) // 2
        if best is None or doubt < best[2]:
            best = (before + after) // 2, real, doubt
    assert best is not None  # noqa: S101 - tries is at least 1
    return best
