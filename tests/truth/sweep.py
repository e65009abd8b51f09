# SPDX-License-Identifier: Apache-2.0
"""The full sweep: every phase with every delay, in all orders and dirty-log modes.

In: the number of runs. Out: a table, and whether all delays were attributed to the right phases.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.truth.harness import PHASES, Run, undisturbed
from tests.truth.parts import Plan

MS = 1_000_000
DELAYS_NS = (1 * MS, 5 * MS, 20 * MS)
MODES = ("legacy", "manual", "initially-set", "ring")


def plan_for(number: int) -> Plan:
    """The plan of the nth run: phases and delays in turn, every fifth run with all phases. The rest is random with a
    fixed seed.
    """
    die = random.Random(number)
    delay = DELAYS_NS[number // len(PHASES) % len(DELAYS_NS)]
    phase = PHASES[number % len(PHASES)]
    delays = {phase: delay}
    if number % 5 == 4:
        delays = {name: die.choice(DELAYS_NS) for name in PHASES if name != "fetch.kernel"} | delays
    return Plan(
        delays=delays,
        spin=die.random() < 0.3,
        # Only a log that begins all dirty has a CLEAR that holds the lock for long.
        log="initially-set" if "fetch.kernel" in delays else die.choice(MODES),
        state_first=die.random() < 0.5,
        late_reader=die.random() < 0.5,
        vcpus=die.choice((1, 1, 2)),
        slots=die.choice((1, 2, 8)),
        dirty_pages=die.choice((1, 64, 400)),
        seed=number,
    )


def sound(run: Run) -> bool:
    """Whether every phase is right, nothing was lost, fetches found exactly the dirtied pages, and memory arrived
    unchanged.
    """
    exact = not any(fetch["missing"] or fetch["surplus"] for fetch in run.fetched)
    return not run.wrong() and exact and run.same_memory and not run.breakdown.completeness.lost


def sweep(runs: int, say: Callable[[str], None], first: int = 0) -> bool:
    """Runs and prints. Returns whether all runs were sound."""
    worst: dict[tuple[str, int], list[int]] = {}
    good = doubtful = 0
    for number in range(first, first + runs):
        plan = plan_for(number)
        run = undisturbed(plan, unix=number % 2 == 1)
        doubtful += bool(run.doubtful())
        good += sound(run)
        if not sound(run):
            say(f"run {number}: {plan}")
            say(f"  wrong: {run.wrong()}; fetched: {run.fetched}; doubtful: {run.doubtful()}; truth: {run.truth}")
            say(f"  unattributed: {run.breakdown.phase_ns('unattributed')} ns; waits: {run.breakdown.waits}")
        for phase in plan.delays:
            worst.setdefault((phase, plan.delays[phase]), []).append(run.error(phase))
    say(f"{'phase':<14}{'delay':>8}{'runs':>6}{'worst error':>14}")
    for phase in PHASES:
        for delay in DELAYS_NS:
            if errors := worst.get((phase, delay)):
                say(f"{phase:<14}{delay // MS:>5} ms{len(errors):>6}{max(errors, key=abs) / 1000:>11.1f} us")
    say(f"{good} of {runs} runs booked every phase within 5 % or 200 us; {doubtful} with an uncertain truth")
    return good == runs
