# SPDX-License-Identifier: Apache-2.0
"""The latest migrations by id, so that Prometheus can join the halves that two nodes measured.

In: observations. Out: gauges with the label `migration`, which has the same value on both nodes. No name or address
goes into it: it is a hash, see `otel_spans`. At most `MIGRATIONS` are held, each for at most `SECONDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from ebpf_mig.breakdown import Side
from ebpf_mig.exporter.observation import Observation

MIGRATIONS = 100
SECONDS = 900.0

_PREFIX = "ebpf_mig_migration"


class Halves:
    """Not thread-safe."""

    def __init__(self, clock: Callable[[], float], held: dict[str, tuple[Observation, str]] | None = None) -> None:
        """`clock`: wall-clock time, seconds since the epoch. `held`: where they are held, the latest last."""
        self._clock = clock
        self._held = held if held is not None else {}

    def add(self, seen: Observation, vm: str) -> None:
        """Holds a migration with an id. `vm`: its name as metrics show it. One with the same id is replaced."""
        if not seen.migration:
            return
        self._held.pop(seen.migration[:40], None)
        self._held[seen.migration[:40]] = (seen, vm)
        while len(self._held) > MIGRATIONS:
            del self._held[next(iter(self._held))]

    def collect(self) -> Iterator[Metric]:
        """The families. A figure that was not measured has no sample."""
        oldest = self._clock() - SECONDS
        for key in [key for key, (seen, _) in self._held.items() if seen.at < oldest]:
            del self._held[key]
        held = f"Of the last {MIGRATIONS} migrations that moved a guest, for {SECONDS:.0f} s after the end."
        info = GaugeMetricFamily(
            f"{_PREFIX}_info", f"Always 1. {held}", labels=["migration", "role", "vmm", "vm", "recording"]
        )
        part = GaugeMetricFamily(
            f"{_PREFIX}_part_seconds", f"As ebpf_mig_downtime_part_seconds. {held}", labels=["migration", "role"]
        )
        state = GaugeMetricFamily(
            f"{_PREFIX}_until_state_seconds",
            f"From the last vCPU's stop to the first byte of state sent. {held}",
            labels=["migration"],
        )
        stop = GaugeMetricFamily(
            f"{_PREFIX}_stop_timestamp_seconds",
            f"When the last vCPU stopped on the source, by that host's wall clock. {held}",
            labels=["migration"],
        )
        start = GaugeMetricFamily(
            f"{_PREFIX}_start_timestamp_seconds",
            f"When the first vCPU started on the destination, by that host's wall clock. {held}",
            labels=["migration"],
        )
        for key, (seen, vm) in self._held.items():
            info.add_metric([key, seen.role, seen.vmm, vm, seen.recording[:40]], 1)
            for role, ns in ((Side.SOURCE, seen.source_ns), (Side.DESTINATION, seen.destination_ns)):
                if ns is not None:
                    part.add_metric([key, role], ns / 1e9)
            for family, ns in ((state, seen.until_state_ns), (stop, seen.stopped_at_ns), (start, seen.started_at_ns)):
                if ns is not None:
                    family.add_metric([key], ns / 1e9)
        yield from (info, part, state, stop, start)
