# SPDX-License-Identifier: Apache-2.0
"""Migrations that end badly, and recordings that hold only a part."""

from __future__ import annotations

import errno

from ebpf_mig import breakdown as b
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.events import RECEIVE, RECURSION_MISSES, SEND, Ending
from ebpf_mig.report.text import render
from tests.unit import scripts
from tests.unit.analysis.test_snapshots import into_a_disk
from tests.unit.script import US, Script, Vm, at


def precopy(script: Script) -> tuple[Vm, Vm]:
    """A pair in the middle of pre-copy; the guest runs."""
    source, destination = script.pair()
    source.logging(-100_000)
    source.gets(-99_900)
    source.send(-98_000, -2_000, 10_000_000, calls=80)
    return source, destination


def ending(script: Script, reason: str, **more: dict[str, int]) -> None:
    script.ending = Ending(at(1_000_000), reason, **more)


def test_cancelled_while_the_guest_runs_has_no_window() -> None:
    script = Script()
    source, _ = precopy(script)
    source.last(entered=-500_000, left=-500_010, end=900_000)
    script.mark(10_000, 1000, "qmp.MIGRATION.cancelling")
    script.mark(11_000, 1000, "qmp.MIGRATION.cancelled")
    ending(script, "cancelled")
    found = script.result().breakdown
    assert found.migration.result == "cancelled"
    assert (found.window_ns, found.blackout_ns, found.blackout) == (None, None, None)
    assert [(p.phase, p.duration_ns, p.spans) for p in found.phases] == [
        (name, None, []) for name, _ in b.sides_of(False)
    ]
    assert [(p.begin / US, p.bytes) for p in found.dirty_log.passes] == [(100, 10_000_000)]
    assert found.dirty_log.final is None and found.dirty_log.fetches == []
    assert found.sockets == [] and found.vcpus == [] and found.witnesses == []
    assert found.completeness.verdict == "complete"


def test_failed_before_anything_was_seen() -> None:
    script = Script()
    source, _ = script.pair()
    source.last(entered=-500_000, left=-500_010, end=900_000)
    ending(script, "failed")
    found = script.result().breakdown
    assert (found.migration.result, found.window_ns) == ("failed", None)
    assert found.dirty_log.mode == "none"


def failing(script: Script) -> Vm:
    """Something fails after the stop, and the source resumes its guest."""
    source, _ = precopy(script)
    # Throttling, before: a longer gap, with kick, fetch and sends in it.
    source.kick(-80_000)
    source.interrupted(-79_990)
    source.gets(-60_000)
    source.send(-59_000, -40_000, 5_000_000, calls=40)
    source.entered(-30_000, left=-79_990, ret=-4)
    source.kick(0)
    source.interrupted(100)
    source.ioctl("GET_CLOCK", 150)
    source.ioctls(scripts.READS, 400, 490, tid=100)
    source.gets(600)
    source.send(700, 2700, 500_000)
    source.ioctl("SET_CLOCK", 3500)
    source.entered(4000, left=100, ret=-4)
    source.last(entered=5000, left=4990, end=900_000)
    ending(script, "failed")
    return source


def test_failed_after_the_stop_reports_the_aborted_blackout() -> None:
    script = Script()
    failing(script)
    result = script.result()
    assert result.breakdown.migration.result == "failed"
    assert result.blackout == (100, 4000)
    assert result.window == 4000
    assert result.phases == {
        "pause": 100,
        "quiesce": 300,
        "fetch.kernel": 20,
        "fetch.user": 80,
        "memory.send": 2000,
        "state.save": 200,
        "resume": 500,
        "unattributed": 800,
    }
    assert result.breakdown.vcpus == [
        b.Vcpu(vcpu=0, kick_ns=100 * US, stop=100 * US, start=4000 * US, blackout_ns=3900 * US)
    ]


def test_an_aborted_blackout_is_found_if_the_recording_ends_between_two_kvm_runs() -> None:
    script = Script()
    source = failing(script)
    source.last(entered=5000, left=900_000, end=900_001)
    result = script.result()
    assert result.breakdown.migration.result == "failed"
    assert (result.blackout, result.window) == ((100, 4000), 4000)


