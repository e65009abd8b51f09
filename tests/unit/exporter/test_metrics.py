# SPDX-License-Identifier: Apache-2.0
"""The metrics as a scraper reads them: figures, units, bounds, hostile names."""

from __future__ import annotations

import itertools
import subprocess
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from ebpf_mig.exporter.latest import MIGRATIONS, SECONDS
from ebpf_mig.exporter.metrics import SILENT_S, VM_CHARACTERS, VM_SECONDS, VMS, Metrics, vm_label
from ebpf_mig.exporter.observation import MODES, RESULTS, vmms
from tests.conftest import requires
from tests.unit.exporter.observations import observation, status

HOSTILE = ['a"b', "a\\", "a\nb", "\x1b[31m", "\u202e", "\x00", "é" * 500, "}", "{vm=", "\ud800", "x" * 10_000]


def text(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = [sample for family in parse(text(metrics)) for sample in family.samples]
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in found}


def test_a_migration_shows_in_every_family() -> None:
    metrics = Metrics()
    metrics.migration(observation())
    got = samples(metrics)
    both = (("role", "both"), ("vmm", "qemu"))
    assert got["ebpf_mig_blackout_seconds_sum", both] == pytest.approx(0.012345678, abs=0)
    assert got["ebpf_mig_blackout_seconds_count", both] == 1
    assert got["ebpf_mig_blackout_seconds_bucket", (("le", "0.01"), *both)] == 0
    assert got["ebpf_mig_blackout_seconds_bucket", (("le", "0.025"), *both)] == 1
    assert got["ebpf_mig_migrations_total", (("result", "completed"), *both)] == 1
    assert got["ebpf_mig_modes_total", (("mode", "unknown"), ("vmm", "qemu"))] == 1
    assert got["ebpf_mig_modes_total", (("mode", "cpr"), ("vmm", "qemu"))] == 0
    assert got["ebpf_mig_phase_seconds_sum", (("phase", "fetch.kernel"), ("vmm", "qemu"))] == 0.001
    assert got["ebpf_mig_dirty_log_fetch_seconds_sum", (("part", "user"), ("stage", "blackout"))] == 4e-9
    assert got["ebpf_mig_send_seconds_sum", (("state", "blocked"), ("vmm", "qemu"))] == 6e-9
    assert got["ebpf_mig_final_memory_bytes_total", ()] == 4096
    assert got["ebpf_mig_last_migration_blackout_seconds", (("vm", "vm1"),)] == 0.012345678
    assert got["ebpf_mig_last_migration_complete", (("vm", "vm1"),)] == 1


ID = "0123456789abcdef0123456789abcdef"


def test_a_side_alone_exports_its_part_of_the_downtime() -> None:
    metrics = Metrics()
    alone = {"role": "source", "blackout_ns": None, "destination_ns": None, "started_at_ns": None}
    metrics.migration(observation(**alone))
    got = samples(metrics)
    source, destination = (("role", "source"), ("vmm", "qemu")), (("role", "destination"), ("vmm", "qemu"))
    assert got["ebpf_mig_downtime_part_seconds_sum", source] == 0.007
    assert got["ebpf_mig_downtime_part_seconds_count", destination] == 0, "it was not measured"
    assert got["ebpf_mig_blackout_seconds_count", source] == 0
    assert got["ebpf_mig_migration_part_seconds", (("migration", ID), ("role", "source"))] == 0.007
    assert ("ebpf_mig_migration_part_seconds", (("migration", ID), ("role", "destination"))) not in got
    assert got["ebpf_mig_migration_until_state_seconds", (("migration", ID),)] == 0.006
    assert got["ebpf_mig_migration_stop_timestamp_seconds", (("migration", ID),)] == 1_767_268_800
    assert ("ebpf_mig_migration_start_timestamp_seconds", (("migration", ID),)) not in got
    (info,) = [dict(labels) for name, labels in got if name == "ebpf_mig_migration_info"]
    assert info == {"migration": ID, "role": "source", "vmm": "qemu", "vm": "vm1", "recording": observation().recording}


