# SPDX-License-Identifier: Apache-2.0
"""Real migrations on real KVM: the structure of the breakdown, and its figures against independent witnesses.

Witnesses: QEMU's own trace events (microseconds, on our clock), QMP's STOP and RESUME stamps, and the guest's serial
heartbeat. Where a witness marks another instant than ours, the assertion is a bracket and says why.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.lab.scenario import MIB
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import Ioctl, Kick, Mark, OffCpu, VcpuEnter, VcpuExit, VcpuState
from ebpf_mig.vmm.base import Migration
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import TRACING, requires
from tests.integration.migrations import QUICK, Traced, TraceLine, first, last, migrate

pytestmark = requires(*TRACING)

DOUBT_NS = 200_000
"""A larger difference to a witness must be explained."""
KVM_RUN = f"type 0x{kvm.RUN:x},"
"""The name of KVM_RUN in QEMU's trace event of vCPU ioctls."""


def assert_exact_partition(b: Breakdown) -> None:
    assert b.window_ns is not None
    spans = sorted(span for phase in b.phases for span in phase.spans)
    assert spans[0][0] == 0 and spans[-1][1] == b.window_ns
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
    assert sum(phase.duration_ns for phase in b.phases) == b.window_ns
    assert all(phase.duration_ns >= 0 for phase in b.phases)


def source_pid(run: Traced) -> int:
    return run.recording.header.targets[0].pid


def instants(run: Traced) -> tuple[int, int, int]:
    """(window begin, last stop, first start) in CLOCK_MONOTONIC. The begin is the kick, or stop, that fits the
    breakdown.

    It is not a kick if the vCPU was still out of KVM_RUN after an earlier kick, e.g. of the dirty ring's reaper.
    """
    b = run.breakdown
    assert b.blackout is not None
    ours = [e for e in run.recording.events if isinstance(e, Kick | VcpuExit | VcpuState) and e.pid == source_pid(run)]
    # A vCPU that was outside KVM_RUN anyway when asked to stop has no exit event, only its state at the end.
    stops = {e.exit_ns if isinstance(e, VcpuState) else e.at_ns for e in ours if not isinstance(e, Kick)}
    begins = [*(e.at_ns for e in ours if isinstance(e, Kick)), *sorted(stops)]
    begin = next(at for at in begins if at + b.blackout[0] in stops)
    return begin, begin + b.blackout[0], begin + b.blackout[1]


def assert_complete(run: Traced) -> None:
    b = run.breakdown
    assert run.outcome.result == "completed"
    assert b.migration.result == "completed"
    assert b.completeness.verdict == "complete", b.completeness.reasons
    assert_exact_partition(b)
    assert b.migration.source is not None and b.migration.source.pid == source_pid(run)
    assert b.migration.destination is not None
    assert b.migration.destination.pid == run.recording.header.targets[1].pid
    assert b.blackout_ns is not None and 0 < b.blackout_ns <= (b.window_ns or 0)


def off_cpu_ns(run: Traced, tid: int, begin: int, end: int) -> int:
    """How long a thread was off the CPU between two instants, as far as it was recorded."""
    waits = [e for e in run.recording.events if isinstance(e, OffCpu) and e.tid == tid]
    return sum(max(0, min(e.end_ns, end) - max(e.begin_ns, begin)) for e in waits)


def assert_agrees_with_qemu(run: Traced) -> None:
    """Stop and start agree with QEMU's trace events."""
    begin, stop, start = instants(run)
    finish = last(run.source_trace, "runstate_set", "new_state 7 (finish-migrate)").at_ns
    stopped = last(run.source_trace, "migration_completion_vm_stop").at_ns
    # The run state changes right before the vCPUs are kicked, unless the migration thread loses the CPU in between;
    # vm_stop's trace line comes after the handlers and the drain.
    kicker = next(e.tid for e in run.recording.events if isinstance(e, Kick) and e.at_ns == begin)
    assert abs(begin - finish) - off_cpu_ns(run, kicker, finish, begin) < DOUBT_NS
    assert finish - DOUBT_NS <= stop <= stopped + DOUBT_NS
    loaded = first(run.destination_trace, "process_incoming_migration_co_end").at_ns
    running = first(run.destination_trace, "runstate_set", "new_state 9 (running)").at_ns
    # The state becomes `running` before clocks are set and vCPUs kicked. After that, QEMU's trace has a line right
    # before each KVM_RUN, of which the first only flushes the vCPU's state (-EINTR).
    assert loaded - DOUBT_NS <= running <= start + DOUBT_NS
    runs = [line.at_ns for line in run.destination_trace if line.name == "kvm_vcpu_ioctl" and KVM_RUN in line.text]
    assert runs and running - DOUBT_NS <= runs[0] <= start
    vcpu = next(e.tid for e in run.recording.events if isinstance(e, VcpuEnter) and e.at_ns == start)
    assert min(abs(at - start) - off_cpu_ns(run, vcpu, at, start) for at in runs) < DOUBT_NS


