# SPDX-License-Identifier: Apache-2.0
"""Overhead of tracing for a process that sends as fast as it can: a million sends, traced and untraced in turn.

In: the number of sends and of rounds. Out: rows of (workload, ns per call, calls per second), and whether every send
was counted.
"""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from ebpf_mig.recording.events import Ending, Transfer
from tests.truth.harness import helpers, work

WORKLOADS = {"sends-running": "beside a running guest", "sends": "while no guest runs"}


def untraced(name: str, count: int) -> dict[str, Any]:
    """The workload's own figures without tracing."""
    with helpers(("tests.truth.workloads", name, str(count))) as (helper,):
        helper.say("go")
        said: dict[str, Any] = json.loads(helper.expect())
        return said


def measure(count: int, rounds: int) -> tuple[list[tuple[str, float, float]], bool]:
    """The rows, and whether nothing was lost and every call and byte was counted."""
    rows: list[tuple[str, float, float]] = []
    exact = True
    for name, what in WORKLOADS.items():
        alone, watched, added = [], [], []
        for _ in range(rounds):
            alone.append(untraced(name, count)["ns"] / count)
            said, events = work(name, count)
            watched.append(said["ns"] / count)
            added.append(watched[-1] - alone[-1])
            sends = [e for e in events if isinstance(e, Transfer) and e.socket == said["socket"] and e.direction == 0]
            ending = next(e for e in events if isinstance(e, Ending))
            counted = sum(e.calls for e in sends), sum(e.bytes for e in sends)
            exact &= not ending.lost and counted == (said["calls"], said["bytes"])
        for label, values in (("untraced", alone), ("traced", watched)):
            rows.append((f"{what}, {label}", median(values), 1e9 / median(values)))
        rows.append((f"{what}, added (median of pairs)", median(added), 0.0))
    return rows, exact