def test_cancelled_after_the_stop() -> None:
    script = Script()
    failing(script)
    script.mark(3000, 1000, "qmp.MIGRATION.cancelled")
    assert script.result().breakdown.migration.result == "cancelled"


def test_cancelled_right_after_the_stop_knows_quiesce_and_resume_only() -> None:
    script = Script()
    source, _ = precopy(script)
    source.kick(0)
    source.interrupted(100)
    source.ioctl("GET_CLOCK", 150)
    source.ioctl("SET_CLOCK", 900)
    source.entered(1000, left=100, ret=-4)
    ending(script, "cancelled")
    result = script.result()
    assert result.phases == {"pause": 100, "quiesce": 60, "resume": 100, "unattributed": 740}


def test_a_cloud_hypervisor_that_cannot_save_its_state() -> None:
    """Pause, fetch and send, then the first register read fails; the vCPU is woken."""
    script = Script()
    source, _ = script.pair()
    source.logging(-100_000, [(0, 256 << 20)])
    source.gets(-500, [0])
    source.kick(0)
    source.interrupted(40)
    source.entered(55, left=40, ret=-4, runs=2)
    source.interrupted(60, entered=55)
    source.ioctl("KVMCLOCK_CTRL", 1100)
    source.gets(1400, [0])
    source.send(1500, 1900, 40_960)
    source.receive(1910, 2000, 16)
    source.ioctls("GET_CPUID2 GET_MP_STATE GET_REGS", 2100, 2130)
    source.ioctl("SET_CLOCK", 2500)
    source.entered(3000, left=60, ret=-4, runs=3)
    ending(script, "failed")
    result = script.result()
    assert result.blackout == (40, 3000)
    assert result.phases == {
        "pause": 40,
        "quiesce": 1360,
        "fetch.kernel": 10,
        "fetch.user": 90,
        "memory.send": 600,
        "state.save": 30,
        "unattributed": 370,
        "resume": 500,
    }


def test_a_source_that_dies_while_its_guest_runs() -> None:
    script = Script()
    source, _ = precopy(script)
    source.interrupted(5000)
    ending(script, "target-died")
    found = script.result().breakdown
    assert (found.migration.result, found.window_ns, found.blackout_ns) == ("failed", None, None)
    assert len(found.dirty_log.passes) == 1


def test_a_source_that_dies_with_a_guest_that_shut_down() -> None:
    script = Script()
    source, _ = precopy(script)
    source.kick(0)
    source.interrupted(100)
    source.send(150, 900, 500_000)
    ending(script, "target-died")
    assert script.result().breakdown.migration.result == "failed", "nobody has the state of its vCPUs"


def test_a_vm_that_ends_without_a_migration_has_not_failed_to_migrate() -> None:
    """QEMU stops its vCPUs at SIGTERM. With a signal that is missing, or dirty logs, it may have been a migration."""
    for absent, logged, result in ((None, False, "unknown"), ("socket", False, "failed"), (None, True, "failed")):
        script = Script()
        vm = script.vm(1000, "source")
        vm.entered(-9000)
        vm.kick(0)
        vm.interrupted(100)
        vm.ioctl("GET_CLOCK", 150)
        if logged:
            vm.logging(-8000)
        if absent:
            script.attach[absent] = "absent: not allowed"
        ending(script, "target-died")
        found = script.result().breakdown
        assert found.migration.result == result, (absent, logged)
        assert (found.window_ns is None) is (result == "unknown")
        assert any("nothing of a migration" in note for note in found.notes) is (result == "unknown")
        assert ("no migration was seen" in render(found)) is (result == "unknown")


def test_a_source_that_dies_after_the_stop() -> None:
    script = Script()
    source, _ = precopy(script)
    source.kick(0)
    source.interrupted(100)
    source.ioctl("GET_CLOCK", 150)
    source.gets(250)
    source.send(400, 1400, 500_000)
    ending(script, "target-died")
    result = script.result()
    assert (result.breakdown.migration.result, result.blackout) == ("unknown", None), "it may have handed over"
    assert result.window == 1400
    assert result.phases == {
        "pause": 100,
        "quiesce": 150,
        "fetch.kernel": 20,
        "fetch.user": 130,
        "memory.send": 1000,
    }
    assert result.breakdown.vcpus == [b.Vcpu(vcpu=0, kick_ns=100 * US, stop=100 * US, start=None, blackout_ns=None)]


