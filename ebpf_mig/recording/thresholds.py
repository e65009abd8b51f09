# SPDX-License-Identifier: Apache-2.0
"""Thresholds that the kernel half and the analysis must agree on: each has one value, here.

In: nothing. Out: numbers. `probes/macros.py` hands all of them to the C compiler under the same names.
"""

from __future__ import annotations

FETCH_GAP_NS = 1_000_000
"""Dirty-log ioctls of one fetch follow each other within this. QEMU's last running fetch and its final one are often
less than that apart, so a stop, a send or a slot fetched again end a fetch, too."""
LONG_FETCH_NS = 100_000
"""A dirty-log ioctl that takes longer wakes the reader at once: it may be worth samples."""
VCPU_GAP_NS = 100_000
"""A vCPU that was outside KVM_RUN for longer has an event at its next entry."""
SPAN_MAX_NS = 250_000_000
"""A vCPU that leaves KVM_RUN has a `VcpuSpan` at least this often."""
LONG_WAIT_NS = 100_000
"""A wait off the CPU that is shorter has no event."""
COALESCE_GAP_NS = 10_000_000
"""Calls further apart are not coalesced into one batch."""
COALESCE_MAX_NS = 100_000_000
"""A batch of coalesced calls ends after this."""
DETAIL_BUDGET = 8000
"""Single calls that are kept while no vCPU runs; each fetch grants them anew."""
DETAIL_PER_MS = 4
"""Single calls that are granted each ms besides, for a destination whose source is on another host."""

SHARED = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, int)}
"""All of them by name."""
