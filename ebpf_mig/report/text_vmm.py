# SPDX-License-Identifier: Apache-2.0
"""Rows of the terminal report on VMM-specific work and on the VMM's own figures.

In: parts of a breakdown. Out: rows; text.py puts them on the screen.
"""

from __future__ import annotations

from collections.abc import Iterator

from ebpf_mig import vmm
from ebpf_mig.breakdown import LiveUpdate, ManagerWait, Pausing, Postcopy, Served, Throttled, Witness
from ebpf_mig.report.rows import Row, figure, ms, remark
from ebpf_mig.text import printable, size

_PART_SPARE = {name: spare for one in vmm.adapters() for name, spare in one.witness.parts.items()}
"""`Row.spare` of the rows with the VMMs' own parts, by witness name."""
_LATE_NS = 500_000
"""A shorter sleep after the stop gets no line."""


def throttled(found: Throttled | None) -> Iterator[Row]:
    """How long no vCPU ran before the switchover because the VMM throttled the guest."""
    if found is None:
        return
    last = f", {ms(found.before_request_ns)} right before the pause request" if found.before_request_ns else ""
    times = f"in {found.stretches} stretches" if found.stretches > 1 else "in 1 stretch"
    yield figure("throttled", found.dark_ns, f"dark before the switchover, {times}{last}")


def pausing(found: Pausing | None) -> Iterator[Row]:
    """The time to stop the vCPUs, if the VMM noticed the stop late enough to matter."""
    if found is None or found.asleep_ns is None or found.asleep_ns < max(_LATE_NS, found.noticed_ns // 2):
        return
    why = "polls" if found.polling else "asleep"
    text = f"stop {ms(found.stop_ns)}, noticed {ms(found.noticed_ns)} later ({why} {ms(found.asleep_ns)})"
    yield figure("kick latency", found.stop_ns + found.noticed_ns, text)


def management(found: list[ManagerWait] | None) -> Iterator[Row]:
    """How long each side was ready and waited for its manager."""
    if not found:
        return
    each = ", ".join(f"{wait.side} {ms(wait.duration_ns)}" for wait in found)
    yield figure("waited for manager", sum(wait.duration_ns for wait in found), f"to go on: {each}")


def live_update(found: LiveUpdate | None) -> Iterator[Row]:
    """The descriptors that were passed, and what KVM did in the start-up."""
    if found is None:
        return
    if found.descriptors is not None:
        yield remark("descriptors passed", str(found.descriptors))
    if found.setup_ns:
        yield figure("KVM in startup", found.setup_ns, f"most of it {found.slowest}: {ms(found.slowest_ns)}")


def postcopy(found: Postcopy | None) -> Iterator[Row]:
    """Pages that were fetched after the start, and those that the destination needed before it."""
    if found is None:
        return
    if found.after.bytes:
        yield figure("postcopy drain", found.drained_ns, f"after the start: {_served(found.after)}")
    if (dark := found.while_dark) is not None and dark.bytes:
        yield figure("  while dark", dark.waited_ns or 0, f"waited for pages: {_served(dark)}")


def _served(found: Served) -> str:
    return f"{size(found.bytes)}, asked for in {found.asked} calls"


def witnesses(found: list[Witness]) -> Iterator[Row]:
    """The blackout's witnesses, then the VMM's own parts. The parts with the highest `spare` are left out first."""
    for witness in found:
        ours = witness.value_ns - witness.difference_ns
        why = f": {printable(witness.explanation, 400)}" if witness.explanation else ""
        text = f"ours {ms(ours)}, {witness.difference_ns / 1e6:+.3f}{why}"
        if witness.name in _PART_SPARE:
            text = f"ours {ms(ours)}{why}"
        yield figure(witness.name, witness.value_ns, text)._replace(spare=_PART_SPARE.get(witness.name, 0))
