# SPDX-License-Identifier: Apache-2.0
"""Migrations of real Cloud Hypervisors, with each binary found. Witnesses: their own log and events."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.vmm.cloud_hypervisor.lab import ENVIRONMENT, ChPair, lacks_nested_state
from tests.conftest import TRACING, requires
from tests.integration.ch_migrations import (
    MS,
    QUICK,
    SEVERAL,
    TOLERANCE_NS,
    Traced,
    at_event,
    binaries,
    certificates,
    disagreement,
    knows,
    migrate,
)  # fmt: skip

FOUND = binaries()
pytestmark = [
    requires(*(name for name in TRACING if not name.startswith("qemu"))),
    pytest.mark.skipif(not FOUND, reason=f"missing feature: cloud-hypervisor (in PATH, {ENVIRONMENT} or {SEVERAL})"),
    pytest.mark.parametrize("binary", FOUND or ["none"], ids=os.path.basename),
]
SOURCE_PARTS = ("downtime_ms", "state_ms", "send_state_ms", "complete_ms")
DESTINATION_PARTS = ("recv_snapshot_ms", "restore_ms", "resume_ms", "state_to_resume_ms")
ROOMY = Scenario(memory_bytes=1024 * MIB, working_set_bytes=32 * MIB, pages_per_s=None, downtime_ms=1)
"""Takes long enough to be interrupted."""


def needs(binary: str, field: str) -> None:
    if not knows(binary, field):
        pytest.skip(f"missing feature: {field} in {Path(binary).name}")


def completed(run: Traced) -> None:
    """Checks what must hold for every successful migration."""
    b = run.breakdown
    assert run.outcome.result == "completed" and b.migration.result == "completed", run.outcome
    assert b.completeness.verdict == "complete"
    assert b.window_ns == sum(phase.duration_ns for phase in b.phases)
    assert not run.source_alive and run.destination_alive
    assert b.pausing is not None and b.pausing.polling == (b.pausing.naps > 0)
    assert run.destination_beats, "the guest counts on"


def off(run: Traced, parts: Sequence[str]) -> dict[str, float]:
    """Cloud Hypervisor's figures that differ from the kernel's span truncated to whole ms, and by how many ms.

    Its total begins before the kick. The time for which its thread lost the CPU in between is in the report.
    """
    late = run.breakdown.pausing.kicked_late_ns if run.breakdown.pausing else 0
    found = {name: disagreement(run.witness(name)) for name in parts}
    found["downtime_ms"] = max(0, found["downtime_ms"] - late)
    return {name: ns / MS for name, ns in found.items() if ns > TOLERANCE_NS}


def agreeing(attempt: Callable[[], Traced], *parts: str, tries: int = 4) -> Traced:
    """A migration whose own figures agree with ours. Retries: on a busy host a thread can lose the CPU while it
    reads the clock.
    """
    for _ in range(tries):
        run = attempt()
        completed(run)
        if not off(run, parts):
            break
    assert off(run, parts) == {}
    pair = run.witness("paused..resumed")
    doubt = max(e.doubt_ns for e in run.recording.events if getattr(e, "name", "").startswith("ch.event."))
    # The event `paused` comes at some time during `quiesce`, and `resumed` before the answer to Complete.
    total = run.witness("downtime_ms").span
    assert total is not None and run.breakdown.blackout_ns is not None
    assert run.breakdown.blackout_ns - run.row("quiesce") - MS - doubt <= pair.value_ns <= total[1] + doubt
    return run


def in_time(attempt: Callable[[], Traced], tries: int = 4) -> Traced:
    """The first of several attempts in which the disturbance came before the end of the migration."""
    for _ in range(tries):
        run = attempt()
        if run.outcome.result != "completed":
            break
    return run


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_pre_copy(tmp_path: Path, binary: str, transport: str) -> None:
    parts = (*SOURCE_PARTS, "final_iter_ms", "overhead_ms", *DESTINATION_PARTS)
    run = agreeing(lambda: migrate(tmp_path, ChPair(replace(QUICK, transport=transport), binary)), *parts)
    log = run.breakdown.dirty_log
    assert log.mode == "legacy" and run.breakdown.migration.mode == "precopy"
    twice = run.breakdown.migration.vmm_version >= "53"
    assert len(log.fetches) == (2 if twice else 1)
    assert ("second dirty-log fetch" in run.witness("state_ms").explanation) is twice
    if transport == "tcp":
        stall = max(run.breakdown.wire or [], key=lambda w: w.in_flight_ns)
        assert stall.reason == "Nagle, delayed ACK" and stall.in_flight_ns > 35 * MS
        assert stall.in_flight_ns <= run.row("handover")
        assert "sent but not received (Nagle, delayed ACK)" in run.witness("send_state_ms").explanation
    else:
        assert {stall.reason for stall in run.breakdown.wire or []} <= {"late reader"}


def test_local(tmp_path: Path, binary: str) -> None:
    parts = SOURCE_PARTS + DESTINATION_PARTS
    run = agreeing(lambda: migrate(tmp_path, ChPair(QUICK, binary, local=True)), *parts)
    assert run.breakdown.migration.mode == "local" and run.breakdown.dirty_log.mode == "none"
    assert run.row("fetch.kernel") == run.row("memory.send") == 0
    assert any("--seccomp log" in note for note in run.breakdown.notes)


def test_several_connections_and_vcpus(tmp_path: Path, binary: str) -> None:
    parts = (*SOURCE_PARTS, "final_iter_ms", *DESTINATION_PARTS)
    wanted = replace(QUICK, multifd_channels=4, vcpus=2)
    run = agreeing(lambda: migrate(tmp_path, ChPair(wanted, binary)), *parts)
    # Memory is sent in chunks of 64 MiB: of 128 MiB, not all four connections get one. The main one carries the rest.
    assert 3 <= run.breakdown.migration.connections <= 5
    assert len(run.breakdown.vcpus) == 2


@requires("openssl")
def test_tls(tmp_path: Path, binary: str) -> None:
    needs(binary, "tls_dir")
    tls = certificates(tmp_path)
    run = agreeing(lambda: migrate(tmp_path, ChPair(QUICK, binary, tls_dir=tls)), "downtime_ms")
    assert run.breakdown.migration.mode == "precopy" and len(run.breakdown.dirty_log.fetches) == 2


def test_postcopy(tmp_path: Path, binary: str) -> None:
    needs(binary, "memory_mode")
    run = migrate(tmp_path, ChPair(replace(QUICK, postcopy=True), binary))
    completed(run)
    b = run.breakdown
    assert b.migration.mode == "postcopy" and run.row("memory.send") == 0 and b.dirty_log.final is None
    assert b.postcopy is not None and b.postcopy.while_dark is not None and b.postcopy.while_dark.bytes > 0
    fetched = b.postcopy.while_dark.bytes + b.postcopy.after.bytes
    assert QUICK.memory_bytes <= fetched <= 1.02 * QUICK.memory_bytes, "each page once, and a header each"
    drained_events = [
        e for e in run.recording.events if getattr(e, "name", "") == "ch.event.postcopy-migration-completed"
    ]
    assert drained_events and b.postcopy.drained_ns > 100 * MS


def test_an_old_version_is_not_asked_for_what_it_does_not_know(tmp_path: Path, binary: str) -> None:
    if knows(binary, "memory_mode"):
        pytest.skip(f"missing feature: a version without postcopy ({Path(binary).name} has it)")
    from ebpf_mig.errors import VmmError

    with pytest.raises(VmmError, match="does not know 'memory_mode'"):
        migrate(tmp_path, ChPair(replace(QUICK, postcopy=True), binary))


def test_a_destination_that_dies_before_the_stop(tmp_path: Path, binary: str) -> None:
    kill = at_event("migration-started", lambda pair: os.kill(pair.destination.pid, signal.SIGKILL))
    run = migrate(tmp_path, ChPair(ROOMY, binary), kill)
    assert run.outcome.result == "failed" and run.outcome.error
    assert run.breakdown.migration.result == "failed" and run.breakdown.blackout_ns is None
    assert run.source_alive and run.took_s < 20


def test_a_destination_that_dies_after_the_stop(tmp_path: Path, binary: str) -> None:
    # Over TCP the state is delayed on the wire for 40 ms, which is usually long enough.
    kill = at_event("paused", lambda pair: os.kill(pair.destination.pid, signal.SIGKILL))
    run = in_time(lambda: migrate(tmp_path, ChPair(QUICK, binary, seccomp="log"), kill))
    assert run.outcome.result == "failed" and run.outcome.error
    assert run.breakdown.migration.result == "failed"
    assert run.breakdown.blackout_ns and run.source_alive, "an aborted blackout: the guest came back"
    stop = run.breakdown.vcpus[0]
    assert stop.start is not None and run.source_beats[-1] > run.source_beats[0]


def test_a_failure_of_its_own_after_the_stop(tmp_path: Path, binary: str) -> None:
    if not lacks_nested_state():
        pytest.skip("missing feature: a KVM that cannot save nested state")
    run = migrate(tmp_path, ChPair(QUICK, binary, preload=False, seccomp="log"))
    assert run.outcome.result == "failed"
    assert "GetNestedState" in run.outcome.error, "in its own words"
    assert run.breakdown.blackout_ns and run.source_alive


def test_a_source_that_dies_amid_the_pages(tmp_path: Path, binary: str) -> None:
    def kill(pair: ChPair) -> None:
        time.sleep(0.15)
        os.kill(pair.source.pid, signal.SIGKILL)

    run = migrate(tmp_path, ChPair(ROOMY, binary), at_event("migration-started", kill))
    assert run.outcome.result == "failed" and run.breakdown.migration.result != "completed"
    assert run.took_s < 20
    # Both versions loop on a read(2) that returns 0, and answer no further API call (docs/findings.md).
    assert any("keeps calling" in note for note in run.breakdown.notes)


def test_a_source_that_dies_after_the_stop(tmp_path: Path, binary: str) -> None:
    kill = at_event("paused", lambda pair: os.kill(pair.source.pid, signal.SIGKILL))
    run = in_time(lambda: migrate(tmp_path, ChPair(QUICK, binary), kill))
    assert run.outcome.result == "failed" and not run.destination_beats
    assert run.breakdown.blackout_ns is None and run.took_s < 20


def test_the_demo_by_its_command(tmp_path: Path, binary: str) -> None:
    command = [sys.executable, "-m", "ebpf_mig.cli", "demo", "--vmm", "cloud-hypervisor", "--vmm-binary", binary]
    command += ["--memory", "128MiB", "--working-set", "4MiB", "-o", str(tmp_path / "ch.rec"), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    b = json.loads(done.stdout)
    assert b["migration"]["result"] == "completed"
    if lacks_nested_state():
        assert any("nested state" in note for note in b["notes"])
    assert {"ch.downtime_ms", "ch.state_ms", "ch.paused..resumed"} <= {w["name"] for w in b["witnesses"]}