def assert_final_fetch_is_bracketed(run: Traced) -> None:
    """The GET ioctls of the final fetch, and no others, lie between QEMU's last sync_start and sync_end."""
    sync_begin = last(run.source_trace, "migration_bitmap_sync_start").at_ns - DOUBT_NS
    sync_end = last(run.source_trace, "migration_bitmap_sync_end").at_ns + DOUBT_NS
    _, stop, _ = instants(run)
    gets = [e for e in run.recording.events if isinstance(e, Ioctl) and e.cmd == kvm.GET_DIRTY_LOG]
    after_stop = [e for e in gets if e.begin_ns >= stop]
    assert after_stop and all(sync_begin <= e.begin_ns and e.end_ns <= sync_end for e in after_stop)
    fetched = [i for fetch in run.breakdown.dirty_log.fetches for i in fetch.ioctls if i.ioctl == "GET_DIRTY_LOG"]
    assert len(fetched) == len(after_stop)
    assert len({e.slot for e in after_stop}) == len(after_stop), "each memslot once"


def assert_heartbeat(run: Traced) -> None:
    """The source does not beat after the stop, nor the destination before the start.

    QEMU traces a beat in the vCPU's thread, after the exit that it made. In between the thread may have waited for a
    CPU. Reading the beats elsewhere adds a delay that nobody knows: 27 ms once, on an emulated machine.
    """
    _, stop, start = instants(run)
    near, far = _beats(run.source_trace), _beats(run.destination_trace)
    assert (
        near and far and {letter for _, letter in run.source_beats} == {letter for _, letter in run.destination_beats}
    )
    vcpus = {e.tid for e in run.recording.events if isinstance(e, VcpuExit | VcpuState) and e.pid == source_pid(run)}
    waited = max(off_cpu_ns(run, tid, stop, near[-1]) for tid in vcpus)
    assert near[-1] - waited <= stop + DOUBT_NS
    assert far[0] >= start - DOUBT_NS


def _beats(lines: Sequence[TraceLine]) -> list[int]:
    """Writes to the data register: `write addr 0x00 val ...`, from QEMU 11.1 on `[0x00] <- ...`."""
    data = ("write addr 0x00 ", "[0x00] <- ")
    return [line.at_ns for line in lines if line.name == "serial_write" and line.text.startswith(data)]


def assert_true(run: Traced) -> None:
    assert_complete(run)
    assert_agrees_with_qemu(run)
    assert_final_fetch_is_bracketed(run)
    assert_heartbeat(run)


def test_tcp(tmp_path: Path) -> None:
    run = migrate(tmp_path)
    assert_true(run)
    b = run.breakdown
    assert (b.migration.transport, b.migration.connections) == ("tcp", 1)
    assert b.dirty_log.mode == "manual"
    assert b.phase_ns("fetch.kernel") > 0 and b.phase_ns("memory.send") > 0 and b.phase_ns("state.load") > 0


@pytest.mark.everywhere("ring")
@pytest.mark.times
@requires("KVM's dirty ring")
def test_dirty_ring(tmp_path: Path) -> None:
    run = migrate(tmp_path, replace(QUICK, dirty_ring=4096))
    assert_complete(run)
    assert_heartbeat(run)
    assert run.breakdown.dirty_log.mode == "ring"
    resets = [e for e in run.recording.events if isinstance(e, Ioctl) and e.cmd == kvm.RESET_DIRTY_RINGS]
    assert resets, "QEMU's reaper and its fetches empty the rings"


def test_unix(tmp_path: Path) -> None:
    run = migrate(tmp_path, replace(QUICK, transport="unix"))
    assert_true(run)
    assert run.breakdown.migration.transport == "unix"


def test_multifd(tmp_path: Path) -> None:
    run = migrate(tmp_path, replace(QUICK, multifd_channels=2))
    assert_true(run)
    assert run.breakdown.migration.connections == 3


def test_three_vcpus(tmp_path: Path) -> None:
    run = migrate(tmp_path, replace(QUICK, vcpus=3))
    assert_true(run)
    vcpus = run.breakdown.vcpus
    assert [v.vcpu for v in vcpus] == [0, 1, 2]
    assert all(v.stop is not None and v.start is not None and v.blackout_ns == v.start - v.stop for v in vcpus)
    assert run.breakdown.blackout == (max(v.stop or 0 for v in vcpus), min(v.start or 0 for v in vcpus))


