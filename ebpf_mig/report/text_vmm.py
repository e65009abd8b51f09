# SPDX-License-Identifier: Apache-2.0
"""Rows of the terminal report on VMM-specific work and on the VMM's own figures.

In: parts of a breakdown. Out: rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from ebpf_mig import vmm
from ebpf_mig.breakdown import LiveUpdate, ManagerWait, Pausing, Postcopy, Served, Side, Stolen, Throttled, Witness
from ebpf_mig.report.rows import Row, figure, ms, remark
from ebpf_mig.text import printable, size

_PARTS = frozenset(name for one in vmm.adapters() for name in one.witness.parts)
"""The VMMs' own figures for parts of their downtime."""
_SEEN_LATE_NS = 500_000
"""A shorter sleep after the stop gets no line."""


def throttled(found: Throttled | None) -> Iterator[Row]:
    """How long no vCPU ran before the switchover because the VMM throttled the guest."""
    if found is None:
        return
    last = f", {ms(found.before_request_ns)} right before the pause request" if found.before_request_ns else ""
    times = f"in {found.stretches} stretches" if found.stretches > 1 else "in 1 stretch"
    yield figure("throttled", found.dark_ns, f"dark before the switchover, {times}{last}")


def stolen(found: list[Stolen] | None) -> Iterator[Row]:
    """The CPU that lost most to a hypervisor below the host."""
    if not found:
        return
    most = found[0]
    where = f"CPU {most.cpu}" if most.side == Side.BOTH else f"CPU {most.cpu} of the {most.side}'s host"
    others = f", and {len(found) - 1} others" if len(found) > 1 else ""
    text = f"{ms(most.stolen_ns)} ms of {where}{others}, in {ms(most.between_ns)} ms around the window (hypervisor)"
    yield Row("CPU stolen", text)


def pausing(found: Pausing | None) -> Iterator[Row]:
    """The time to stop the vCPUs, if the VMM noticed the stop late enough to matter."""
    if found is None or found.asleep_ns is None or found.asleep_ns < max(_SEEN_LATE_NS, found.noticed_ns // 2):
        return
    why = "polling" if found.polling else "sleeping"
    yield Row("pause", f"VMM saw the stop {ms(found.noticed_ns)} ms late ({why} {ms(found.asleep_ns)})")


def management(found: list[ManagerWait] | None) -> Iterator[Row]:
    """How long each side was ready and waited for its manager."""
    if not found:
        return
    each = ", ".join(f"{wait.side} {ms(wait.duration_ns)}" for wait in found)
    yield figure("manager", sum(wait.duration_ns for wait in found), f"waited for it: {each}")


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
        yield figure("postcopy", found.drained_ns, f"after the start: {_served(found.after)}")
    if (dark := found.while_dark) is not None and dark.bytes:
        yield figure("while dark", dark.waited_ns or 0, f"waited for pages: {_served(dark)}")


def _served(found: Served) -> str:
    return f"{size(found.bytes)}, requested in {found.asked} call{'s' if found.asked != 1 else ''}"


def witnesses(found: list[Witness]) -> Iterator[Row]:
    """Other figures for the blackout; the VMM's own parts of it are marked for `-v`."""
    for at, witness in enumerate(found):
        ours = witness.value_ns - witness.difference_ns
        why = f": {printable(witness.explanation, 400)}" if witness.explanation else ""
        own = f"{printable(witness.name)} {ms(witness.value_ns)} ms, ours {ms(ours)}"
        if witness.name in _PARTS:
            yield Row("cross-check", f"{own}{why}", verbose=True)
        else:
            yield Row("cross-check", f"{own} ({witness.difference_ns / 1e6:+.3f}){why}", spare=3 if at else 1)
