# SPDX-License-Identifier: Apache-2.0
"""Sweeps of delays: pages on demand, and a VMM that replaces itself.

In: the number of runs. Out: a table, and whether all runs were right.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable

from tests.truth.execs import PHASES
from tests.truth.parts import Plan
from tests.truth.replaced import replaced
from tests.truth.restores import restored

MS = 1_000_000
PAGE_DELAYS_NS = (MS // 5, 1 * MS, 5 * MS, 20 * MS)
BACKENDS = (("userfaultfd", False), ("file", False), ("userfaultfd", True))
DELAYS_NS = (10 * MS, 30 * MS, 100 * MS)


def demand(runs: int, say: Callable[[str], None], first: int = 0) -> bool:
    """Restores with memory on demand: each back end with each delay in turn, the number of pages at random."""
    worst: dict[tuple[str, int], list[int]] = {}
    good = 0
    for number in range(first, first + runs):
        backend, interrupts = BACKENDS[number % len(BACKENDS)]
        delay = PAGE_DELAYS_NS[number // len(BACKENDS) % len(PAGE_DELAYS_NS)]
        pages = random.Random(number).choice((1, 8, 32, 64))
        with tempfile.TemporaryDirectory() as directory:
            plan = Plan(
                delays={"page": delay},
                address=directory,
                backend=backend,
                interrupts=interrupts,
                dirty_pages=pages,
                slots=1,
            )
            seen = restored(plan)
        wrong = seen.wrong()
        good += not wrong
        if wrong:
            say(f"run {number}: {wrong}; {plan}; {seen.breakdown.page_faults}; served {seen.served}")
        each = (seen.waits.waited_ns - seen.least_ns) // max(1, seen.waits.count)
        worst.setdefault((f"{seen.waits.source}{', interrupts' if interrupts else ''}", delay), []).append(each)
    say(f"{'pages by':<26}{'delay':>10}{'runs':>6}{'more than the server, a page: median, most':>46}")
    for (who, delay), more in sorted(worst.items()):
        middle = sorted(more)[len(more) // 2]
        say(f"{who:<26}{delay / MS:>7} ms{len(more):>6}{middle / 1000:>32.0f}, {max(more) / 1000:>5.0f} us")
    say(f"{good} of {runs} runs counted every wait, and its time lies between the server's and the guest's")
    return good == runs


def execs(runs: int, say: Callable[[str], None], first: int = 0) -> bool:
    """Live updates by execve(2): each phase with each delay in turn, every fifth run with all phases."""
    ranges: dict[tuple[str, int], list[int]] = {}
    good = 0
    for number in range(first, first + runs):
        die = random.Random(number)
        phase, delay = PHASES[number % len(PHASES)], DELAYS_NS[number // len(PHASES) % len(DELAYS_NS)]
        delays = {phase: delay}
        if number % 5 == 4:
            delays = {name: die.choice(DELAYS_NS) for name in PHASES} | delays
        with tempfile.TemporaryDirectory() as directory:
            seen = replaced(Plan(delays=delays, address=directory, vcpus=die.choice((1, 2)), slots=die.choice((1, 8))))
        good += seen.sound()
        if not seen.sound():
            say(f"run {number}: {delays}: wrong {seen.wrong()}; {seen.breakdown.migration}; truth {seen.truth}")
            say(f"  memory {seen.same_memory}; {seen.breakdown.completeness}; waits {seen.breakdown.waits}")
        for name, wanted in delays.items():
            ours, (least, _) = seen.breakdown.phase_ns(name), seen.truth[name]
            ranges.setdefault((name, wanted), []).append(ours - max(least, seen.injected[name]))
    say(f"{'phase':<14}{'delay':>8}{'runs':>6}{'more than the delay: median, most':>36}")
    for name in PHASES:
        for delay in DELAYS_NS:
            if more := ranges.get((name, delay)):
                middle = sorted(more)[len(more) // 2]
                say(f"{name:<14}{delay // MS:>5} ms{len(more):>6}{middle / 1000:>23.0f}, {max(more) / 1000:>7.0f} us")
    say(f"{good} of {runs} runs: every delay in its phase, the guest's memory unchanged")
    return good == runs