def test_a_destination_that_dies_while_loading() -> None:
    script = scripts.qemu_11_1()
    destination = script.vms[1]
    destination.events = [
        e for e in destination.events if not hasattr(e, "runs") and getattr(e, "begin_ns", 0) < at(5850)
    ]
    ending(script, "failed")
    result = script.result()
    assert result.breakdown.migration.result == "failed"
    assert result.blackout is None
    assert result.phases["handover"] == 50
    assert result.phases["state.load"] == 100
    assert result.window == 5850


def alone(script: Script, keep: int) -> None:
    """Only one of the two processes was traced."""
    script.vms = [vm for vm in script.vms if vm.pid == keep]


def test_without_the_destination_the_window_ends_where_knowledge_ends() -> None:
    script = scripts.qemu_10_0()
    script.vms[0].receive(-90_000, 46_700, 8, tid=9)  # the answer on the return path
    alone(script, 1000)
    result = script.result()
    assert result.blackout is None
    assert result.window == 46_700
    assert result.phases["state.send"] == 100
    assert result.phases["handover"] == 46_700 - 5300
    assert "state.load" not in result.phases and "resume" not in result.phases
    found = result.breakdown
    assert found.migration.result == "completed"
    assert found.migration.destination is None
    assert found.completeness.verdict == "bounded"
    assert found.completeness.reasons == ["the destination was not traced: the blackout's end is unknown"]


def test_without_the_destination_and_its_answers() -> None:
    script = scripts.qemu_10_0()
    alone(script, 1000)
    result = script.result()
    assert result.window == 5300
    assert "handover" not in result.phases


def test_a_cloud_hypervisor_source_alone() -> None:
    script = scripts.cloud_hypervisor_53()
    alone(script, 1000)
    result = script.result()
    assert result.window == 52_900
    assert result.spans("state.send") == [(5500, 5520), (52_010, 52_015)]
    assert result.spans("handover") == [(5520, 52_010), (52_015, 52_900)]
    assert result.phases["memory.send"] == 2500


def test_without_the_source_the_loading_is_known() -> None:
    script = scripts.qemu_7_2()
    alone(script, 2000)
    result = script.result()
    assert result.blackout is None
    assert result.window == 45_780 - 41_800
    assert result.phases == {"state.load": 44_600 - 41_800, "resume": 1180}
    found = result.breakdown
    assert found.migration.source is None
    assert found.migration.destination == b.Endpoint(host="alpha", pid=2000)
    assert found.vcpus == [b.Vcpu(vcpu=0, kick_ns=None, stop=None, start=3980 * US, blackout_ns=None)]
    assert found.completeness.verdict == "bounded"
    assert found.dirty_log.mode == "unknown" and found.dirty_log.final is None
    unmeasured = [p.phase for p in found.phases if p.duration_ns is None]
    source = [name for name, side in b.sides_of(False) if side == "source"]
    assert unmeasured == [*source, "handover"], "the other phases are known, including those that took no time"
    shown = render(found)
    assert "the source was not traced" in shown and "no dirty logging" not in shown


def broke(script: Script, *errors: tuple[int, int], socket: int = 70) -> str:
    """The result of a try after which the source goes on alone. `errors`: direction and what the call returned."""
    source, _ = precopy(script)
    script.vms.pop()
    source.last(entered=-500_000, left=-500_010, end=900_000)
    for number, (direction, ret) in enumerate(errors):
        source.events.append(ev.SocketError(at(1000 + number), source.pid, source.pid + 1, socket, direction, ret))
    source.logging(2000, on=False)
    ending(script, "logging-ended")
    return script.result().breakdown.migration.result


