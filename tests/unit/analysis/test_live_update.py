# SPDX-License-Identifier: Apache-2.0
"""Live updates: a new program takes over the memory of a stopped guest. The scripts follow QEMU 11.1's CPR."""

from __future__ import annotations

import itertools

import pytest
from msgspec.structs import replace

from ebpf_mig.breakdown import Mode, Result, Transport
from ebpf_mig.linux import kvm
from ebpf_mig.recording import events as ev
from tests.unit.script import UNIX, US, Script, Vm, at
from tests.unit.scripts import READS, VCPU, WRITES

MIB = 1 << 20
NEW = 300
"""Threads of the program after execve(2), counted from those before it."""


def stop(vm: Vm, late: float = 0) -> None:
    """Kicked by the monitor's thread, read by the migration's: the guest stops before logging is switched on."""
    vm.entered(-50_000, left=-50_100)
    vm.kick(0, tid=0)
    vm.interrupted(70, entered=-50_000)
    vm.ioctl("GET_PIT2", 100, tid=0)
    vm.ioctl("GET_CLOCK", 120, tid=0)
    vm.logging(700, slots=((0, 256 * MIB),))
    vm.gets(900, slots=(0, 3))
    vm.gets(1000, slots=(0, 3))
    vm.kick(1100, tid=1)
    vm.ioctls(READS, 1200 + late, 1400 + late, tid=VCPU)
    vm.ioctl("GET_CLOCK", 1500 + late)


def load(vm: Vm, since: float, vcpu: int) -> None:
    vm.ioctl("CREATE_VM", since, 200, tid=0)
    vm.ioctl("SET_USER_MEMORY_REGION", since + 500, 500, tid=0, size=256 * MIB)
    vm.ioctls(WRITES, since + 2000, since + 2200, tid=vcpu)
    vm.ioctls(WRITES, since + 5000, since + 5200, tid=vcpu)
    vm.ioctl("SET_CLOCK", since + 5400, tid=0)


def executed(*, begin: float | None = 2000, late: float = 0) -> Script:
    """cpr-exec: the state goes into a file, the process calls execve(2) and loads it."""
    script = Script()
    script.attach |= {"exec": "tracepoint"}
    vm = script.vm(1000, "unknown")
    stop(vm, late)
    vm.events.append(ev.Exec(at(4000), 1000, at(begin) if begin is not None else 0))
    load(vm, 20_000, VCPU + NEW)
    fresh = Vm(1000, "unknown", 1)
    fresh.events = []
    fresh.tid = lambda vcpu: 1000 + VCPU + NEW + vcpu  # type: ignore[method-assign]
    fresh.entered(26_000)
    fresh.last(entered=27_000, left=26_900, end=90_000)
    vm.events += [*fresh.events, ev.Thread(1000, 1000 + VCPU + NEW, "CPU 0/KVM", 0)]
    vm.last(entered=-50_000, left=70, end=90_000)
    return script


def transferred(*, descriptors: int = 6, sent: int = 100_000) -> Script:
    """cpr-transfer: descriptors through one UNIX socket, then the state through another."""
    script = Script()
    source, destination = script.pair(unix=True)
    source.socket(71, family=UNIX, peer=81)
    destination.socket(81, family=UNIX, peer=71)
    source.send(-30_000, -29_900, 200, socket=71, tid=0, calls=13)
    source.events[-1] = replace(source.events[-1], descriptors=descriptors)  # type: ignore[call-arg]
    load(destination, -25_000, VCPU)
    stop(source)
    source.send(1600, 1900, sent)
    destination.receive(1650, 1950, sent, socket=80, tid=0)
    destination.ioctls(WRITES, 2500, 2900, tid=VCPU)
    destination.ioctl("SET_CLOCK", 3000, tid=0)
    destination.entered(3500)
    return script


