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
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec
from prometheus_client import CollectorRegistry, Gauge, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ebpf_mig.breakdown import OF_FILES, PHASES, Mode, Result, Side
from ebpf_mig.exporter.checkpoint import Checkpoint
from ebpf_mig.exporter.families import VM_SECONDS, last_migrations, state_of
from ebpf_mig.exporter.latest import Halves
from ebpf_mig.exporter.listener_messages import Found, Processes
from ebpf_mig.exporter.observation import MODES, RESULTS, ROLES, Observation, Status, vmms
from ebpf_mig.exporter.totals import Last, Totals
from ebpf_mig.text import printable

VMS = 256
VM_CHARACTERS = 64
SILENT_S = 5.0
"""The watch sends its state once a second. After this long without it, the watch is considered stopped."""
DEAD_S = 60.0
"""After this long without it, the supervisor is not considered able to start the watch again."""

BLACKOUT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10)
FILES_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
PART_BUCKETS = (1e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.3, 1, 5)
"""For phases, fetches and sending, in seconds: from a small VM's to those that an alert is about."""

_PHASES = frozenset(phase for phase, _ in PHASES)
_OF_MIGRATIONS = _PHASES - OF_FILES
_PARTS = ("lock", "off_cpu", "kernel", "user")


def vm_label(name: str, style: str) -> str:
    """A VM's name as a label value. `style`: `name` (printable, short), `hash` or `none`."""
    if style == "none" or not name:
        return ""
    if style == "hash":
        return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    cut = printable(name[:VM_CHARACTERS], VM_CHARACTERS)
    return cut[:VM_CHARACTERS].encode("utf-8", "replace").decode()


_FILES, _FILES_PHASE = "ebpf_mig_snapshot_seconds", "ebpf_mig_snapshot_phase_seconds"
_FILE_MODES = (Mode.SNAPSHOT, Mode.RESTORE)
_REJECTED = "ebpf_mig_exporter_connections_rejected"
_SPANS = "ebpf_mig_exporter_spans"
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ebpf_mig_migrations": ("Migrations seen on this node.", ("vmm", "role", "result")),
    "ebpf_mig_modes": (
        "Migrations seen on this node, by when the memory moved; cpr is a live update, snapshot a save to a file, "
        "restore a load from one.",
        ("vmm", "mode"),
    ),
    "ebpf_mig_migrations_incomplete": ("Migrations of which events were lost.", ()),
    "ebpf_mig_migrations_begin_missed": (
        "Migrations noticed after dirty logging was switched on; their total time is not known.",
        (),
    ),
    "ebpf_mig_final_memory_bytes": ("Memory sent in blackouts because of the final fetch.", ()),
    _FILES_PHASE: ("Seconds of snapshots and restores that went into each phase.", ("mode", "phase")),
    _SPANS: ("Spans sent to the OTLP endpoint.", ("outcome",)),
    _REJECTED: ("Connections that were refused, cut because idle or slow, or failed.", ("reason",)),
}
_BLACKOUT, _PART = "ebpf_mig_blackout_seconds", "ebpf_mig_downtime_part_seconds"
_PHASE = "ebpf_mig_phase_seconds"
_FETCH, _SEND = "ebpf_mig_dirty_log_fetch_seconds", "ebpf_mig_send_seconds"
_HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    _BLACKOUT: (
        "From the last vCPU's stop to the first vCPU's start, of migrations with both sides on this node.",
        ("vmm", "role"),
        BLACKOUT_BUCKETS,
    ),
    _PART: (
        "The part of the downtime that one side alone measures: source, from the last vCPU's stop to the last byte "
        "handed over; destination, from the first restore work to the first vCPU's start.",
        ("vmm", "role"),
        BLACKOUT_BUCKETS,
    ),
    _PHASE: ("Time of the switchover that went into each phase.", ("vmm", "phase"), PART_BUCKETS),
    _FILES: (
        "Snapshots and restores: snapshot, from the request to pause to the guest's going on, or to the last write; "
        "restore, from the request to load to the guest's start.",
        ("mode",),
        FILES_BUCKETS,
    ),
    _FETCH: ("Time that a migration's dirty-log fetches took, by stage and part.", ("stage", "part"), PART_BUCKETS),
    _SEND: (
        "Time in send calls on the migration's sockets in the switchover: copying or blocked.",
        ("vmm", "state"),
        PART_BUCKETS,
    ),
}


