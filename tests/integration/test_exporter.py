# SPDX-License-Identifier: Apache-2.0
"""The exporter and `watch` as a node runs them: real VMs migrate that nobody told them about, a real scraper asks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.lab.qemu import QemuPair
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording import read_recording
from ebpf_mig.vmm.qemu import QemuMigration
from tests.conftest import TRACING, requires
from tests.integration.migrations import QUICK

pytestmark = requires(*TRACING)

PROGRAM = [sys.executable, "-m", "ebpf_mig.cli"]
OURS = f"test-{os.getpid()}-"
"""Names of our VMs begin with this: other tests may be migrating theirs at the same time."""
NAMED = ["-name", OURS + "{role}"]
SETTLED_S = 4.0
"""By then a new VM has been found, suspected for being new, and cleared."""


def until(what: Callable[[], Any], seconds: float = 30) -> Any:
    """The first true answer; fails if there is none in time."""
    deadline = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(*command: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(list(command), text=True, **more)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()


def fetch(url: str, accept: str = "") -> str:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def is_ready(port: int) -> bool:
    with contextlib.suppress(OSError):
        return fetch(f"http://127.0.0.1:{port}/-/ready") == "ready\n"
    return False


@contextlib.contextmanager
def exporter(state: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = free_port()
    options = ["--web.listen-address", f"127.0.0.1:{port}", "--state-directory", str(state), "--vm", f"{OURS}*", "-vv"]
    with running(*PROGRAM, "exporter", *options) as process:
        until(lambda: is_ready(port))
        yield process, port


def migrate(scenario: Scenario, settle: float = SETTLED_S) -> None:
    """One migration that the exporter is not told about."""
    with QemuPair(scenario, None, NAMED) as pair:
        time.sleep(settle)
        with contextlib.closing(
            QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options())
        ) as migration:
            migration.prepare()
            assert migration.run(60).result == "completed"
        time.sleep(1.5)


def samples(port: int) -> list[Any]:
    text = fetch(f"http://127.0.0.1:{port}/metrics", "application/openmetrics-text; version=1.0.0")
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def value(port: int, name: str, **labels: str) -> float:
    return sum(float(s.value) for s in samples(port) if s.name == name and labels.items() <= s.labels.items())


def report(path: Path) -> Breakdown:
    recording = read_recording(path)
    assert not recording.truncated
    return analyse(recording.header, recording.events)


def capabilities(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1], 16) for line in lines if line.startswith("Cap")}


def listener_of(exporter_pid: int) -> int:
    children = Path(f"/proc/{exporter_pid}/task/{exporter_pid}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_a_migration_nobody_announced_is_in_the_metrics(transport: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with exporter(state) as (process, port):
        scenario = Scenario(
            QUICK.memory_bytes, QUICK.working_set_bytes, QUICK.pages_per_s, vcpus=2, transport=transport
        )
        migrate(scenario)
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
        until(lambda: value(port, "ebpf_mig_triggers_total", outcome="migration") == 1)
        until(lambda: value(port, "ebpf_mig_armed") == 0)
        until(lambda: value(port, "ebpf_mig_vms") == 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0


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
            thread = threading.Thread(target=_run, args=(migration,))
            thread.start()
            until(lambda: value(port, "ebpf_mig_armed") == 1)
            time.sleep(1)
            os.kill(pair.destination.pid, signal.SIGKILL)
            thread.join()
            until(lambda: value(port, "ebpf_mig_migrations_total") == 1, 20)
            assert value(port, "ebpf_mig_migrations_total", result="completed") == 0
            assert value(port, "ebpf_mig_blackout_seconds_count") == 0


def test_an_exporter_started_in_mid_migration_picks_it_up(tmp_path: Path) -> None:
    slow = Scenario(128 * MIB, 32 * MIB, 2000, bandwidth_bytes=10 << 20)
    with QemuPair(slow, None, NAMED) as pair:
        time.sleep(5)
        with contextlib.closing(
            QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options())
        ) as migration:
            migration.prepare()
            thread = threading.Thread(target=_run, args=(migration,))
            thread.start()
            time.sleep(0.5)
            state = tmp_path / "state"
            with exporter(state) as (_, port):
                assert thread.is_alive(), "the migration was over too soon to show anything"
                thread.join()
                until(lambda: value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 1, 15)
                (kept,) = state.iterdir()
                blackout = report(kept).blackout_ns
                assert blackout is not None
                assert value(port, "ebpf_mig_blackout_seconds_sum") == blackout / 1e9


def _run(migration: QemuMigration) -> None:
    with contextlib.suppress(Exception):
        migration.run(30)


def test_what_listens_has_no_privilege_and_ends_with_the_watch(tmp_path: Path) -> None:
    with exporter(tmp_path / "state") as (process, port):
        listener = listener_of(process.pid)
        assert not any(capabilities(listener).values())
        status = Path(f"/proc/{listener}/status").read_text()
        assert "NoNewPrivs:\t1" in status and "Uid:\t65534\t65534\t65534\t65534" in status
        maps = Path(f"/proc/{listener}/maps").read_text()
        assert "LLVM" not in maps and "libbcc" not in maps
        held = capabilities(process.pid)
        assert held["CapEff"] == held["CapBnd"] and not held["CapEff"] >> 21 & 1
        process.kill()
        until(lambda: not Path(f"/proc/{listener}").exists() or " Z " in Path(f"/proc/{listener}/stat").read_text())
        with pytest.raises(OSError):
            fetch(f"http://127.0.0.1:{port}/metrics")


def test_watch_says_one_line_for_a_migration(tmp_path: Path) -> None:
    command = [*PROGRAM, "watch", "--format", "json", "--count", "1", "--vm", f"{OURS}*"]
    command += ["--state-directory", str(tmp_path / "state")]
    with running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None and process.stdout is not None
        assert "watching" in process.stderr.readline()
        migrate(QUICK)
        out = process.stdout.read()
        assert process.wait(15) == 0
    (said,) = [json.loads(line) for line in out.splitlines()]
    found = report(tmp_path / "state" / said["recording"])
    assert said["blackout_ns"] == found.blackout_ns and said["role"] == "both" and said["vm"] == f"{OURS}source"


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
            migrate(QUICK)
            answer = until(lambda: query("ebpf_mig_last_migration_blackout_seconds"))
    (kept,) = state.iterdir()
    assert float(answer[0]["value"][1]) * 1e9 == pytest.approx(report(kept).blackout_ns, abs=1)