def test_both_sides_on_a_node_feed_the_parts_and_the_blackout() -> None:
    metrics = Metrics()
    metrics.migration(observation())
    got = samples(metrics)
    for role, seconds in (("source", 0.007), ("destination", 0.005)):
        assert got["ebpf_mig_downtime_part_seconds_sum", (("role", role), ("vmm", "qemu"))] == seconds
    assert got["ebpf_mig_blackout_seconds_count", (("role", "both"), ("vmm", "qemu"))] == 1
    assert ("ebpf_mig_downtime_part_seconds_count", (("role", "both"), ("vmm", "qemu"))) not in got
    start, stop = (
        got[f"ebpf_mig_migration_{what}_timestamp_seconds", (("migration", ID),)] for what in ("start", "stop")
    )
    assert start - stop == pytest.approx(0.012345678, abs=1e-6), "a double holds a microsecond of today's wall clock"


def test_a_migration_that_did_not_complete_has_no_half() -> None:
    metrics = Metrics()
    metrics.migration(observation(result="unknown", migration="", source_ns=None, destination_ns=None))
    assert not [name for name, _ in samples(metrics) if name.startswith("ebpf_mig_migration_")]


def test_a_half_expires() -> None:
    now = [1000.0]
    metrics = Metrics(clock=lambda: now[0])
    metrics.migration(observation(at=1000.0))
    assert ID in text(metrics)
    now[0] += SECONDS + 1
    assert ID not in text(metrics)


def test_a_scrape_has_a_migration_in_all_families_or_in_none() -> None:
    metrics = Metrics()
    writer = threading.Thread(target=metrics.migration, args=(observation(),))

    def slowly(registry: CollectorRegistry) -> bytes:
        writer.start()
        writer.join(0.2)
        return generate_latest(registry)

    assert b"ebpf_mig_last_migration_blackout_seconds{" not in metrics.text(slowly)
    writer.join()
    assert b"ebpf_mig_last_migration_blackout_seconds{" in metrics.text(generate_latest)


def test_an_unknown_blackout_is_not_a_zero() -> None:
    metrics = Metrics()
    metrics.migration(observation(blackout_ns=None, role="source", verdict="incomplete"))
    got = samples(metrics)
    assert ("ebpf_mig_last_migration_blackout_seconds", (("vm", "vm1"),)) not in got
    observed = {number for (name, _), number in got.items() if name.startswith("ebpf_mig_blackout_seconds")}
    assert observed == {0.0}
    assert got["ebpf_mig_migrations_incomplete_total", ()] == 1
    assert got["ebpf_mig_last_migration_complete", (("vm", "vm1"),)] == 0


def families_of(metrics: Metrics) -> list[Metric]:
    return list(parse_openmetrics(generate_openmetrics(metrics.registry).decode()))


def test_exemplars_name_the_recording() -> None:
    metrics = Metrics()
    metrics.migration(observation())
    families = families_of(metrics)
    named = {
        (sample.name, sample.exemplar.labels["recording"])
        for family in families
        for sample in family.samples
        if sample.exemplar
    }
    assert ("ebpf_mig_blackout_seconds_bucket", "20260101T000000.000Z-1.rec") in named
    assert ("ebpf_mig_downtime_part_seconds_bucket", "20260101T000000.000Z-1.rec") in named
    ids = {s.exemplar.labels["migration"] for family in families_of(metrics) for s in family.samples if s.exemplar}
    assert ids == {ID}


def test_series_are_bounded_whatever_tenants_and_clients_do() -> None:
    metrics = Metrics()
    metrics.build("1", "2")
    metrics.status(status(lost={f"p{i}": i for i in range(100)}, run_seconds={f"f{i}": i for i in range(100)}))
    worlds = itertools.product(vmms(), ("source", "destination", "both", "unknown"), RESULTS)
    for vmm, role, result in worlds:
        metrics.migration(observation(vmm=vmm, role=role, result=result, phases=observation().phases | {"new": 1}))
    for vmm, mode in itertools.product(vmms(), MODES):
        metrics.migration(observation(vmm=vmm, mode=mode, vm="vm0"))
    metrics.traces(True, 1)
    for number in range(VMS + 50):
        metrics.migration(observation(vm=f"vm{number}", migration=f"{number:032x}"))
    got = samples(metrics)
    assert len(got) <= 3100
    held = {labels for name, labels in got if name == "ebpf_mig_migration_stop_timestamp_seconds"}
    assert len(held) == MIGRATIONS and (("migration", f"{VMS + 49:032x}"),) in held
    names = {labels for name, labels in got if name == "ebpf_mig_last_migration_timestamp_seconds"}
    assert len(names) == VMS
    assert (("vm", f"vm{VMS + 49}"),) in names and (("vm", "vm5"),) not in names
    assert got["ebpf_mig_series_dropped_total", ()] == 50