def test_a_process_that_replaced_itself_is_source_and_destination() -> None:
    result = executed().result()
    facts = result.breakdown.migration
    assert (facts.mode, facts.result, facts.transport) == (Mode.CPR, Result.COMPLETED, Transport.NONE)
    assert facts.source == facts.destination and facts.source is not None and facts.source.pid == 1000
    assert result.window == 26_000 and result.blackout == (70, 26_000)
    assert [(v.vcpu, v.stop, v.start) for v in result.breakdown.vcpus] == [(0, 70 * US, 26_000 * US)]
    assert facts.paused_before is False and facts.paused_after is False
    assert result.breakdown.completeness.verdict == "complete"


@pytest.mark.parametrize(
    "script", [executed(), executed(begin=None), transferred()], ids=["exec", "no begin", "transfer"]
)
def test_every_instant_has_one_phase(script: Script) -> None:
    found = script.result().breakdown
    spans = sorted(span for phase in found.phases for span in phase.spans)
    assert spans[0][0] == 0 and spans[-1][1] == found.window_ns
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
    assert (found.phase_ns("unattributed") or 0) <= 0.02 * (found.window_ns or 0)


def test_the_pause_is_the_monitors_and_not_the_kick_that_reads_registers() -> None:
    for script in (executed(), transferred()):
        assert script.result().phases["pause"] == 70


def test_a_vcpu_that_reads_its_registers_late_is_waited_for() -> None:
    """It was asked to by a kick, got the CPU late, and the migration waits: this is part of saving the state."""
    prompt, late = executed().result().phases, executed(begin=3900, late=1800).result().phases
    assert "unattributed" not in late
    assert late["state.save"] == 3900 - 1100
    assert late["fetch.user"] < prompt["fetch.user"]


@pytest.mark.parametrize("since", [0, 90, 800, 950, 1250, 1450, 1900])
def test_tracing_that_began_between_the_stop_and_execve(since: float) -> None:
    """As `watch` does: its probes are attached at some instant after the first new thread."""
    script = executed()
    vm = script.vms[0]
    vm.events = [e for e in vm.events if _instant(e) >= at(since) and not isinstance(e, ev.VcpuState)]
    vm.events = [replace(e, had_vm=1) if isinstance(e, ev.Exec) else e for e in vm.events]
    facts = script.result().breakdown.migration
    assert (facts.mode, facts.result) == (Mode.CPR, Result.COMPLETED)


def test_the_account_of_a_thread_that_is_gone_belongs_to_the_program_that_it_ran() -> None:
    """It is read at the end of tracing, as all accounts are, also that of a vCPU that was never seen to enter."""
    script = executed()
    vm = script.vms[0]
    vm.events = [e for e in vm.events if not (isinstance(e, ev.VcpuEnter | ev.VcpuExit) and e.tid == 1000 + VCPU)]
    assert script.result().breakdown.blackout_ns == (26_000 - 70) * US


def test_a_program_that_ends_before_it_runs_the_guest_has_failed() -> None:
    script = executed()
    vm = script.vms[0]
    vm.events = [e for e in vm.events if getattr(e, "tid", 0) != 1000 + VCPU + NEW]
    assert script.result().breakdown.migration.result != Result.COMPLETED
    script.ending = ev.Ending(at(100_000), "target-died")
    assert script.result().breakdown.migration.result == Result.FAILED
    vm.events = [e for e in vm.events if _instant(e) < at(4000) or isinstance(e, ev.Exec)]
    assert script.result().breakdown.migration.result == Result.FAILED
    script.ending = ev.Ending(at(100_000), "interrupted")
    script.marks = [ev.Mark(at(90_000), 1000, ev.ENDED)]
    assert script.result().breakdown.migration.result == Result.FAILED


def test_a_shell_that_starts_the_vmm_is_no_live_update() -> None:
    """Only a program that had a VM can hand one over, unless the trigger knows that it had one."""
    script = executed()
    vm = script.vms[0]
    vm.events = [e for e in vm.events if isinstance(e, ev.Exec) or _instant(e) >= at(4000)]
    assert script.result().breakdown.migration.mode == Mode.UNKNOWN
    vm.events = [replace(e, had_vm=1) if isinstance(e, ev.Exec) else e for e in vm.events]
    facts = script.result().breakdown.migration
    assert (facts.mode, facts.result, facts.source) == (Mode.CPR, Result.COMPLETED, None)