def test_qmp_stamps_bracket_the_blackout(tmp_path: Path) -> None:
    """QEMU sends STOP after all vCPUs have stopped, and RESUME before they are kicked to run."""
    run = migrate(tmp_path)
    _, stop, start = instants(run)
    stamps = {e.name: e for e in run.recording.events if isinstance(e, Mark)}
    assert stamps["qmp.STOP"].at_ns >= stop - DOUBT_NS
    assert stamps["qmp.RESUME"].at_ns <= start + DOUBT_NS
    named = {w.name: w for w in run.breakdown.witnesses}
    assert any("downtime" in name for name in named)
    assert all(w.explanation for w in run.breakdown.witnesses)


def test_the_bytes_of_the_final_pass_are_qemus(tmp_path: Path) -> None:
    """QEMU counts the bytes put on the channel while the VM is stopped; ours are memory and state together."""
    run = migrate(tmp_path)
    said = next(e.value for e in run.recording.events if isinstance(e, Mark) and e.name == "qmp.downtime_bytes")
    final = run.breakdown.dirty_log.final
    assert final is not None
    assert final.bytes == pytest.approx(said, rel=0.02, abs=140_000)  # a buffer of 32 pages may go earlier


def kicked_vcpus(run: Traced) -> set[int]:
    tids = {e.tid for e in run.recording.events if isinstance(e, VcpuExit) and e.pid == source_pid(run)}
    return {e.target_tid for e in run.recording.events if isinstance(e, Kick) and e.target_tid in tids}


def test_cancelled(tmp_path: Path) -> None:
    """The link is too slow to converge. Cancelled while the guest runs: no blackout, and the report says so."""
    slow = replace(QUICK, working_set_bytes=32 * MIB, bandwidth_bytes=2 * MIB, downtime_ms=1)

    def cancel(_pair: QemuPair, migration: Migration) -> None:
        time.sleep(1)
        migration.cancel()

    run = migrate(tmp_path, slow, meddle=cancel)
    assert run.outcome.result == "cancelled"
    assert run.breakdown.migration.result == "cancelled"
    assert run.breakdown.blackout_ns is None and run.breakdown.window_ns is None
    assert run.breakdown.dirty_log.passes
    assert run.source_beats[-1][0] > max(e.at_ns for e in run.outcome.marks if isinstance(e, Mark)) - 10**9


def test_a_destination_that_dies(tmp_path: Path) -> None:
    slow = replace(QUICK, working_set_bytes=32 * MIB, bandwidth_bytes=2 * MIB, downtime_ms=1)

    def kill(pair: QemuPair, _migration: Migration) -> None:
        time.sleep(0.7)
        os.kill(pair.destination.pid, signal.SIGKILL)

    run = migrate(tmp_path, slow, meddle=kill)
    assert run.outcome.result == "failed"
    assert run.breakdown.migration.result == "failed"
    assert run.breakdown.blackout_ns is None


def test_a_source_that_is_killed(tmp_path: Path) -> None:
    slow = replace(QUICK, working_set_bytes=32 * MIB, bandwidth_bytes=2 * MIB, downtime_ms=1)

    def kill(pair: QemuPair, _migration: Migration) -> None:
        time.sleep(0.7)
        os.kill(pair.source.pid, signal.SIGKILL)

    run = migrate(tmp_path, slow, meddle=kill)
    assert run.outcome.result == "failed"
    assert "source QEMU ended" in run.outcome.error
    assert run.breakdown.migration.result == "failed"
    assert run.breakdown.blackout_ns is None


def test_cancelled_after_the_stop(tmp_path: Path) -> None:
    """Cancelled while the VM is stopped in pre-switchover: it continues on the source, which is an aborted blackout."""

    def cancel(pair: QemuPair, migration: Migration) -> None:
        time.sleep(1.5)
        migration.cancel()

    run = migrate(tmp_path, QUICK, meddle=cancel, capabilities={"pause-before-switchover": True})
    b = run.breakdown
    assert run.outcome.result == "cancelled" and b.migration.result == "cancelled"
    assert_exact_partition(b)
    stamps = {e.name: e.at_ns for e in run.recording.events if isinstance(e, Mark) and e.pid == source_pid(run)}
    said = stamps["qmp.RESUME"] - stamps["qmp.STOP"]
    assert b.blackout_ns is not None and abs(b.blackout_ns - said) < 10_000_000
    assert b.phase_ns("state.load") == 0, "nothing was loaded anywhere"
    silence = [beat for beat in run.source_beats if stamps["qmp.STOP"] + 20_000_000 < beat[0] < stamps["qmp.RESUME"]]
    assert not silence and run.source_beats[-1][0] > stamps["qmp.RESUME"]
