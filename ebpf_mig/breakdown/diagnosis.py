# SPDX-License-Identifier: Apache-2.0
"""The part of the breakdown that answers first: what dominates the downtime, why, and what would help.

In: nothing. Out: frozen structs. The conventions are those of the package, which exports them all. Shares are of the
blackout, from 0 to 1.
"""

from __future__ import annotations

import msgspec

from ebpf_mig.breakdown.vocabulary import PhaseName, Side, Struct

SINGLE = 0.4
"""With a smaller share of the blackout, the largest cause is not the cause."""


class Mostly(Struct, frozen=True, kw_only=True):
    phase: PhaseName
    """The phase that takes most of the blackout."""
    duration_ns: int
    """Its part in the blackout, ns."""
    share: float
    """Its share of the blackout, a number from 0 to 1."""


class Cause(Struct, frozen=True, kw_only=True):
    rule: str
    """Name of the rule that found it, e.g. `nagle`. Names are stable."""
    what: str
    """The cause in words."""
    side: Side
    """Whose time it took."""
    phase: PhaseName
    """The phase in which most of it lies."""
    duration_ns: int
    """The time that it explains, ns. No instant is explained twice."""
    share: float
    """Its share of the blackout, a number from 0 to 1."""
    known: bool
    """True: a cause. False: only where the time went; why is not known."""
    evidence: list[str]
    """What in the recording shows it, one line each."""


class Innocent(Struct, frozen=True, kw_only=True):
    what: str
    """What people often suspect, and what took little time here."""
    why: str
    """What in the recording shows that."""


class Diagnosis(Struct, frozen=True, kw_only=True):
    headline: str
    """The downtime, or why there is none, as reports print it."""
    mostly: Mostly | None
    """Null: there is no blackout."""
    single: bool
    """Whether the first cause has at least 40 % of the blackout. If not, there is no single cause."""
    because: list[Cause]
    """The largest causes, largest first; empty: there is no blackout, or nothing was traced that could show one."""
    not_: list[Innocent] = msgspec.field(name="not")
    """What is innocent."""
    help: list[str]
    """What would shorten the downtime, where that is known; one line each."""

    @property
    def summary(self) -> str:
        """The largest phase and the cause on one line, without names from the recording; empty without a blackout."""
        if self.mostly is None:
            return ""
        text = f"mostly {self.mostly.phase} ({100 * self.mostly.share:.0f} %)"
        if not self.because:
            return text
        first = self.because[0]
        if not self.single:
            return f"{text}, no single cause"
        why = first.what if first.known else f"cause not known, {first.what}"
        return f"{text}: {why} ({100 * first.share:.0f} %)"