class Metrics:
    """What `/metrics` shows. Thread-safe. `vm_style` is the `style` of `vm_label`."""

    def __init__(
        self,
        vm_style: str = "name",
        vmm_names: Sequence[str] = (),
        checkpoint: Checkpoint | None = None,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        """`vmm_names`: values of the label `vmm`, by default all. `checkpoint`: where counters are kept, and those of a
        listener before this one are found. `clock`: wall-clock time, seconds since the epoch. `steady`: monotonic time,
        seconds.
        """
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        self._vm_style = vm_style
        self._checkpoint = checkpoint
        self._clock = clock
        self._steady = steady
        self._lock = threading.RLock()
        self._totals = Totals()
        if checkpoint is not None and checkpoint.saved:
            self._totals = msgspec.msgpack.decode(checkpoint.saved, type=Totals)
        self._halves = Halves(clock, self._totals.halves)
        self._saved = True
        """Whether the counters are in the checkpoint."""
        self._status_at: float | None = None
        self._started = steady()
        self._missing: dict[str, str] = {}
        self.scrape_seconds = Gauge(
            "ebpf_mig_exporter_last_scrape_duration_seconds",
            "How long the scrape before this one took.",
            registry=registry,
        )
        # If a series began with its first migration, `increase` and `rate` would not see that one.
        for vmm, mode in itertools.product(vmm_names or vmms(), MODES):
            self._totals.add("ebpf_mig_modes", (vmm, mode), 0)
        for mode in _FILE_MODES:
            self._totals.touch(_FILES, (mode,), FILES_BUCKETS)
        for vmm, role in itertools.product(vmm_names or vmms(), ROLES):
            self._totals.touch(_BLACKOUT, (vmm, role), BLACKOUT_BUCKETS)
            if role != Side.BOTH:
                self._totals.touch(_PART, (vmm, role), BLACKOUT_BUCKETS)
            for result in RESULTS:
                self._totals.add("ebpf_mig_migrations", (vmm, role, result), 0)
        for reason in ("too-many", "too-slow", "idle", "failed"):
            self._totals.add(_REJECTED, (reason,), 0)
        registry.register(_Gauges(self))

    def build(self, version: str, kernel: str) -> None:
        """Adds `ebpf_mig_build_info`."""
        info = Gauge("ebpf_mig_build_info", "Version of ebpf-mig and of the kernel; always 1.", ["version", "kernel"],
                     registry=self.registry)  # fmt: skip
        info.labels(version, kernel).set(1)

    def text(self, encode: Callable[[CollectorRegistry], bytes]) -> bytes:
        """The exposition. A migration is either in all of its families or in none. What is shown has been saved."""
        with self._lock:
            self._save()
            return encode(self.registry)

    def _save(self) -> None:
        if self._checkpoint is not None and not self._saved:
            self._checkpoint.save(msgspec.msgpack.encode(self._totals))
            self._saved = True

    def found(self, message: Found) -> bool:
        """Counts a migration and saves the counters. False if it has been counted already."""
        with self._lock:
            if message.run == self._totals.run and message.number <= self._totals.number:
                return False
            self._totals.run, self._totals.number = message.run, message.number
            self.migration(message.observation)
            self._save()
            return True

    def migration(self, o: Observation) -> None:
        """Counts a migration."""
        with self._lock:
            self._saved = False
            self._count(self._totals, o)

    def _count(self, totals: Totals, o: Observation) -> None:
        totals.add("ebpf_mig_migrations", (o.vmm, o.role, o.result))
        totals.add("ebpf_mig_modes", (o.vmm, o.mode))
        totals.add("ebpf_mig_migrations_incomplete", by=o.verdict == "incomplete")
        totals.add("ebpf_mig_migrations_begin_missed", by=not o.begin_seen)
        totals.add("ebpf_mig_final_memory_bytes", by=o.final_bytes or 0)
        exemplar = {"recording": o.recording[:40]} if o.recording else {}
        exemplar |= {"migration": o.migration[:40]} if o.migration else {}
        if o.mode in _FILE_MODES:
            self._count_files(totals, o, exemplar)
            return
        if o.blackout_ns is not None and o.result == "completed":
            totals.observe(_BLACKOUT, (o.vmm, o.role), BLACKOUT_BUCKETS, o.blackout_ns, exemplar)
        for role, part_ns in ((Side.SOURCE, o.source_ns), (Side.DESTINATION, o.destination_ns)):
            if part_ns is not None and o.result == Result.COMPLETED:
                totals.observe(_PART, (o.vmm, role), BLACKOUT_BUCKETS, part_ns, exemplar)
        for phase, ns in o.phases.items() if o.result != "saved" else ():
            if phase in _OF_MIGRATIONS:
                totals.observe(_PHASE, (o.vmm, phase), PART_BUCKETS, ns, exemplar)
        for stage, parts in o.fetch.items():
            for part, ns in parts.items():
                if part in _PARTS:
                    totals.observe(_FETCH, (stage, part), PART_BUCKETS, ns, exemplar)
        for state, ns in o.send.items():
            totals.observe(_SEND, (o.vmm, state), PART_BUCKETS, ns, exemplar)
        name = self.label_of(o.vm)
        self._halves.add(o, name)
        if not name:
            return
        totals.vms.pop(name, None)
        totals.vms[name] = Last(o.at, o.blackout_ns, o.verdict == "complete")
        while len(totals.vms) > VMS:
            del totals.vms[next(iter(totals.vms))]
            totals.evicted += 1

    @staticmethod
    def _count_files(totals: Totals, o: Observation, exemplar: dict[str, str]) -> None:
        """A snapshot or a restore has its own times: it is part of no figure on migrations."""
        if o.window_ns is not None and o.result in (Result.SAVED, Result.COMPLETED):
            totals.observe(_FILES, (o.mode,), FILES_BUCKETS, o.window_ns, exemplar)
        for phase, ns in o.phases.items():
            if phase in _PHASES and ns:
                totals.add(_FILES_PHASE, (o.mode, phase), ns / 1e9)

    def rejected(self, reason: str) -> None:
        """Counts a connection that was refused or cut."""
        with self._lock:
            self._totals.add(_REJECTED, (reason,))
            self._saved = False

    def traces(self, arrived: bool, spans: int) -> None:
        """Counts spans that arrived at a tracing back end, or did not. The family exists after the first call."""
        with self._lock:
            for outcome in ("sent", "failed"):
                self._totals.add(_SPANS, (outcome,), spans if (outcome == "sent") == arrived else 0)
            self._saved = False

    def label_of(self, name: str) -> str:
        """A VM's name as it may be shown."""
        return vm_label(name, self._vm_style)

    def status(self, status: Status) -> None:
        """Stores the watch's latest state."""
        with self._lock:
            self._totals.state(status)
            self._status_at = self._steady()
            self._saved = False

    def processes(self, processes: Processes) -> None:
        """Stores the supervisor's latest word."""
        with self._lock:
            self._missing = processes.missing
            self._totals.restarts = processes.restarts
            self._saved = False

    @property
    def unready(self) -> str:
        """Why migrations may be missed now; empty if all processes work and all probes are attached."""
        with self._lock:
            status, at, missing = self._totals.latest, self._status_at, dict(self._missing)
        if missing:
            return "; ".join(f"the process {name} {why}" for name, why in sorted(missing.items()))
        if status is None or at is None:
            return "the watch has not reported yet"
        silent = self._steady() - at
        if silent >= SILENT_S:
            return f"the watch has been silent for {silent:.0f} s"
        off = sorted(probe for probe, attached in status.attached.items() if not attached)
        return f"probes are not attached: {', '.join(off)}" if off else ""

    @property
    def ready(self) -> bool:
        """Whether every migration is seen."""
        return not self.unready

    @property
    def dead(self) -> str:
        """Why the exporter should be started again as a whole; empty if it need not."""
        with self._lock:
            silent = self._steady() - (self._status_at or self._started)
        return f"the watch has been silent for {silent:.0f} s" if silent >= DEAD_S else ""

    def collect(self) -> Iterator[Metric]:
        """The families that are made at each scrape."""
        with self._lock:
            totals, oldest = self._totals, self._clock() - VM_SECONDS
            for name in [name for name, last in totals.vms.items() if last.at < oldest]:
                del totals.vms[name]
            vms, status, evicted = list(totals.vms.items()), totals.status(), totals.evicted
            counters = {name: of for name, of in _COUNTERS.items() if name != _SPANS or name in totals.counts}
            counted = list(totals.families(counters, _HISTOGRAMS))
            restarts, halves = dict(totals.restarts), list(self._halves.collect())
        yield from counted
        up = GaugeMetricFamily(
            "ebpf_mig_up", "Whether all processes of the exporter work, and the probes of the watch are attached."
        )
        up.add_metric([], float(self.ready))
        yield up
        again = CounterMetricFamily(
            "ebpf_mig_exporter_restarts",
            "How often a process of the exporter was started again.",
            labels=["process"],
        )
        for process, number in restarts.items():
            again.add_metric([process], number)
        yield again
        yield from last_migrations(vms)
        yield from halves
        dropped = CounterMetricFamily(
            "ebpf_mig_series_dropped", "VMs whose last-migration series were dropped to make room for others."
        )
        dropped.add_metric([], evicted)
        yield dropped
        if status is not None:
            yield from state_of(status)


class _Gauges:
    """Collector for `Metrics.collect`. prometheus_client calls it when it is registered."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.collect()