def test_a_broken_connection_is_a_failure_unless_the_source_shut_it_down() -> None:
    shut, closed, pipe, reset = (SEND, 0), (RECEIVE, 0), (SEND, -errno.EPIPE), (RECEIVE, -errno.ECONNRESET)
    assert broke(Script()) == "unknown"
    for error in (closed, pipe, reset):
        assert broke(Script(), error) == "failed"
        assert broke(Script(), error, shut) == "failed"
        assert broke(Script(), shut, error) == "unknown"
        assert broke(Script(), error, socket=71) == "unknown", "a monitor's"
    assert broke(Script(), (SEND, -errno.EFAULT)) == "unknown"


def test_where_a_shutdown_is_not_seen_only_a_reset_tells() -> None:
    for error, result in (((SEND, -errno.EPIPE), "unknown"), ((SEND, -errno.ECONNRESET), "failed")):
        for shutdown in ({}, {"shutdown": "absent: not hooked"}):
            script = Script()
            script.attach = {**script.attach, "socket": "fentry", **shutdown}
            assert broke(script, error) == result
    script = Script()
    script.attach = {**script.attach, "socket": "fentry", "shutdown": "fentry"}
    assert broke(script, (SEND, -errno.EPIPE)) == "failed"


def paused(script: Script, *, sends: bool = True, thread: int = 3) -> tuple[Vm, Vm]:
    """The user pauses the guest with another thread, or a snapshot with its own, and half a second later it begins."""
    source, destination = script.pair()
    source.kick(-500_000, tid=thread)
    source.interrupted(-499_900)
    source.logging(0)
    source.gets(100)
    if sends:
        source.send(200, 30_000, 10_000_000)
    source.gets(40_000)
    source.ioctls("GET_REGS GET_MSRS", 40_100, 40_200)
    if sends:
        source.send(40_300, 40_400, 50_000)
    return source, destination


def test_a_paused_guest_has_no_blackout() -> None:
    """Nobody takes it over yet, it is set going there, or the source takes it back."""
    for after in ("nothing", "there", "back"):
        script = Script()
        source, destination = paused(script)
        destination.ioctls("SET_REGS SET_MSRS", 41_000, 41_100)
        source.receive(45_000, 45_100, 8, calls=1)
        if after == "there":
            destination.entered(900_000)
        elif after == "back":  # QEMU's first KVM_RUN then returns at once, for the kick of the pause
            source.ioctl("SET_CLOCK", 899_000)
            source.entered(899_990, left=-499_900, ret=-4)
            source.interrupted(899_996, entered=899_990)
            source.entered(900_000, left=899_996, ret=-4)
        ending(script, "command-ended")
        found = script.result().breakdown
        assert (found.window_ns, found.blackout_ns, found.throttled) == (None, None, None)
        assert found.migration.result == ("unknown" if after == "back" else "completed")
        assert found.migration.paused_before is True and found.migration.paused_after is (after == "nothing")
        assert "No downtime: the guest was paused before the migration" in render(found)
        assert len(found.dirty_log.passes) == 2


def stopped_early(script: Script, thread: int, *, seen: bool = True, answer: bool = True) -> tuple[Vm, Vm]:
    """A guest stops while its memory is copied, which goes on for a second. `thread` asks for the stop."""
    source, destination = script.pair(vcpus=1 if seen else 0)
    if seen:
        source.logging(0)
    source.gets(100)
    source.send(200, 400, 10_000_000)
    if seen:
        source.kick(500, tid=thread)
        source.interrupted(600)
        source.ioctl("GET_CLOCK", 650)
    source.send(700, 1_000_000, 10_000_000)
    source.gets(1_000_100)
    source.kick(1_000_200, tid=1)
    source.gets(1_000_300)
    source.ioctls("GET_REGS GET_MSRS", 1_000_400, 1_000_500)
    source.send(1_000_600, 1_000_700, 50_000)
    destination.ioctls("SET_REGS SET_MSRS", 1_000_800, 1_000_900)
    if answer:
        source.receive(1_001_000, 1_001_100, 8, calls=1)
    return source, destination


