# SPDX-License-Identifier: Apache-2.0
"""Durations that span two hosts' clocks, with their error bounds.

In: ns and their bound. Out: words, in ms with three decimals. A duration that is shorter than its bound is not printed:
only its upper limit.
"""

from __future__ import annotations

from ebpf_mig.breakdown import Breakdown, Clock
from ebpf_mig.text import ms


def limited(ns: int, bound: int | None, clock: Clock) -> str:
    """The duration, or its upper or lower limit, for a column."""
    if bound is None:
        return f"{'≤' if clock.open == 'most' else '≥'} {ms(ns)}"
    return f"≤ {ms(ns + bound)}" if bound > ns else ms(ns)


def blackout(breakdown: Breakdown) -> str:
    """The blackout with its bound; a dash if there is none."""
    ns, bound = breakdown.blackout_ns, breakdown.clock.bound_ns
    if ns is None:
        return "-"
    text = f"{limited(ns, bound, breakdown.clock)} ms"
    return f"{text} ± {ms(bound)} ms" if bound and bound <= ns else text


def alignment(clock: Clock) -> str:
    """How the destination's clock was aligned, and what is uncertain about it."""
    offset = f"{clock.offset_ns / 1e6:+.3f} ms"
    if clock.bound_ns is None:
        missing = "came back" if clock.open == "least" else "went there"
        limit, longer = ("at most", "at least") if clock.open == "least" else ("at least", "at most")
        return f"{limit} {offset}, since nothing {missing}: durations across both hosts are {longer} those shown"
    return (
        f"{offset} ± {ms(clock.bound_ns)} ms, by {clock.pairs_there} pairs of events there and {clock.pairs_back} back"
    )
