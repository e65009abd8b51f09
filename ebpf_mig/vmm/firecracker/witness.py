# SPDX-License-Identifier: Apache-2.0
"""Firecracker's own times of its API calls, beside ours.

In: a `TracedMigration` with its marks (`firecracker.NAME_us` from the logs, `firecracker.API.CALL.begin` and `.end` at
both ends of our calls), and the phases. Out: rows of the breakdown. They are witnesses: they move no boundary.

No figure of Firecracker's spans both processes. So a row has the sum of its three calls beside the blackout, and says
what lies in none of them: the caller's time between the calls, for the most part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from ebpf_mig.analysis.attributed import Attribution
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.spans import covered, uncovered
from ebpf_mig.breakdown import Phase, Span, SwitchoverKind, Wire, Witness
from ebpf_mig.vmm.firecracker.log import NAMES
from ebpf_mig.vmm.witness import NAMED_NS, NAMED_SHARE, VmmWitness

MS, US = 1_000_000, 1_000
CALLS: Mapping[str, tuple[str, ...]] = {
    "pause": ("pause_vm",),
    "create": ("full_create_snapshot", "diff_create_snapshot"),
    "load": ("load_snapshot",),
}
"""Our calls in their order, and Firecracker's names for the time of each."""
SUM = "firecracker.sum_us"


class FirecrackerWitness(VmmWitness):
    """Marks `firecracker.NAME_us` are of its log, `firecracker.API.CALL.begin` and `.end` of our calls."""

    words = frozenset(
        {f"firecracker.{name}_us" for name in NAMES}
        | {f"firecracker.API.{call}.{end}" for call in CALLS for end in ("begin", "end")}
        | {f"firecracker.MIGRATION.{result}" for result in ("completed", "failed", "cancelled")}
    )
    parts: ClassVar = {f"firecracker.{name}_us": 3 for names in CALLS.values() for name in names}

    def rows(
        self,
        traced: TracedMigration,
        attribution: Attribution,
        found: Sequence[Witness],
        wires: Sequence[Wire] | None,  # noqa: ARG002
        late_ns: int,  # noqa: ARG002
    ) -> list[Witness]:
        """`found`, a row for each call that Firecracker has a time of, and one for all of them."""
        if attribution.window is None:
            return list(found)
        calls = _calls(traced, attribution.window[0])
        length = attribution.window[1] - attribution.window[0]
        each = [_row(call, attribution.phases, length) for call in calls]
        return [*found, *_sum(traced, attribution.phases, attribution.window[0], calls), *each]


WITNESS = FirecrackerWitness()


class _Call(NamedTuple):
    """One call that Firecracker has a time of."""

    name: str
    """Firecracker's, as in its metrics."""
    own_ns: int
    """As its API thread counts."""
    inner_ns: int | None
    """As its main thread counts; None: not in its log."""
    span: Span
    """From our request to its answer, from the window's begin."""


def _calls(traced: TracedMigration, origin: int) -> list[_Call]:
    values = {m.name: m.value for m in traced.material.marks if m.name.startswith("firecracker.")}
    times = {m.name: m.at_ns for m in traced.material.marks if m.name.startswith("firecracker.API.")}
    found: list[_Call] = []
    for call, names in CALLS.items():
        begin, end = (times.get(f"firecracker.API.{call}.{which}") for which in ("begin", "end"))
        name = next((name for name in names if f"firecracker.{name}_us" in values), None)
        if name is None or begin is None or end is None:
            continue
        inner = values.get(f"firecracker.vmm_{name}_us")
        span = begin - origin, end - origin
        found.append(_Call(name, values[f"firecracker.{name}_us"] * US, None if inner is None else inner * US, span))
    return found


def _row(call: _Call, phases: Sequence[Phase], window_ns: int) -> Witness:
    """Firecracker's time of one call beside the caller's."""
    ours = call.span[1] - call.span[0]
    why = ["from the caller's request to its answer"]
    if shares := _shares(phases, [call.span]):
        why.append(shares)
    outside = ours - covered([(0, window_ns)], call.span)
    if outside >= max(NAMED_NS, ours // NAMED_SHARE):
        why.append(f"{outside / MS:.3f} before the kick or after the start")
    if call.inner_ns is not None:
        why.append(f"its main thread counts {call.inner_ns / MS:.3f}")
    return Witness(
        name=f"firecracker.{call.name}_us",
        value_ns=call.own_ns,
        difference_ns=call.own_ns - ours,
        explanation="; ".join(why),
        span=call.span,
    )


def _sum(traced: TracedMigration, phases: Sequence[Phase], origin: int, calls: Sequence[_Call]) -> list[Witness]:
    """All three calls beside the blackout, of a guest that runs at the destination."""
    switchover = traced.switchover
    if switchover is None or switchover.kind != SwitchoverKind.COMPLETED or switchover.first_start is None:
        return []
    if len(calls) < len(CALLS):
        return []
    own = sum(call.own_ns for call in calls)
    blackout = switchover.first_start - switchover.stop
    dark = switchover.stop - origin, switchover.first_start - origin
    gaps = uncovered([call.span for call in calls], dark)
    why = f"its calls together; {sum(end - begin for begin, end in gaps) / MS:.3f} of the blackout lies in none of them"
    if shares := _shares(phases, gaps):
        why += f": {shares}"
    return [Witness(name=SUM, value_ns=own, difference_ns=own - blackout, explanation=why)]


def _shares(phases: Sequence[Phase], within: Sequence[Span]) -> str:
    """What the phases have of these spans, those that matter."""
    whole = sum(end - begin for begin, end in within)
    least = max(NAMED_NS, whole // NAMED_SHARE)
    each = [(phase.phase, sum(covered(phase.spans, span) for span in within)) for phase in phases]
    return ", ".join(f"{phase} {ns / MS:.3f}" for phase, ns in each if ns >= least)
