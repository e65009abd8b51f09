# SPDX-License-Identifier: Apache-2.0
"""What the listener has counted, in a form that can be saved: a listener that is started again goes on from there.

In: counts and durations. Out: Prometheus families, and bytes. Counters that the watch keeps itself begin at zero with
each new watch; `plus` adds those of the watches before.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import msgspec
from prometheus_client.core import CounterMetricFamily, Exemplar, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from ebpf_mig.exporter.observation import Observation, Status

_Number = TypeVar("_Number", int, float)
Described = tuple[str, Sequence[str]]
"""Of a counter: its text and its labels."""
Bounded = tuple[str, Sequence[str], Sequence[float]]
"""Of a histogram: its text, its labels and the upper ends of its buckets, in seconds."""


class Last(msgspec.Struct, frozen=True):
    """A VM's last migration."""

    at: float
    """Wall clock at the end, seconds since the epoch."""
    blackout_ns: int | None
    complete: bool


class Distribution(msgspec.Struct):
    """A histogram's series."""

    counts: list[int]
    """One for each bound, and one for what is above all."""
    sum: float = 0.0
    exemplars: dict[int, tuple[dict[str, str], float]] = {}
    """By bucket: labels of the last migration, and its value in seconds."""


class Totals(msgspec.Struct, kw_only=True):
    """All counters. The keys are the names of families without `_total`, then the values of their labels."""

    counts: dict[str, dict[tuple[str, ...], float]] = {}
    distributions: dict[str, dict[tuple[str, ...], Distribution]] = {}
    vms: dict[str, Last] = {}
    """By label, the latest last."""
    evicted: int = 0
    halves: dict[str, tuple[Observation, str]] = {}
    """See `latest.Halves`."""
    run: str = ""
    """The watch whose migrations were counted last, and how many of them."""
    number: int = 0
    restarts: dict[str, int] = {}
    """By process, as the supervisor counts them."""
    earlier: Status | None = None
    """The sum of the last states of the watches before this one."""
    latest: Status | None = None

    def add(self, name: str, labels: tuple[str, ...] = (), by: float = 1) -> None:
        """Counts. With 0, the series begins to exist."""
        family = self.counts.setdefault(name, {})
        family[labels] = family.get(labels, 0) + by

    def touch(self, name: str, labels: tuple[str, ...], bounds: Sequence[float]) -> Distribution:
        """The series of a histogram. It begins to exist."""
        family = self.distributions.setdefault(name, {})
        if labels not in family:
            family[labels] = Distribution([0] * (len(bounds) + 1))
        return family[labels]

    def observe(
        self,
        name: str,
        labels: tuple[str, ...],
        bounds: Sequence[float],
        ns: int,
        exemplar: dict[str, str] | None = None,
    ) -> None:
        """Adds a duration to a histogram."""
        series, seconds = self.touch(name, labels, bounds), ns / 1e9
        bucket = bisect.bisect_left(bounds, seconds)
        series.counts[bucket] += 1
        series.sum += seconds
        if exemplar:
            series.exemplars[bucket] = (exemplar, seconds)

    def state(self, status: Status) -> None:
        """Notes the state of the watch."""
        if self.latest is not None and self.latest.run != status.run:
            self.earlier = plus(self.earlier, self.latest)
        self.latest = status

    def status(self) -> Status | None:
        """The last state of the watch, its counters since the exporter started."""
        return None if self.latest is None else plus(self.earlier, self.latest)

    def families(self, counters: Mapping[str, Described], histograms: Mapping[str, Bounded]) -> Iterator[Metric]:
        """The families that these tables describe."""
        for name, (text, labels) in counters.items():
            counter = CounterMetricFamily(name, text, labels=labels)
            for values, number in self.counts.get(name, {} if labels else {(): 0.0}).items():
                counter.add_metric(values, number)
            yield counter
        for name, (text, labels, bounds) in histograms.items():
            histogram = HistogramMetricFamily(name, text, labels=labels)
            ends = (*map(floatToGoString, bounds), "+Inf")
            for values, series in self.distributions.get(name, {}).items():
                buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = [
                    (end, number, *_exemplar(series, place))
                    for place, (end, number) in enumerate(zip(ends, itertools.accumulate(series.counts), strict=True))
                ]
                histogram.add_metric(values, buckets, series.sum)
            yield histogram


def _exemplar(series: Distribution, place: int) -> tuple[()] | tuple[Exemplar]:
    exemplar = series.exemplars.get(place)
    return () if exemplar is None else (Exemplar(*exemplar),)


def plus(before: Status | None, now: Status) -> Status:
    """The state `now`, with the counters of `before` added."""
    if before is None:
        return now
    kinds = {**before.triggers, **now.triggers}
    return msgspec.structs.replace(
        now,
        armed_seconds=before.armed_seconds + now.armed_seconds,
        triggers={kind: _sum(before.triggers.get(kind, {}), now.triggers.get(kind, {})) for kind in kinds},
        delays=[a + b for a, b in zip(before.delays, now.delays, strict=True)],
        delay_seconds=before.delay_seconds + now.delay_seconds,
        lost=_sum(before.lost, now.lost),
        run_seconds=_sum(before.run_seconds, now.run_seconds),
        errors=_sum(before.errors, now.errors),
        limits=_sum(before.limits, now.limits),
    )


def _sum(a: dict[str, _Number], b: dict[str, _Number]) -> dict[str, _Number]:
    total = dict(a)
    for name, number in b.items():
        total[name] = total[name] + number if name in total else number
    return total