def _instant(event: ev.AnyEvent) -> int:
    return int(getattr(event, "begin_ns", 0) or getattr(event, "enter_ns", 0) or getattr(event, "at_ns", 1 << 62))


def test_passed_descriptors_tell_a_live_update_from_a_paused_guest_that_migrates() -> None:
    found = transferred().result().breakdown
    assert (found.migration.mode, found.migration.result) == (Mode.CPR, Result.COMPLETED)
    assert found.migration.paused_before is False
    assert transferred(descriptors=0).result().breakdown.migration.mode == Mode.PRECOPY
    pages = 256 * MIB // 4096
    assert transferred(sent=8 * pages).result().breakdown.migration.mode == Mode.PRECOPY


def test_descriptors_for_others_do_not_count() -> None:
    """A vhost-user back end gets descriptors, too."""
    script = transferred()
    source = script.vms[0]
    source.events = [replace(e, peer=999) if isinstance(e, ev.Socket) and e.socket == 71 else e for e in source.events]
    assert script.result().breakdown.migration.mode == Mode.PRECOPY


def test_a_source_alone_is_a_live_update_too() -> None:
    script = transferred()
    del script.vms[1]
    assert script.result().breakdown.migration.mode == Mode.CPR


def test_execve_and_start_up_are_phases_of_their_own() -> None:
    """Loading begins with the first device after the registers were written for the reset, and ends with the last."""
    script = executed()
    script.vms[0].ioctl("SET_IRQCHIP", 23_000, tid=0)
    script.vms[0].ioctl("SET_TSC_KHZ", 25_010, tid=VCPU + NEW)
    assert script.result().phases == {
        "pause": 70,
        "quiesce": 830,
        "fetch.kernel": 40,
        "fetch.user": 260,
        "state.save": 800,
        "exec": 2000,
        "startup": 19_000,
        "state.load": 2200,
        "resume": 800,
    }


def test_where_the_begin_of_execve_is_unknown_it_follows_the_last_call() -> None:
    found = executed(begin=None).result().phases
    assert (found["state.save"], found["exec"]) == (310, 2490)


def test_a_program_whose_one_thread_loads_devices_and_vcpus() -> None:
    """Devices are then told apart by the descriptor: it is that of the VM."""
    script = executed()
    vm = script.vms[0]
    vm.events = [
        replace(e, tid=1000, fd=12 if "SET" in kvm.name_of(e.cmd) else e.fd)
        if isinstance(e, ev.Ioctl) and e.tid == 1000 + VCPU + NEW
        else e
        for e in vm.events
    ]
    vm.ioctl("SET_IRQCHIP", 24_000, 100, tid=0)
    found = script.result().phases
    assert (found["startup"], found["state.load"], found["resume"]) == (20_000, 1200, 800)


def test_what_was_passed_and_what_kvm_did_in_the_start_up() -> None:
    """CREATE_VM takes 200 us, SET_USER_MEMORY_REGION 500 us."""
    found = executed().result().breakdown.live_update
    assert found is not None and found.descriptors is None
    assert (found.setup_ns, found.slowest, found.slowest_ns) == (700 * US, "SET_USER_MEMORY_REGION", 500 * US)
    found = transferred(descriptors=7530).result().breakdown.live_update
    assert found is not None and (found.descriptors, found.setup_ns) == (7530, None)
    assert transferred(descriptors=0).result().breakdown.live_update is None


def test_a_state_that_goes_through_a_file_has_its_own_phase() -> None:
    """cpr-exec with `file:`; the new program reads what the old one wrote."""
    script = executed()
    vm = script.vms[0]
    vm.socket(90, family=ev.FILE)
    vm.send(1600, 1700, 32_768, socket=90)
    vm.send(1710, 1800, 60_000, socket=90)
    vm.receive(22_300, 22_400, 92_768, socket=90, tid=0)
    result = script.result()
    facts = result.breakdown.migration
    assert (facts.mode, facts.result, facts.transport) == (Mode.CPR, Result.COMPLETED, Transport.FILE)
    assert result.phases["state.send"] == 200 and result.phases["exec"] == 2000
    assert result.blackout == (70, 26_000)
