# SPDX-License-Identifier: Apache-2.0
"""Families of gauges and counters that are made at each scrape.

In: each VM's last migration, the state of the watch. Out: Prometheus families.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ebpf_mig.exporter.observation import DELAYS_S, Status
from ebpf_mig.exporter.totals import Last

VM_SECONDS = 900.0
"""How long a VM's last migration is shown."""

_TRIGGERS = ("start", "born", "thread", "connect", "accept", "logging", "memory", "candidate", "exec", "update")
_OUTCOMES = ("migration", "nothing", "suppressed")


def last_migrations(vms: list[tuple[str, Last]]) -> Iterator[Metric]:
    """The families of each VM's last migration."""
    prefix, of = "ebpf_mig_last_migration", f"of the VM's last migration, for {VM_SECONDS:.0f} s after it."
    blackout = GaugeMetricFamily(f"{prefix}_blackout_seconds", f"Blackout {of}", labels=["vm"])
    when = GaugeMetricFamily(f"{prefix}_timestamp_seconds", f"End {of}", labels=["vm"])
    complete = GaugeMetricFamily(f"{prefix}_complete", f"Whether nothing was lost {of}", labels=["vm"])
    for name, last in vms:
        if last.blackout_ns is not None:
            blackout.add_metric([name], last.blackout_ns / 1e9)
        when.add_metric([name], last.at)
        complete.add_metric([name], float(last.complete))
    yield from (blackout, when, complete)


def state_of(s: Status) -> Iterator[Metric]:
    """The families of the watch's state."""
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
