# SPDX-License-Identifier: Apache-2.0
"""Runs the truth machine that replaces itself under the real tracer, and compares the phases with its clock.

In: a `Plan`, whose address is an empty directory. Out: a `Seen`: the breakdown, and for each phase the range that the
truth allows. When the kernel begins to replace the program, and has done so, are its own tracepoints' events.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import Target
from ebpf_mig.recording.file import Recording
from tests.truth.execs import PHASES
from tests.truth.harness import helpers, trace
from tests.truth.parts import SLOWNESS, Plan, encode
from tests.truth.tracefs import traced

REST_NS = int(4_000_000 * SLOWNESS)
"""What a phase takes without a delay, if no thread waits for a CPU."""
AGREES_NS = 100_000
"""The kernel's events are stamped when they occur, to the microsecond."""


@dataclass
class Seen:
    """One live update."""

    breakdown: Breakdown
    truth: dict[str, tuple[int, int]]
    """(at least, at most) ns by phase."""
    injected: dict[str, int]
    same_memory: bool

    def wrong(self) -> dict[str, tuple[int, tuple[int, int]]]:
        """The phases that are outside of what the truth allows: (ours, truth)."""
        ours = {name: self.breakdown.phase_ns(name) for name in PHASES}
        return {n: (ours[n], (least, most)) for n, (least, most) in self.truth.items() if not least <= ours[n] <= most}

    def sound(self) -> bool:
        """Whether it is a live update with an exact partition, and all of it is right."""
        b = self.breakdown
        exact = sum(p.duration_ns or 0 for p in b.phases) == b.window_ns and not b.phase_ns("unattributed")
        kind = (b.migration.mode, b.migration.result) == ("cpr", "completed")
        return kind and exact and self.same_memory and not self.wrong() and not b.completeness.lost


def last(lines: list[tuple[int, str]] | None, pid: int) -> int | None:
    """When the last event of a process was, ns; None: there is no such tracepoint."""
    return max(at for at, fields in lines if f" pid={pid} " in fields) if lines is not None else None


def replaced(plan: Plan) -> Seen:
    """What was seen of a VMM that replaces itself."""
    with (
        traced("sched/sched_prepare_exec") as prepared,
        traced("sched/sched_process_exec") as executed,
        helpers(("tests.truth.execs", "old", encode(plan))) as (helper,),
    ):

        def act() -> list[dict[str, Any]]:
            helper.say("go")
            return [json.loads(helper.expect()), json.loads(helper.expect())]

        header, events, (left, right) = trace([Target(pid=helper.pid, role="source")], act)
    seen = analyse(Recording(header=header, events=events)).breakdown
    injected = {**left["injected"], **right["injected"]}
    whole = {**left["whole"], **right["whole"]}
    waited = left["waited"] + right["waited"]
    served, called = right["served"], left["called"]
    if served is not None:
        injected["exec"] = served[1] - called
    truth = {}
    for name in PHASES:
        delay = injected.get(name, 0)
        truth[name] = int(0.98 * delay), whole.get(name, delay) + waited + REST_NS
    # The kernel opens the program before it ends the other threads, which is still `state.save`. The interpreter starts
    # before it reads a clock.
    begun, done = last(prepared, helper.pid), last(executed, helper.pid)
    assert done is not None
    if begun is not None:
        opening, exact = begun - called, done - begun
        truth["exec"] = exact - AGREES_NS, exact + AGREES_NS
    else:  # before Linux 6.10
        opening = REST_NS + right["waited_before"] - left["waited_before"]
        truth["exec"] = max(0, injected.get("exec", 0) - opening), right["started"] - called
    truth["state.save"] = truth["state.save"][0], truth["state.save"][1] + opening
    truth["startup"] = right["begin"] - right["started"], right["begin"] - done + REST_NS
    return Seen(seen, truth, injected, left["checksum"] == right["checksum"])
