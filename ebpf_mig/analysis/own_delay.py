# SPDX-License-Identifier: Apache-2.0
"""By how much our BPF programs delayed a blackout.

In: an analysed migration, its phases. Out: nanoseconds by phase. Only what ran in the process that the phase belongs to
can delay it: in a phase of the source, the source's calls. The sums in a recording are those of CPUs, so they are
shared out by the calls of source and destination at that time.
"""

from __future__ import annotations

from collections.abc import Sequence

from ebpf_mig.analysis import own_time
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.own_cost import Calls, calls_of
from ebpf_mig.analysis.process import Process
from ebpf_mig.breakdown import Phase, Side, Span


def delays(traced: TracedMigration, phases: Sequence[Phase], origin: int, within: Span) -> dict[str, int] | None:
    """ns by phase, of the part of each phase in `within`, which is relative to `origin`. None: not recorded."""
    source, destination = traced.source, traced.destination
    window = origin + within[0], origin + within[1]
    made = {
        side: Calls(calls_of(process, *window)) for side, process in _sides(source, destination) if process is not None
    }
    far = traced.material.header.remote
    spent = {side: own_time.spent(traced.material, far is not None and side is Side.DESTINATION) for side in made}
    found: dict[str, int] = {}
    for phase in phases:
        total = 0.0
        for begin, end in phase.spans:
            since, until = origin + max(begin, within[0]), origin + min(end, within[1])
            if since >= until:
                continue
            host = spent.get(phase.side) or spent.get(Side.SOURCE) or spent.get(Side.DESTINATION)
            if host is None:
                return None
            took = sum(curve.within(since, until) for curve in (*host.vmms, *host.vmm_calls))
            total += min(took * _share(made, phase.side, since, until, far is not None), until - since)
        found[phase.phase.value] = round(total)
    return found


def _sides(source: Process | None, destination: Process | None) -> list[tuple[Side, Process | None]]:
    both = [(Side.SOURCE, source), (Side.DESTINATION, destination)]
    return both[:1] if source is destination else both


def _share(made: dict[Side, Calls], side: Side, since: int, until: int, apart: bool) -> float:
    """The share of a host's calls that the side made. All, if each side has a host, or if both sides' calls count."""
    if apart or side not in made:
        return 1.0
    calls = {one: of.within(since, until) for one, of in made.items()}
    return calls[side] / sum(calls.values()) if sum(calls.values()) else 1.0
