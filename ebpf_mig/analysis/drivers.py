# SPDX-License-Identifier: Apache-2.0
"""The threads that drive the migration on each side, their waits, and their long calls into KVM.

In: a `TracedMigration` and its phases. Out: the waits and calls of both sides near the window, each with the phases in
which it delays the migration.
"""

from __future__ import annotations

from operator import attrgetter

from ebpf_mig.analysis import loading, waits
from ebpf_mig.analysis import long_calls as calls
from ebpf_mig.analysis.attributed import Attribution
from ebpf_mig.analysis.long_calls import LongCall
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.waits import Party, Sleep
from ebpf_mig.breakdown import Side, SwitchoverKind

_tid = attrgetter("tid")


def sleeps(traced: TracedMigration, attribution: Attribution) -> list[Sleep] | None:
    """The waits of all threads near the window; None if time off the CPU was not traced."""
    window = attribution.window
    if window is None or not traced.material.traced("off-cpu"):
        return None
    return waits.sleeps(_parties(traced), attribution.phases, window[0])


def long_calls(traced: TracedMigration, attribution: Attribution) -> list[LongCall]:
    """The long ioctls of the threads that drive the migration."""
    window = attribution.window
    return calls.long_calls(_parties(traced), attribution.phases, window[0]) if window else []


def _parties(traced: TracedMigration) -> list[Party]:
    parties: list[Party] = []
    if traced.source is not None:
        senders = frozenset(map(_tid, traced.sends))
        own = traced.source.fetchers & senders or senders or traced.source.fetchers
        if traced.loaded_again and traced.switchover is not None and traced.switchover.stopper is not None:
            own = frozenset({traced.switchover.stopper})
        aborted = traced.switchover is not None and traced.switchover.kind == SwitchoverKind.ABORTED
        parties.append(Party(traced.source, Side.BOTH if aborted else Side.SOURCE, own, senders))
    if traced.destination is not None:
        receivers = frozenset(map(_tid, traced.receives))
        restorers = frozenset(i.tid for i in traced.destination.ioctls if loading.is_restore(i))
        drivers = receivers & restorers or receivers
        if traced.destination.born is not None:
            drivers = restorers - {line.tid for line in traced.destination.vcpus.values()}
        parties.append(Party(traced.destination, Side.DESTINATION, drivers))
    return parties
