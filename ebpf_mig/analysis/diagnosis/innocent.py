# SPDX-License-Identifier: Apache-2.0
"""What people suspect, and what is innocent: the final dirty-log fetch and the network.

In: `Facts` and the names of the rules that explain much. Out: rows of the diagnosis. A suspect is only cleared by a
figure; where it was not measured, nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from ebpf_mig.analysis.diagnosis.facts import Facts, shared
from ebpf_mig.analysis.spans import merged, total
from ebpf_mig.analysis.wire import SOCKETS_WITHOUT_WIRE, WIRELESS
from ebpf_mig.breakdown import Innocent, PhaseName
from ebpf_mig.text import ms

_SMALL = 0.05
"""Less than this share of the blackout is innocent."""
_NETWORK = frozenset({"nagle", "retransmission", "link", "window", "reader", "buffer", "data"})
_READER = ("late reader", "receive window")


def rows(facts: Facts, guilty: Set[str]) -> Iterator[Innocent]:
    """The innocent. `guilty` are the rules that explain a twentieth of the blackout or more."""
    b, small = facts.breakdown, _SMALL * (facts.blackout[1] - facts.blackout[0])
    final = b.dirty_log.final
    if final is not None and final.kernel_ns is not None and final.user_ns is not None:
        took = total(shared(facts.phase(PhaseName.FETCH_KERNEL, PhaseName.FETCH_USER), [facts.blackout]))
        if 0 < took < small:
            yield Innocent(what="the final dirty-log fetch", why=f"{ms(took)} ms")
    if b.came_back:
        return
    if not facts.direct:
        return
    if b.migration.transport in SOCKETS_WITHOUT_WIRE:
        yield Innocent(what="the network", why=f"{WIRELESS[b.migration.transport]} has no wire")
        return
    if guilty & _NETWORK or b.wire is None:
        if "nagle" in guilty and "link" not in guilty and facts.link is not None and facts.link.limited_ns < small:
            yield Innocent(what="the bandwidth", why=f"the limit for {ms(facts.link.limited_ns)} ms")
        return
    if b.clock.bound_ns is None:
        return
    slow = merged((w.sent, w.received) for w in b.wire if w.reason not in _READER)
    if total(shared(slow, [facts.blackout])) < small:
        late = any(w.reason in _READER for w in b.wire)
        why = "the data was there before the destination read it" if late else "nothing was in flight for 1 ms"
        yield Innocent(what="the network", why=why)
