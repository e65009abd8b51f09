# SPDX-License-Identifier: Apache-2.0
"""The exporter and `watch` as on a node: real VMs migrate unannounced, and a real scraper reads the metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.analysis.fetch_split import on_cpu
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.linux.kvm import DIRTY_LOG
from ebpf_mig.recording.events import Ioctl, Samples, VcpuExit, VcpuSpan
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.vmm.qemu.migration import QemuMigration
from tests.conftest import TRACING, requires
from tests.integration.exporters import (
    NAMED,
    OURS,
    PROGRAM,
    SETTLED_S,
    exporter,
    fetch,
    free_port,
    migrate,
    quietly,
    report,
    running,
    samples,
    until,
    value,
)
from tests.integration.migrations import LASTING, QUICK

pytestmark = requires(*TRACING)
BUSY = Scenario(128 * MIB, 32 * MIB, 20_000, bandwidth_bytes=16 << 20, downtime_ms=3000)
"""A guest whose vCPU leaves KVM_RUN every 0.4 s, and dirties enough pages for long fetches."""
SAMPLED_NS = 10_000_000
"""A fetch with this CPU time must have samples: the sampler's period is 1 ms while the guest runs."""


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_a_migration_nobody_announced_is_in_the_metrics(transport: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with exporter(state) as (process, port):

        def cleared() -> None:
            until(lambda: value(port, "ebpf_mig_vms") == 2 and value(port, "ebpf_mig_armed") == 0)

        migrate(dataclasses.replace(LASTING, vcpus=2, transport=transport), cleared)
        until(lambda: value(port, "ebpf_mig_migrations_total") == 1, 15)
        (kept,) = state.iterdir()
        found = report(kept)
        assert found.migration.result == "completed" and found.completeness.verdict == "complete"
        assert found.migration.transport == transport and found.migration.mode == "precopy"
        assert found.blackout_ns is not None
        assert value(port, "ebpf_mig_blackout_seconds_sum", vmm="qemu", role="both") == found.blackout_ns / 1e9
        assert value(port, "ebpf_mig_last_migration_blackout_seconds", vm=f"{OURS}source") == found.blackout_ns / 1e9
        phases = {s.labels["phase"]: s.value for s in samples(port) if s.name == "ebpf_mig_phase_seconds_sum"}
        assert phases == {p.phase: p.duration_ns / 1e9 for p in found.phases}
        exemplars = {s.exemplar.labels["recording"] for s in samples(port) if s.exemplar}
        assert exemplars == {kept.name}
        for role in ("source", "destination"):
            assert value(port, "ebpf_mig_downtime_part_seconds_count", role=role) == 1
        until(lambda: value(port, "ebpf_mig_triggers_total", outcome="migration") == 1)
        assert value(port, "ebpf_mig_trigger_delay_seconds_count") >= 1
        until(lambda: value(port, "ebpf_mig_armed") == 0)
        until(lambda: value(port, "ebpf_mig_vms") == 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0


def test_a_kept_recording_has_the_vcpus_spans_and_the_samples(tmp_path: Path) -> None:
    """Without these events the report has no brownout, and no split of its final fetch."""
    state = tmp_path / "state"
    with exporter(state) as (_, port):
        migrate(BUSY)
        until(lambda: value(port, "ebpf_mig_migrations_total", result="completed") == 1, 15)
    (kept,) = state.iterdir()
    events = read_recording(kept).events
    fetches = [event for event in events if isinstance(event, Ioctl) and event.cmd in DIRTY_LOG]
    vcpus = {event.tid for event in events if isinstance(event, VcpuExit) and event.pid == fetches[0].pid}
    assert vcpus and vcpus <= {event.tid for event in events if isinstance(event, VcpuSpan)}
    if any(on_cpu(fetch) >= SAMPLED_NS for fetch in fetches[1:]):
        assert any(isinstance(event, Samples) for event in events)
    passes = report(kept).dirty_log.passes
    assert any(one.brownout is not None and one.brownout.vcpus for one in passes)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_one_side_alone_without_a_connection_that_shows(side: str, tmp_path: Path) -> None:
    """Over a UNIX socket, as in a tunnelled migration: a thread's name gives away the source, its growth the
    destination.
    """
    slow = Scenario(128 * MIB, 64 * MIB, 4000, transport="unix", bandwidth_bytes=32 << 20)
    with exporter(tmp_path / "state", vms=side) as (_, port):

        def cleared() -> None:
            until(lambda: value(port, "ebpf_mig_vms") == 1 and value(port, "ebpf_mig_armed") == 0)

        migrate(slow, cleared)
        until(lambda: value(port, "ebpf_mig_migrations_total", role=side, result="completed") == 1, 15)
        until(lambda: value(port, "ebpf_mig_triggers_total", outcome="migration") == 1)
        assert value(port, "ebpf_mig_blackout_seconds_count") == 0, "it has two sides"
        assert value(port, "ebpf_mig_downtime_part_seconds_count", role=side) == 1
        assert value(port, "ebpf_mig_downtime_part_seconds_count") == 1
        assert value(port, "ebpf_mig_phase_seconds_count", phase="state.load") == (side == "destination")


def test_vms_that_boot_and_end_are_no_migrations(tmp_path: Path) -> None:
    with exporter(tmp_path / "state") as (_, port):
        with QemuPair(QUICK, None, NAMED):
            until(lambda: value(port, "ebpf_mig_vms") == 2)
            until(lambda: value(port, "ebpf_mig_triggers_total", outcome="nothing") >= 2)
        until(lambda: value(port, "ebpf_mig_vms") == 0)
        assert value(port, "ebpf_mig_migrations_total") == 0 and value(port, "ebpf_mig_armed") == 0


def test_a_migration_that_fails_is_told_as_such(tmp_path: Path) -> None:
    state = tmp_path / "state"
    slow = Scenario(128 * MIB, 16 * MIB, 20_000, bandwidth_bytes=8 << 20)
    with exporter(state) as (_, port), QemuPair(slow, None, NAMED) as pair:
        time.sleep(SETTLED_S)
        with contextlib.closing(
            QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options())
        ) as migration:
            migration.prepare()
            thread = threading.Thread(target=quietly, args=(migration,))
            thread.start()
            until(lambda: value(port, "ebpf_mig_armed") == 1)
            time.sleep(1)
            os.kill(pair.destination.pid, signal.SIGKILL)
            thread.join()
            until(lambda: value(port, "ebpf_mig_migrations_total") == 1, 20)
            assert value(port, "ebpf_mig_migrations_total", result="completed") == 0
            assert value(port, "ebpf_mig_blackout_seconds_count") == 0


def test_watch_says_one_line_for_a_migration(tmp_path: Path) -> None:
    command = [*PROGRAM, "watch", "--format", "json", "--count", "1", "--vm", f"{OURS}*"]
    command += ["--state-directory", str(tmp_path / "state")]
    with running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None and process.stdout is not None
        assert "watching" in process.stderr.readline()
        migrate(LASTING)
        out = process.stdout.read()
        assert process.wait(15) == 0
    (said,) = [json.loads(line) for line in out.splitlines()]
    found = report(tmp_path / "state" / said["recording"])
    assert said["blackout_ns"] == found.blackout_ns and said["role"] == "both" and said["vm"] == f"{OURS}source"


STRUCK = """
import signal, sys
from ebpf_mig.cli import main
from ebpf_mig.probes.inherited import InheritedProgram
keep, struck = InheritedProgram._keep, []

def strike(self, *given):
    if not struck:
        struck.append(signal.raise_signal(signal.SIGTERM))
    return keep(self, *given)

InheritedProgram._keep = strike
sys.exit(main(sys.argv[1:]))
"""
"""The program, which gets SIGTERM while libbpf hands over the first record. What a handler raises there is lost."""


def test_a_signal_that_comes_while_records_are_handed_over_ends_the_watch(tmp_path: Path) -> None:
    command = [PROGRAM[0], "-c", STRUCK, "watch", "--vm", f"{OURS}*", "--state-directory", str(tmp_path / "state")]
    with running(*command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None and "watching" in process.stderr.readline()
        with QemuPair(QUICK, None, NAMED):
            assert process.wait(20) == 128 + signal.SIGTERM
        assert process.stderr.read() == "ebpf-mig: terminated\n"


@pytest.mark.long
@requires("prometheus")
def test_a_real_prometheus_answers_with_the_reports_figure(tmp_path: Path) -> None:
    state, mine = tmp_path / "state", free_port()
    with exporter(state) as (_, port):
        config = tmp_path / "prometheus.yml"
        job = f"{{job_name: ebpf-mig, scrape_interval: 1s, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}"
        config.write_text(f"scrape_configs: [{job}]\n")
        options = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/tsdb"]
        options += [f"--web.listen-address=127.0.0.1:{mine}", "--log.level=error"]
        with running("prometheus", *options):

            def query(text: str) -> list[Any]:
                url = f"http://127.0.0.1:{mine}/api/v1/query?query={urllib.parse.quote(text)}"
                with contextlib.suppress(OSError):
                    return list(json.loads(fetch(url))["data"]["result"])
                return []

            until(lambda: query("ebpf_mig_up == 1"))
            migrate(LASTING)
            answer = until(lambda: query("ebpf_mig_last_migration_blackout_seconds"))
            summed = query('sum(ebpf_mig_blackout_seconds_sum{role="both"})')
    (kept,) = state.iterdir()
    said = subprocess.run(
        [*PROGRAM, "report", str(kept), "--format", "json"], capture_output=True, text=True, check=True
    )
    blackout = json.loads(said.stdout)["blackout_ns"]
    assert float(answer[0]["value"][1]) * 1e9 == pytest.approx(blackout, abs=1)
    assert float(summed[0]["value"][1]) * 1e9 == pytest.approx(blackout, abs=1)
