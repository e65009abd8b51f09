# SPDX-License-Identifier: Apache-2.0
"""Each side's part of the downtime, as that side alone can measure it.

In: the analysis of one host's recording, with one side or both. Out: `Parts`. No clock of another host is used, so the
parts are exact. Of a migration whose two sides were traced on two hosts, they give a lower limit of the blackout:

    stop of the last vCPU ... first byte of state sent   `until_state_ns`, measured on the source
    first restore work ... start of the first vCPU       `destination_ns`, measured on the destination

The second stretch begins after the first one ended, because state is restored after it was sent. So the blackout is at
least their sum. It is also at least `source_ns`, up to the duration of the last send.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebpf_mig.analysis.attributed import Attribution
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.spans import FOREVER
from ebpf_mig.breakdown import SwitchoverKind


@dataclass(frozen=True, slots=True)
class Parts:
    """None: not measured, or there is no such part. Durations are ns, instants ns of the host's CLOCK_MONOTONIC."""

    stop: int | None = None
    """When the last vCPU stopped on the source."""
    start: int | None = None
    """When the first vCPU started on the destination."""
    source_ns: int | None = None
    """From `stop` to the end of the send with the last byte that the destination needed."""
    until_state_ns: int | None = None
    """From `stop` to the begin of the first send of state."""
    destination_ns: int | None = None
    """From the first restore work on the state to `start`."""


def observe(traced: TracedMigration, attribution: Attribution) -> Parts:
    """The parts of a migration that did not return to its source. Whether it completed is for the caller to say."""
    found, load, work = traced.switchover, attribution.load, attribution.work
    stop = start = source = until_state = None
    if found is not None:
        if found.kind == SwitchoverKind.ABORTED:
            return Parts()
        stop, start = found.stop, found.first_start
    elif traced.source is None and traced.destination is not None:
        lines = traced.destination.vcpus.values()
        start = min((line.first_run for line in lines if line.first_run is not None), default=None)
    if stop is not None and not traced.material.absent("socket"):
        handed = _handed(traced, attribution)
        source = handed - stop if handed is not None else None
        if work is not None and work.state_from is not None and not work.coalesced:
            until_state = max(0, work.state_from - stop)
    loaded = load is not None and start is not None and not traced.material.absent("state")
    return Parts(
        stop=stop,
        start=start,
        source_ns=source,
        until_state_ns=until_state,
        destination_ns=max(0, start - load.begin) if loaded and load is not None and start is not None else None,
    )


def _handed(traced: TracedMigration, attribution: Attribution) -> int | None:
    """When the last byte of the handover left the source.

    Only the destination shows which bytes it needed. Without it, it is the end of the last send before the first answer
    to the state; Cloud Hypervisor's request to complete follows such an answer. In postcopy, pages follow the state
    without a visible border, so it is not known.
    """
    work = attribution.work
    if traced.destination is not None or work is None or work.state_from is None:
        return attribution.handed
    if traced.postcopy:
        return None
    answered = traced.answered if traced.answered is not None else FOREVER
    return max((t.end_ns for t in traced.sends if t.begin_ns < answered), default=attribution.handed)