def test_a_destination_that_loaded_a_stopped_guest_has_it() -> None:
    """Without an answer, and if both VMMs ended before the closed connection was noticed. Not if it loaded nothing, or
    was seen to end before the source.
    """
    for apart, loaded, result in (
        (None, True, "completed"), (None, False, "unknown"), (0, True, "completed"), (0, False, "unknown"),
        (50_000, True, "failed"),
    ):  # fmt: skip
        script = Script()
        source, destination = stopped_early(script, thread=3, answer=False)
        if not loaded:
            destination.events = [event for event in destination.events if not isinstance(event, ev.Ioctl)]
        if apart is not None:
            for vm, after in ((destination, 0), (source, apart)):
                vm.events.append(ev.Mark(at(2_000_000 + after), vm.pid, ev.ENDED))
        ending(script, "target-died")
        assert script.result().breakdown.migration.result == result, (apart, loaded)


def test_a_guest_that_stops_by_itself_has_no_blackout() -> None:
    """It shut down, or somebody paused it. Tracing may have begun after that."""
    for seen in (True, False):
        script = Script()
        stopped_early(script, thread=3, seen=seen)
        ending(script, "target-died")
        found = script.result().breakdown
        assert (found.window_ns, found.blackout_ns, found.migration.result) == (None, None, "completed")
        assert found.migration.stopped_early is True and found.migration.paused_after is True
        assert "No downtime: the guest stopped before the switchover" in render(found)


def test_the_migrations_own_stop_is_none_of_the_guest() -> None:
    """Another thread's stop that the destination's start ends is one, too: a manager suspends a guest to get done."""
    for thread, starts in ((1, False), (3, True)):
        script = Script()
        _, destination = stopped_early(script, thread=thread)
        if starts:
            destination.entered(1_002_000)
        found = script.result().breakdown
        assert found.migration.stopped_early is False and found.window_ns is not None
        assert (found.blackout_ns is not None) is starts


def test_a_snapshot_stops_the_guest_by_itself() -> None:
    """The thread that stops the guest then logs. That of a user who pauses the guest and saves it later does not."""
    for thread, blackout in ((1, 550_000), (3, None)):
        script = Script()
        source, _ = paused(script, sends=False, thread=thread)
        source.ioctl("GET_CLOCK", -499_000)
        source.entered(50_100, left=-499_900, ret=-4)
        ending(script, "logging-ended")
        found = script.result().breakdown
        assert found.blackout_ns == (None if blackout is None else blackout * US)
        assert found.migration.paused_before is (blackout is None)


def test_a_guest_that_boots_has_not_migrated() -> None:
    """It has the work of a destination that runs at once, and its disk was read before."""
    for came, result in ((-500, "completed"), (300, "unknown")):
        script = Script()
        vm = script.vm(2000, "unknown")
        vm.receive(came, came + 10, 1 << 20)
        vm.ioctls("SET_REGS SET_SREGS", 100, 200)
        vm.ioctl("SET_CLOCK", 250)
        vm.ioctls("SET_REGS", 400, 450)
        vm.entered(500)
        ending(script, "target-died")
        found = script.result().breakdown
        assert found.migration.result == result
        assert ("booted" in render(found)) == (result == "unknown")


def test_an_empty_recording() -> None:
    found = Script().result().breakdown
    assert found.window_ns is None
    assert found.migration.source is None and found.migration.destination is None
    assert found.migration.mode == "unknown"
    assert found.completeness.verdict == "bounded"
    assert [p.duration_ns for p in found.phases] == [None] * len(b.sides_of(False))
    assert found.dirty_log.mode == "unknown" and found.migration.connections is None


def test_losses_make_the_result_incomplete() -> None:
    script = scripts.qemu_7_2()
    ending(
        script, "migrated", lost={"transfer": 3, "ioctl": 0}, unpaired={"vcpu-exit": 1}, observer_ns={"a": 5, "b": 7}
    )
    found = script.result().breakdown.completeness
    assert found.verdict == "incomplete"
    assert found.lost == {"transfer": 3}
    assert found.unpaired == {"vcpu-exit": 1}
    assert found.observer_ns == 12
    assert found.reasons == ["3 events of transfer were lost in the kernel"]


