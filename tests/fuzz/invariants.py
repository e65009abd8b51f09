# SPDX-License-Identifier: Apache-2.0
"""Invariants of every breakdown, whatever the recording contains.

In: an analysis. Out: nothing, or an AssertionError that names the broken invariant.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from ebpf_mig.breakdown import Breakdown

SIGNED = frozenset({"difference_ns", "offset_ns", "value_ns"})
"""Fields that may be negative: differences of two measurements, and a figure reported by a VMM."""
INSTANTS = frozenset({"begin", "end", "stop", "start", "sent", "received", "spans", "blackout", "at", "first", "last"})
"""Fields that are instants relative to the window's begin, negative before it."""
COUNTS = (
    "bytes",
    "pages",
    "calls",
    "failed",
    "samples",
    "runs",
    "connections",
    "at_most",
    "at_least",
    "count",
    "ioctls",
)


def check(breakdown: Breakdown, text: str) -> None:
    """Checks a breakdown. `text`: its JSON report."""
    phases(breakdown)
    plain = json.loads(text)
    no_negatives(plain, "")
    assert msgspec.convert(plain, Breakdown) == breakdown, "the JSON does not say the same"


def phases(breakdown: Breakdown) -> None:
    """Phases partition the window, to the nanosecond."""
    if breakdown.window_ns is None:
        assert all(phase.duration_ns in (0, None) for phase in breakdown.phases)
        return
    assert breakdown.window_ns >= 0, "negative window"
    took = [phase.duration_ns or 0 for phase in breakdown.phases]
    assert sum(took) == breakdown.window_ns, f"phases sum to {sum(took)}, the window has {breakdown.window_ns}"
    spans = []
    for phase in breakdown.phases:
        spent = sum(end - begin for begin, end in phase.spans)
        assert spent == (phase.duration_ns or 0), f"{phase.phase} has {phase.duration_ns} in spans of {spent}"
        spans += phase.spans
    reached = 0
    for begin, end in sorted(spans):
        assert reached == begin <= end, f"a gap or an overlap at {begin}, after {reached}"
        reached = end
    assert not spans or reached == breakdown.window_ns


def no_negatives(value: Any, name: str) -> None:
    """No duration and no count is negative."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in INSTANTS:
                no_negatives(item, key)
            else:
                nested(item)
    elif isinstance(value, list):
        for item in value:
            no_negatives(item, name)
    elif isinstance(value, int) and name not in SIGNED:
        checked = name.endswith("_ns") or name.endswith(COUNTS)
        assert not checked or value >= 0, f"{name} is {value}"


def nested(value: Any) -> None:
    """Structs in a field named like an instant are checked, too."""
    for item in value if isinstance(value, list) else []:
        if isinstance(item, dict):
            no_negatives(item, "")
