# SPDX-License-Identifier: Apache-2.0
"""The figures of a breakdown that span two clocks, and the error bound of each.

In: a breakdown of a joined recording, and the clock bounds in its header. Out: the same breakdown with error bounds.
Figures within one host have no bound.
"""

from __future__ import annotations

from msgspec.structs import replace

from ebpf_mig.breakdown import Breakdown, Clock, Phase, PhaseName, Side
from ebpf_mig.joining.clock import WANDER
from ebpf_mig.recording.events import Remote


def bound_at(remote: Remote, at_ns: int) -> int | None:
    """How far an instant of the destination near `at_ns` can be off after it was moved, in ns. None: no limit is
    known.
    """
    if remote.bound_ns is None:
        return None
    away = abs(at_ns - remote.at_ns)
    return remote.bound_ns + -int(-away * remote.drift_ppb // 10**9) + -int(-away * WANDER // 1)


def bounded(breakdown: Breakdown, remote: Remote, origin: int) -> Breakdown:
    """The breakdown with the clock bound at every figure that spans both clocks. `origin`: its instant 0."""
    start = breakdown.blackout[1] if breakdown.blackout else remote.at_ns - origin
    known = Clock(
        offset_ns=remote.offset_ns,
        bound_ns=bound_at(remote, origin + start),
        open=remote.open,
        drift_ppb=remote.drift_ppb,
        pairs_there=remote.pairs[0],
        pairs_back=remote.pairs[1],
    )
    end = bound_at(remote, origin + breakdown.window_ns) if breakdown.window_ns is not None else 0
    rows = breakdown.wire
    return replace(
        breakdown,
        clock=known,
        window_bound_ns=end if breakdown.migration.source and breakdown.migration.destination else 0,
        phases=_phases(breakdown.phases, remote, origin),
        vcpus=[
            vcpu if vcpu.start is None else replace(vcpu, bound_ns=bound_at(remote, origin + vcpu.start))
            for vcpu in breakdown.vcpus
        ],
        wire=rows and [replace(row, bound_ns=bound_at(remote, origin + row.received)) for row in rows],
    )


def _phases(phases: list[Phase], remote: Remote, origin: int) -> list[Phase]:
    """Adds the bound to the handover, and to later phases that begin within the bound of the source's last instant."""
    left = max((phase.spans[-1][1] for phase in phases if phase.side == Side.SOURCE and phase.spans), default=0)
    bound = bound_at(remote, origin + left)
    near = left + (bound or 0)
    rows = []
    for phase in phases:
        crosses = phase.side != Side.SOURCE and any(begin <= near and end > left for begin, end in phase.spans)
        if phase.phase == PhaseName.HANDOVER or crosses:
            last = phase.spans[-1][1] if phase.spans else left
            phase = replace(phase, bound_ns=bound_at(remote, origin + last))  # noqa: PLW2901
        rows.append(phase)
    return rows
