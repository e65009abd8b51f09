# SPDX-License-Identifier: Apache-2.0
"""The metrics. In: observations and the watch's status. Out: Prometheus families. A scrape only reads this memory.

Tenants cannot make them grow: every label but `vm` comes from a closed list. `vm` names at most `VMS` VMs, each for at
most `VM_SECONDS`; the VM whose last migration is oldest is dropped first. There are fewer than 2,000 series.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ebpf_mig.breakdown import PHASES, Result, Side
from ebpf_mig.exporter.latest import Halves
from ebpf_mig.exporter.observation import DELAYS_S, MODES, RESULTS, ROLES, Observation, Status, vmms
from ebpf_mig.text import printable

VMS = 256
VM_SECONDS = 900.0
VM_CHARACTERS = 64
SILENT_S = 5.0
"""The watch sends its state once a second. After this long without it, the watch is considered stopped."""

BLACKOUT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10)
PART_BUCKETS = (1e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.3, 1, 5)
"""For phases, fetches and sending, in seconds: from a small VM's to those that an alert is about."""

_PHASES = frozenset(phase for phase, _ in PHASES)
_PARTS = ("lock", "off_cpu", "kernel", "user")
_TRIGGERS = ("start", "born", "thread", "connect", "accept", "logging", "memory", "candidate", "exec", "update")
_OUTCOMES = ("migration", "nothing", "suppressed")


def vm_label(name: str, style: str) -> str:
    """A VM's name as a label value. `style`: `name` (printable, short), `hash` or `none`."""
    if style == "none" or not name:
        return ""
    if style == "hash":
        return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    cut = printable(name[:VM_CHARACTERS], VM_CHARACTERS)
    return cut[:VM_CHARACTERS].encode("utf-8", "replace").decode()


