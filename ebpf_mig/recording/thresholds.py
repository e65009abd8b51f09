# SPDX-License-Identifier: Apache-2.0
"""Thresholds that the BPF programs and the analysis share. Each is defined once, here.

In: nothing. Out: numbers. `probes/macros.py` passes all of them to the C compiler under the same names.
"""

from __future__ import annotations

FETCH_GAP_NS = 1_000_000
"""Longest gap between dirty-log ioctls of one fetch. QEMU's last fetch before the stop and its final fetch are often
closer together, so a stop, a send or a repeated slot ends a fetch, too.
"""
LONG_FETCH_NS = 100_000
"""A dirty-log ioctl that takes longer wakes the reader at once, since sampling may be worthwhile."""
VCPU_GAP_NS = 100_000
"""A vCPU that was outside KVM_RUN for longer gets an event at its next entry."""
SPAN_MAX_NS = 250_000_000
"""A vCPU that leaves KVM_RUN gets a `VcpuSpan` at least this often."""
LONG_WAIT_NS = 100_000
"""Shorter waits off the CPU get no event."""
COALESCE_GAP_NS = 10_000_000
"""Calls further apart are not coalesced into one batch."""
HOP_GAP_NS = 200_000
"""The same for a process that passes a migration's bytes on: its last read is told from later ones by this gap."""
COALESCE_MAX_NS = 100_000_000
"""A batch of coalesced calls ends after this."""
DETAIL_BUDGET = 8000
"""Budget of single calls that are kept while no vCPU runs. Each fetch refills it."""
DETAIL_PER_MS = 4
"""Single calls added to the budget per ms, for a destination whose source is on another host."""
USER_STACK_BUDGET = 250
"""User stacks of a process, if they are recorded, until the next fetch, and one more each ms: records of 4 KiB."""
OWN_APART_NS = 100_000
"""Shortest time between two records of a CPU about our own runs. Later after a stop they are further apart."""
OWN_APART_MOST_NS = 100_000_000
"""Longest time, as long as there are runs on that CPU."""
OWN_RECORDS = 256
"""Budget of such records on a CPU. Each fetch refills it."""
OWN_REFILL_NS = 10_000_000
"""Time after which one more is added, for a destination whose source is on another host."""

SHARED = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, int)}
"""All thresholds by name."""
