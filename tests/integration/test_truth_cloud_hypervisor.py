# SPDX-License-Identifier: Apache-2.0
"""The Cloud Hypervisor command against the truth machine, which behaves like old and new versions.

These tests need no Cloud Hypervisor: tests/truth plays its API, protocol, order of ioctls, threads, log and events,
with a real KVM guest and real probes.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from ebpf_mig.recording.events import Mark
from tests.conftest import requires
from tests.truth.ch_harness import ChRun, migrate, undisturbed
from tests.truth.ch_parts import ChPlan
from tests.truth.harness import PHASES, Helper

pytestmark = [requires("root", "/dev/kvm", "bcc", "kernel BTF", "x86-64")]

MS = 1_000_000
CUT_NS, TOLERANCE_NS = 1 * MS, 1_500_000
MANNERS = ("v52", "v53")
PARTS = ("downtime", "final_iter", "state", "send_state", "complete", "recv_snapshot", "restore", "resume")


def off(run: ChRun, name: str) -> int:
    """How far the machine's own figure, truncated to whole ms, is from the kernel's span, in ns."""
    found = run.witness(f"{name}_ms")
    assert found.span is not None
    ours = found.span[1] - found.span[0]
    late = run.breakdown.pausing.kicked_late_ns if run.breakdown and run.breakdown.pausing else 0
    doubt = found.doubt_ns + (late if name == "downtime" else 0)
    return max(0, max(found.value_ns - ours, ours - found.value_ns - CUT_NS) - doubt)


def sound(run: ChRun) -> None:
    """The migration completed, its recording is complete, and memory arrived unchanged."""
    assert run.status == 0, run.stderr
    assert run.breakdown is not None and run.truth is not None
    assert run.breakdown.completeness.verdict == "complete"
    assert run.truth.same_memory and not run.source_alive
    assert run.truth.fetched == [{"missing": [], "surplus": []}]


def differing(run: ChRun) -> dict[str, float]:
    """The machine's own figures that differ from the kernel's, and by how many ms."""
    return {name: off(run, name) / MS for name in PARTS if off(run, name) > TOLERANCE_NS}


def agreeing(plan: ChPlan, *, tcp: bool = False, tries: int = 3) -> ChRun:
    """A run whose own figures agree with ours. Retries: on a busy host a thread can lose the CPU while it reads the
    clock.
    """
    for _ in range(tries):
        run = undisturbed(plan, tcp=tcp)
        sound(run)
        if not differing(run):
            break
    assert differing(run) == {}
    return run


@pytest.mark.parametrize("manner", [pytest.param("v52", marks=pytest.mark.long), "v53"])
@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "fetch.kernel"])
def test_a_delay_is_booked_where_it_was_made(phase: str, manner: str) -> None:
    run = agreeing(ChPlan(delays={phase: 5 * MS}, manner=manner))
    assert run.truth is not None and run.truth.wrong() == {}
    assert run.truth.breakdown.phase_ns(phase) >= 0.95 * run.truth.injected[phase] >= 4.7 * MS


@pytest.mark.parametrize("manner", MANNERS)
def test_the_wire_over_tcp_has_a_name(manner: str) -> None:
    run = agreeing(ChPlan(manner=manner), tcp=True)
    assert run.breakdown is not None
    stall = next(w for w in run.breakdown.wire or [] if w.message == "state")
    assert stall.reason == "Nagle, delayed ACK" and "behind 16 B not acknowledged" in stall.evidence
    assert "sent but not received (Nagle, delayed ACK)" in run.witness("send_state_ms").explanation


def test_the_second_fetch_of_newer_versions_is_told_apart() -> None:
    old, new = (migrate(ChPlan(manner=manner, vcpus=2)) for manner in MANNERS)
    for run, count in ((old, 1), (new, 2)):
        sound(run)
        assert run.breakdown is not None and len(run.breakdown.dirty_log.fetches) == count
        assert len(run.breakdown.vcpus) == 2
    assert "second dirty-log fetch" in new.witness("state_ms").explanation
    assert "second dirty-log fetch" not in old.witness("state_ms").explanation


@pytest.mark.parametrize("manner", MANNERS)
def test_polling_for_the_stop_is_seen_as_such(manner: str) -> None:
    run = migrate(ChPlan(manner=manner))
    sound(run)
    assert run.breakdown is not None
    pausing = run.breakdown.pausing
    assert pausing is not None and pausing.polling and pausing.naps
    assert MS // 2 <= pausing.asleep_ns <= pausing.noticed_ns, "it slept for 1 ms, of which the stop took some 0.05 ms"


@pytest.mark.parametrize("manner", MANNERS)
def test_events_and_log_become_marks(manner: str) -> None:
    run = migrate(ChPlan(manner=manner))
    sound(run)
    assert run.truth is not None
    marks = {e.name: e for e in run.truth.events if isinstance(e, Mark)}
    assert {"session.trigger", "ch.event.paused", "ch.event.resumed", "ch.downtime_ms", "ch.resume_ms"} <= marks.keys()
    pair = run.witness("paused..resumed")
    doubt = marks["ch.event.paused"].doubt_ns + marks["ch.event.resumed"].doubt_ns
    b, total = run.truth.breakdown, run.witness("downtime_ms").span
    assert total is not None and b.blackout_ns is not None
    assert b.blackout_ns - b.phase_ns("quiesce") - MS - doubt <= pair.value_ns <= total[1] + doubt


@pytest.mark.parametrize("manner", MANNERS)
def test_a_failure_after_the_stop_is_an_aborted_blackout(manner: str) -> None:
    run = migrate(ChPlan(manner=manner, fail="save"))
    assert run.status == 4 and "Could not get vCPU state" in run.stderr, "in its own words"
    assert run.breakdown is not None and run.source_alive
    assert run.breakdown.migration.result == "failed" and run.breakdown.blackout_ns


@pytest.mark.parametrize("manner", MANNERS)
def test_a_destination_that_gives_up(manner: str) -> None:
    # Up to v52 its receive call reports success nevertheless.
    run = migrate(ChPlan(manner=manner, fail="refuse"))
    assert run.status == 4 and run.source_alive
    assert run.breakdown is not None and run.breakdown.migration.result == "failed"
    assert run.breakdown.blackout_ns


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("victim", [0, 1], ids=["source", "destination"])
def test_a_side_that_dies_amid_the_blackout(manner: str, victim: int) -> None:
    def strike(started: list[Helper], plan: ChPlan) -> None:
        until = time.monotonic() + 30
        while '"paused"' not in Path(plan.path("source.events")).read_text() and time.monotonic() < until:
            time.sleep(0.002)
        os.kill(started[victim].pid, signal.SIGKILL)

    begin = time.monotonic()
    run = migrate(ChPlan(manner=manner, delays={"fetch.user": 300 * MS}), act=strike)
    assert run.status == 4 and time.monotonic() - begin < 30
    assert run.breakdown is not None and run.breakdown.migration.result == "failed"
    assert bool(run.breakdown.blackout_ns) is (victim == 1), "a source that lives takes its guest back"


def test_a_version_that_does_not_know_an_option_is_not_asked_to_ignore_it() -> None:
    run = migrate(ChPlan(manner="v46"), "--connections", "4", tcp=True)
    assert run.status == 4 and "does not know 'connections'" in run.stderr and run.source_alive
    run = migrate(ChPlan(manner="v52"), "--memory-mode", "postcopy")
    assert run.status == 4 and "does not know 'memory_mode'" in run.stderr
    run = migrate(ChPlan(manner="v52"), "--downtime-ms", "100", "--timeout-s", "20")
    sound(run)


def test_errors_as_plain_text() -> None:
    run = migrate(ChPlan(manner="v46", fail="save"))
    assert run.status == 4 and "Could not get vCPU state" in run.stderr and "[" not in run.stderr.split("refuses")[1]


def test_versions_that_differ() -> None:
    sound(migrate(ChPlan(manner="v52"), destination_manner="v53"))
    sound(migrate(ChPlan(manner="v53"), destination_manner="v52"))