def test_how_late_signs_were_followed_up() -> None:
    metrics = Metrics()
    metrics.status(status(delays=[2, 0, 1, 0, 0, 0, 0, 1], delay_seconds=1.02))
    got = samples(metrics)
    name = "ebpf_mig_trigger_delay_seconds"
    assert got[f"{name}_bucket", (("le", "0.01"),)] == 2 and got[f"{name}_bucket", (("le", "0.025"),)] == 3
    assert got[f"{name}_bucket", (("le", "+Inf"),)] == got[f"{name}_count", ()] == 4
    assert got[f"{name}_sum", ()] == 1.02


def test_a_vm_expires() -> None:
    now = [1000.0]
    metrics = Metrics(clock=lambda: now[0])
    metrics.migration(observation(at=1000.0))
    assert "vm1" in text(metrics)
    now[0] += VM_SECONDS + 1
    assert "vm1" not in text(metrics)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_inside_their_label(name: str) -> None:
    metrics = Metrics()
    metrics.migration(observation(vm=name))
    got = [labels for name, labels in samples(metrics) if name == "ebpf_mig_last_migration_complete"]
    assert len(got) == 1 and got[0][0][0] == "vm"
    assert all(line.isprintable() for line in text(metrics).split("\n"))


@given(st.text(alphabet=st.characters(codec=None)))
def test_labels_are_short_and_printable(name: str) -> None:
    label = vm_label(name, "name")
    assert len(label) <= VM_CHARACTERS
    assert label.isprintable()
    label.encode()
    assert vm_label(name, "none") == ""
    assert name == "" or len(vm_label(name, "hash")) == 16


def test_ready_only_while_the_watch_speaks_and_is_attached() -> None:
    now = [1000.0]
    metrics = Metrics(steady=lambda: now[0])
    assert not metrics.ready
    metrics.status(status())
    assert metrics.ready and "ebpf_mig_up 1.0" in text(metrics)
    now[0] += SILENT_S - 1
    assert metrics.ready
    now[0] += 1
    assert not metrics.ready and "ebpf_mig_up 0.0" in text(metrics)
    metrics.status(status(attached={"task_newtask": False}))
    assert not metrics.ready


@requires("promtool")
def test_promtool_has_nothing_to_say() -> None:
    metrics = Metrics()
    metrics.build("1", "2")
    metrics.migration(observation())
    metrics.status(status())
    result = subprocess.run(
        ["promtool", "check", "metrics"], check=False, input=text(metrics), capture_output=True, text=True
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("mode", "result"), [("snapshot", "saved"), ("snapshot", "completed"), ("restore", "completed")]
)
def test_snapshots_and_restores_have_times_of_their_own(mode: str, result: str) -> None:
    metrics = Metrics()
    metrics.migration(observation(mode=mode, result=result, phases={"memory.send": 15_000_000, "sync": 0}))
    got = samples(metrics)
    assert got["ebpf_mig_modes_total", (("mode", mode), ("vmm", "qemu"))] == 1
    assert got["ebpf_mig_snapshot_seconds_count", (("mode", mode),)] == 1
    assert got["ebpf_mig_snapshot_seconds_sum", (("mode", mode),)] == 0.02
    seconds = {labels: number for (name, labels), number in got.items() if name.startswith("ebpf_mig_snapshot_phase")}
    assert seconds == {(("mode", mode), ("phase", "memory.send")): 0.015}
    others = ("ebpf_mig_blackout_seconds", "ebpf_mig_downtime_part_seconds", "ebpf_mig_phase_seconds")
    assert not any(number for (name, _), number in got.items() if name.startswith(others))
    failed = [number for (name, labels), number in got.items() if ("result", "failed") in labels]
    assert not any(failed)