def test_programs_that_the_kernel_did_not_run_make_the_result_incomplete() -> None:
    script = scripts.qemu_7_2()
    ending(script, "migrated", lost={RECURSION_MISSES: 2})
    found = script.result().breakdown.completeness
    assert (found.verdict, found.lost) == ("incomplete", {"recursion-misses": 2})
    assert found.reasons == [
        "the kernel skipped 2 runs of our BPF programs (recursion_misses): some calls may have no event"
    ]


def test_the_programs_that_the_kernel_did_not_run_are_named() -> None:
    script = scripts.qemu_7_2()
    ending(script, "migrated", lost={RECURSION_MISSES: 5}, missed_runs={"on_sys_exit": 3, "on_sys_enter": 2})
    (reason,) = script.result().breakdown.completeness.reasons
    assert "(recursion_misses; on_sys_enter: 2; on_sys_exit: 3)" in reason


def test_what_a_disk_lacks_is_no_hole_in_a_migration_but_in_a_snapshot() -> None:
    script, saved = scripts.qemu_7_2(), into_a_disk(8, 9)
    for one in (script, saved):
        ending(one, "migrated", lost={RECURSION_MISSES: 5}, missed_runs={"on_io_uring_complete": 3, "on_sys_enter": 2})
    (reason,) = script.result().breakdown.completeness.reasons
    assert reason.startswith("the kernel skipped 2 runs") and "(recursion_misses; on_sys_enter: 2)" in reason
    (reason,) = saved.result().breakdown.completeness.reasons
    assert reason.startswith("the kernel skipped 5 runs") and "on_io_uring_complete: 3" in reason
    script, lost = scripts.qemu_7_2(), {RECURSION_MISSES: 3}
    ending(script, "migrated", lost=lost, missed_runs={"on_io_uring_complete": 3})
    found = script.result().breakdown.completeness
    assert (found.verdict, found.reasons, found.lost) == ("complete", [], lost)


def test_calls_without_a_return_make_the_result_incomplete_and_name_the_remedy() -> None:
    script = scripts.qemu_7_2()
    ending(script, "migrated", lost={"missed-return": 2})
    found = script.result().breakdown.completeness
    assert (found.verdict, found.lost) == ("incomplete", {"missed-return": 2})
    (reason,) = found.reasons
    assert reason.startswith("the return of 2 calls was not seen, so they have no event: the kernel has few return")
    assert reason.endswith("leave --tier out, or use --tier tracepoint")


def test_a_recording_that_was_cut_off() -> None:
    script = scripts.qemu_7_2()
    script.ending = None
    found = script.result(truncated=True).breakdown
    assert found.completeness.verdict == "incomplete"
    assert len(found.completeness.reasons) == 1 and "cut off" in found.completeness.reasons[0]
    assert found.completeness.observer_ns is None
    assert found.phases == scripts.qemu_7_2().result().breakdown.phases


def test_a_signal_that_was_not_traced() -> None:
    script = scripts.qemu_7_2()
    script.attach |= {"kick": "absent: no such tracepoint", "lock": "absent: no such tracepoint", "off-cpu": "absent"}
    found = script.result().breakdown
    assert found.completeness.verdict == "bounded"
    assert found.completeness.reasons == ["kick was not traced: no such tracepoint"]
    assert found.waits is None


def test_witnesses_stand_beside_the_blackout() -> None:
    script = scripts.qemu_7_2()
    script.mark(6350, 1000, "qmp.STOP", doubt_us=3)
    script.mark(45_000, 2000, "qmp.RESUME", doubt_us=2)
    script.mark(60_000, 1000, "qmp.downtime_ms", value=44)
    found = script.result().breakdown.witnesses
    assert [(w.name, w.value_ns / US, w.difference_ns / US) for w in found] == [
        ("qmp.STOP..RESUME", 38_650, 38_650 - 42_839),
        ("qmp.downtime_ms", 44_000, 44_000 - 42_839),
    ]
    assert found[0].explanation == "3.409 ms after the stop, 0.780 ms before the start"
    assert "before the kick" in found[1].explanation


def test_the_triggers_mark_begins_a_migration_without_dirty_logging() -> None:
    script = scripts.cloud_hypervisor_local()
    script.mark(-6000, 1000, "session.trigger")
    assert script.result().breakdown.migration.total_ns == 9800 * US