class Metrics:
    """What `/metrics` shows. Thread-safe. `vm_style` is the `style` of `vm_label`."""

    def __init__(
        self,
        vm_style: str = "name",
        vmm_names: Sequence[str] = (),
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        """`vmm_names`: values of the label `vmm`, by default all. `clock`: wall-clock time, seconds since the epoch.
        `steady`: monotonic time, seconds."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._vm_style = vm_style
        self._clock = clock
        self._steady = steady
        self._lock = threading.RLock()
        self._vms: OrderedDict[str, Observation] = OrderedDict()
        self._status: Status | None = None
        self._status_at = 0.0
        self._evicted = 0
        self._halves = Halves(clock)
        registry = self.registry
        self._migrations = Counter(
            "ebpf_mig_migrations", "Migrations seen on this node.", ["vmm", "role", "result"], registry=registry
        )
        self._modes = Counter(
            "ebpf_mig_modes",
            "Migrations seen on this node, by when the memory moved; cpr is a live update.",
            ["vmm", "mode"],
            registry=registry,
        )
        self._incomplete = Counter(
            "ebpf_mig_migrations_incomplete", "Migrations of which events were lost.", registry=registry
        )
        self._begin_missed = Counter(
            "ebpf_mig_migrations_begin_missed",
            "Migrations noticed after dirty logging was switched on; their total time is not known.",
            registry=registry,
        )
        self._blackout = Histogram(
            "ebpf_mig_blackout_seconds",
            "From the last vCPU's stop to the first vCPU's start, of migrations with both sides on this node.",
            ["vmm", "role"],
            buckets=BLACKOUT_BUCKETS,
            registry=registry,
        )
        self._part = Histogram(
            "ebpf_mig_downtime_part_seconds",
            "The part of the downtime that one side alone measures: source, from the last vCPU's stop to the last byte "
            "handed over; destination, from the first restore work to the first vCPU's start.",
            ["vmm", "role"],
            buckets=BLACKOUT_BUCKETS,
            registry=registry,
        )
        self._phase = Histogram(
            "ebpf_mig_phase_seconds",
            "Time of the switchover that went into each phase.",
            ["vmm", "phase"],
            buckets=PART_BUCKETS,
            registry=registry,
        )
        self._fetch = Histogram(
            "ebpf_mig_dirty_log_fetch_seconds",
            "Time that a migration's dirty-log fetches took, by stage and part.",
            ["stage", "part"],
            buckets=PART_BUCKETS,
            registry=registry,
        )
        self._final_bytes = Counter(
            "ebpf_mig_final_memory_bytes", "Memory sent in blackouts because of the final fetch.", registry=registry
        )
        self._send = Histogram(
            "ebpf_mig_send_seconds",
            "Time in send calls on the migration's sockets in the switchover: copying or blocked.",
            ["vmm", "state"],
            buckets=PART_BUCKETS,
            registry=registry,
        )
        self.scrape_seconds = Gauge(
            "ebpf_mig_exporter_last_scrape_duration_seconds",
            "How long the scrape before this one took.",
            registry=registry,
        )
        self.rejected = Counter(
            "ebpf_mig_exporter_connections_rejected",
            "Connections that were refused, cut because idle or slow, or failed.",
            ["reason"],
            registry=registry,
        )
        for reason in ("too-many", "too-slow", "idle", "failed"):
            self.rejected.labels(reason)
        self._traces: Counter | None = None
        registry.register(_Gauges(self))
        # If a series began with its first migration, `increase` and `rate` would not see that one.
        for vmm, mode in itertools.product(vmm_names or vmms(), MODES):
            self._modes.labels(vmm, mode)
        for vmm, role in itertools.product(vmm_names or vmms(), ROLES):
            self._blackout.labels(vmm, role)
            if role != Side.BOTH:
                self._part.labels(vmm, role)
            for result in RESULTS:
                self._migrations.labels(vmm, role, result)

    def build(self, version: str, kernel: str) -> None:
        """Adds `ebpf_mig_build_info`."""
        info = Gauge("ebpf_mig_build_info", "Version of ebpf-mig and of the kernel; always 1.", ["version", "kernel"],
                     registry=self.registry)  # fmt: skip
        info.labels(version, kernel).set(1)

    def text(self, encode: Callable[[CollectorRegistry], bytes]) -> bytes:
        """The exposition. A migration is either in all of its families or in none."""
        with self._lock:
            return encode(self.registry)

    def migration(self, o: Observation) -> None:
        """Counts a migration."""
        with self._lock:
            self._count(o)

    def _count(self, o: Observation) -> None:
        self._migrations.labels(o.vmm, o.role, o.result).inc()
        self._modes.labels(o.vmm, o.mode).inc()
        if o.verdict == "incomplete":
            self._incomplete.inc()
        if not o.begin_seen:
            self._begin_missed.inc()
        exemplar = {"recording": o.recording[:40]} if o.recording else {}
        exemplar |= {"migration": o.migration[:40]} if o.migration else {}
        if o.blackout_ns is not None and o.result == "completed":
            self._blackout.labels(o.vmm, o.role).observe(o.blackout_ns / 1e9, exemplar)
        self._count_parts(o, exemplar)
        for phase, ns in o.phases.items() if o.result != "saved" else ():
            if phase in _PHASES:
                self._phase.labels(o.vmm, phase).observe(ns / 1e9, exemplar)
        for stage, parts in o.fetch.items():
            for part, ns in parts.items():
                if part in _PARTS:
                    self._fetch.labels(stage, part).observe(ns / 1e9, exemplar)
        for state, ns in o.send.items():
            self._send.labels(o.vmm, state).observe(ns / 1e9, exemplar)
        self._final_bytes.inc(o.final_bytes or 0)
        name = self.label_of(o.vm)
        self._halves.add(o, name)
        if not name:
            return
        self._vms[name] = o
        self._vms.move_to_end(name)
        while len(self._vms) > VMS:
            self._vms.popitem(last=False)
            self._evicted += 1

    def _count_parts(self, o: Observation, exemplar: dict[str, str]) -> None:
        for role, ns in ((Side.SOURCE, o.source_ns), (Side.DESTINATION, o.destination_ns)):
            if ns is not None and o.result == Result.COMPLETED:
                self._part.labels(o.vmm, role).observe(ns / 1e9, exemplar)

    def traces(self, arrived: bool, spans: int) -> None:
        """Counts spans that arrived at a tracing back end, or did not. The family exists after the first call."""
        if self._traces is None:
            self._traces = Counter(
                "ebpf_mig_exporter_spans", "Spans sent to the OTLP endpoint.", ["outcome"], registry=self.registry
            )
            self._traces.labels("sent"), self._traces.labels("failed")
        self._traces.labels("sent" if arrived else "failed").inc(spans)

    def label_of(self, name: str) -> str:
        """A VM's name as it may be shown."""
        return vm_label(name, self._vm_style)

    def status(self, status: Status) -> None:
        """Stores the watch's latest state."""
        with self._lock:
            self._status, self._status_at = status, self._steady()

    @property
    def ready(self) -> bool:
        """Whether the watch sent its state within the last `SILENT_S`, with all its probes attached."""
        with self._lock:
            status, age = self._status, self._steady() - self._status_at
        return status is not None and age < SILENT_S and all(status.attached.values())

    def collect(self) -> Iterator[Metric]:
        """The families that are made at each scrape."""
        with self._lock:
            oldest = self._clock() - VM_SECONDS
            for name in [name for name, o in self._vms.items() if o.at < oldest]:
                del self._vms[name]
            vms, status, evicted = list(self._vms.items()), self._status, self._evicted
            halves = list(self._halves.collect())
        up = GaugeMetricFamily("ebpf_mig_up", "Whether the watch over this node runs, with its probes attached.")
        up.add_metric([], float(self.ready))
        yield up
        yield from _last(vms)
        yield from halves
        dropped = CounterMetricFamily(
            "ebpf_mig_series_dropped", "VMs whose last-migration series were dropped to make room for others."
        )
        dropped.add_metric([], evicted)
        yield dropped
        if status is not None:
            yield from _watch(status)


class _Gauges:
    """Collector for `Metrics.collect`. prometheus_client calls it when it is registered."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.collect()


def _last(vms: list[tuple[str, Observation]]) -> Iterator[Metric]:
    prefix, of = "ebpf_mig_last_migration", f"of the VM's last migration, for {VM_SECONDS:.0f} s after it."
    blackout = GaugeMetricFamily(f"{prefix}_blackout_seconds", f"Blackout {of}", labels=["vm"])
    when = GaugeMetricFamily(f"{prefix}_timestamp_seconds", f"End {of}", labels=["vm"])
    complete = GaugeMetricFamily(f"{prefix}_complete", f"Whether nothing was lost {of}", labels=["vm"])
    for name, o in vms:
        if o.blackout_ns is not None:
            blackout.add_metric([name], o.blackout_ns / 1e9)
        when.add_metric([name], o.at)
        complete.add_metric([name], float(o.verdict == "complete"))
    yield from (blackout, when, complete)


def _watch(s: Status) -> Iterator[Metric]:
    for name, text, value in (
        ("ebpf_mig_vms", "Processes of this node that own a KVM VM.", s.vms),
        ("ebpf_mig_armed", "Whether the costly probes are attached now.", float(s.armed)),
        ("ebpf_mig_recordings", "Recordings in the state directory.", s.recordings),
        ("ebpf_mig_recordings_size_bytes", "Their size.", s.recording_bytes),
    ):
        gauge = GaugeMetricFamily(name, text)
        gauge.add_metric([], value)
        yield gauge
    armed = CounterMetricFamily("ebpf_mig_armed_seconds", "Time that the costly probes were attached.")
    armed.add_metric([], s.armed_seconds)
    yield armed
    for name, text, label, counts in (
        ("ebpf_mig_errors", "Errors with one VM or migration; the watch goes on.", "kind", s.errors),
        ("ebpf_mig_limit_exceeded", "What was left out because of a limit.", "limit", s.limits),
    ):
        counter = CounterMetricFamily(name, text, labels=[label])
        for kind, number in counts.items():
            counter.add_metric([kind], number)
        yield counter
    trigger = GaugeMetricFamily(
        "ebpf_mig_trigger_info",
        "How migrations are noticed; always 1. With signs alone, some are missed: see the documentation.",
        labels=["trigger"],
    )
    trigger.add_metric([s.trigger], 1)
    yield trigger
    attached = GaugeMetricFamily("ebpf_mig_probe_attached", "Whether a standing probe is attached.", labels=["probe"])
    for probe, is_attached in sorted(s.attached.items()):
        attached.add_metric([probe], float(is_attached))
    yield attached
    signs = CounterMetricFamily(
        "ebpf_mig_triggers",
        "Signs of a migration, by kind and outcome; suppressed ones may have hidden a migration.",
        labels=["sign", "outcome"],
    )
    for sign in _TRIGGERS:
        for outcome in _OUTCOMES:
            signs.add_metric([sign, outcome], s.triggers.get(sign, {}).get(outcome, 0))
    yield signs
    delay = HistogramMetricFamily(
        "ebpf_mig_trigger_delay_seconds",
        "From a sign to the VM being traced; a shorter migration is missed, at least in part.",
    )
    ends = (*map(str, DELAYS_S), "+Inf")
    delay.add_metric([], list(zip(ends, itertools.accumulate(s.delays), strict=True)), s.delay_seconds)
    yield delay
    lost = CounterMetricFamily("ebpf_mig_events_lost", "Events that the kernel had no room for.", labels=["probe"])
    for probe, count in sorted(s.lost.items())[:20]:
        lost.add_metric([probe], count)
    yield lost
    run = CounterMetricFamily("ebpf_mig_program_run_seconds", "Run time of the costly programs.", labels=["program"])
    for program, seconds in sorted(s.run_seconds.items())[:20]:
        run.add_metric([program], seconds)
    yield run
