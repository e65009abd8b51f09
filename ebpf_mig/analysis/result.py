# SPDX-License-Identifier: Apache-2.0
"""The result of an analysis: the breakdown, and the data that it was made from.

In: nothing. Out: `Analysis`, which `collector.analyse` makes. Text and JSON only use the breakdown. Predictions and
formats with a time axis also use the data. The analysis runs only once per recording.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebpf_mig.analysis.attributed import Attribution
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.breakdown import Breakdown
from ebpf_mig.recording.events import Header


@dataclass(frozen=True)
class Analysis:
    """One analysed recording. Do not modify it or anything in it."""

    breakdown: Breakdown
    traced: TracedMigration
    """The events by process, the sides, the switchover; instants on the recording's clock."""
    attribution: Attribution
    """The window and the phase of each instant in it."""
    origin_ns: int
    """Instant 0 of the breakdown on CLOCK_MONOTONIC of the recording's host."""
    connection: str
    """The migration's TCP connection, see `sockets.connection`; empty if there is none."""

    @property
    def header(self) -> Header:
        """The recording's header."""
        return self.traced.material.header
