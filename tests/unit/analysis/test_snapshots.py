# SPDX-License-Identifier: Apache-2.0
"""Snapshots and restores: real recordings, whose figures are compared with single calls in them, and scripts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from ebpf_mig.analysis import outcome
from ebpf_mig.breakdown import Breakdown, SwitchoverKind
from ebpf_mig.collector import analyse
from ebpf_mig.linux.descriptors import PLACED
from ebpf_mig.recording.events import FILE, Call, FileCall
from ebpf_mig.recording.file import read_recording
from ebpf_mig.report import text
from tests.unit.script import UNIX, Script, Vm, at

DATA = Path(__file__).parents[2] / "data" / "snapshots"
PAUSED = DATA / "qemu-11.1-paused-file.rec"
RECORDINGS = sorted(set(DATA.glob("*.rec")) - {PAUSED})
MS = 1_000_000
MEMORY, STATE, CONFIG, DISK = (PLACED | inode for inode in (71, 72, 73, 74))
API = 80


def phases_of(b: Breakdown) -> dict[str, float]:
    return {str(p.phase): round((p.duration_ns or 0) / MS, 3) for p in b.phases if p.duration_ns}


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_the_partition_of_a_real_one_is_exact(path: Path) -> None:
    b = analyse(read_recording(path)).breakdown
    spans = sorted(span for phase in b.phases for span in phase.spans)
    assert spans[0][0] == 0 and spans[-1][1] == b.window_ns
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
    assert b.window_ns and b.phase_ns("unattributed") <= 0.02 * b.window_ns
    assert (b.completeness.verdict, b.completeness.reasons) == ("complete", [])
    expected = {"handed-over": ("snapshot", "completed"), "restored": ("restore", "completed")}
    kind = next((pair for name, pair in expected.items() if path.stem.endswith(name)), ("snapshot", "saved"))
    assert (b.migration.mode, b.migration.result) == kind
    assert b.migration.transport == "file"


def test_cloud_hypervisor_hands_over_by_files() -> None:
    """The longest calls, as strace would show them: one write and one read of the memory file, 612.1 and 459.8 ms."""
    b = analyse(read_recording(DATA / "cloud-hypervisor-54-handed-over.rec")).breakdown
    found = phases_of(b)
    assert 612.1 <= found["memory.send"] <= 612.5 and 459.8 <= found["memory.load"] <= 460
    # The script slept 100 ms after the pause, 150 after the snapshot, and 50 before the resume.
    assert b.management is not None
    waits = [round(wait.duration_ns / MS) for wait in b.management]
    assert waits == [101, 151, 51]
    assert b.blackout_ns and b.window_ns and b.window_ns - b.blackout_ns < MS
    assert b.migration.source is not None and b.migration.destination is not None


def test_the_wait_for_cont_after_a_file_is_not_the_vmms() -> None:
    """The script slept 200 ms before `cont`."""
    b = analyse(read_recording(DATA / "qemu-11.1-file.rec")).breakdown
    found = phases_of(b)
    assert 200 <= found["management"] <= 203 and found["resume"] < 3


def test_qemus_paused_guest_that_goes_to_a_file_has_no_blackout() -> None:
    """The script sent `stop`, `migrate` 100 ms later, and `cont` 100 ms after its end."""
    b = analyse(read_recording(PAUSED)).breakdown
    assert (b.window_ns, b.blackout_ns) == (None, None)
    m = b.migration
    assert (m.mode, m.result, m.transport) == ("snapshot", "saved", "file")
    assert (m.paused_before, m.paused_after) == (True, False)
    assert "No downtime: the guest was paused before the migration" in text.render(b)


def api_call(vm: Vm, us: float, until: float, size: int = 100) -> None:
    """A request over HTTP, and its answer."""
    vm.receive(us, us + 2, size, API, 4)
    vm.send(until, until + 5, 70, API, 4)


def saved(script: Script, pid: int = 1000) -> Vm:
    """Paused by one call, written by the next, 100 ms later; of three files the second is the memory's."""
    vm = script.vm(pid, "source")
    vm.socket(API, family=UNIX)
    for file in (STATE, MEMORY, CONFIG):
        vm.socket(file, family=FILE)
    api_call(vm, -100, 300)
    vm.kick(-20)
    vm.interrupted(0)
    vm.ioctl("GET_CLOCK", 200)
    api_call(vm, 100_000, 160_000)
    vm.ioctls("GET_REGS GET_SREGS", 101_000, 102_000)
    vm.send(103_000, 104_000, 500, CONFIG)
    vm.send(104_000, 105_000, 20_000, STATE)
    vm.send(105_000, 150_000, 64 << 20, MEMORY)
    vm.events.append(Call(at(150_500), at(158_500), pid, pid + 1, FileCall.FSYNC, MEMORY))
    return vm


def test_each_phase_of_a_snapshot_that_is_resumed() -> None:
    script = Script()
    vm = saved(script)
    api_call(vm, 200_000, 203_000)
    vm.ioctl("SET_CLOCK", 201_000)
    vm.entered(202_000, left=0)
    found = script.result()
    assert (found.breakdown.migration.mode, found.breakdown.migration.result) == ("snapshot", "saved")
    assert found.phases == {
        "pause": 20,
        "quiesce": 305,
        "management": 99_697 + 39_997,
        "state.save": 1000 + 1000 + 998,
        "state.send": 2000,
        "memory.send": 45_000 + 500,
        "sync": 8000 + 1505,
        "resume": 1998,
    }
    assert found.breakdown.blackout_ns == 202_000_000


def restored(script: Script, pid: int = 2000, *, events: str = "SET_VCPU_EVENTS") -> Vm:
    vm = script.vm(pid, "destination")
    vm.socket(API + 1, family=UNIX)
    for file in (STATE, MEMORY):
        vm.socket(file, family=FILE)
    vm.receive(300_000, 300_002, 100, API + 1, 4)
    vm.receive(300_500, 301_000, 20_000, STATE)
    vm.ioctls("CREATE_VM ENABLE_CAP", 301_000, 302_000)
    vm.receive(302_000, 320_000, 64 << 20, MEMORY)
    vm.ioctls(f"CREATE_VCPU SET_REGS SET_SREGS {events}", 321_000, 325_000)
    vm.send(326_000, 326_005, 70, API + 1, 4)
    vm.receive(400_000, 400_002, 100, API + 1, 4)
    vm.ioctl("SET_CLOCK", 400_500)
    vm.entered(401_000)
    return vm


@pytest.mark.parametrize("both", [True, False])
def test_a_restore_alone_and_of_what_another_process_wrote(both: bool) -> None:
    script = Script()
    if both:
        saved(script)
    restored(script)
    found = script.result()
    m = found.breakdown.migration
    assert (m.mode, m.result) == ("snapshot" if both else "restore", "completed")
    loaded = {"state.load": 2000 - 2 + 6005, "memory.load": 18_000, "resume": 998}
    assert {name: found.phases[name] for name in loaded} == loaded
    waits = found.phases["management"]
    assert waits == (73_997 if not both else 73_997 + 99_697 + 139_997)
    assert found.breakdown.blackout_ns == (401_000_000 if both else None)
    assert "unattributed" not in found.phases and "handover" not in found.phases


def test_a_vm_that_boots_is_no_restore() -> None:
    script = Script()
    restored(script, events="SET_LAPIC")
    migration = script.result().breakdown.migration
    assert (migration.mode, migration.result) == ("unknown", "unknown")


@pytest.mark.parametrize(("rounds", "mode"), [(2, "unknown"), (3, "restore")])
def test_qemu_has_written_the_registers_twice_before_it_loads(rounds: int, mode: str) -> None:
    """For a new vCPU and after the reset; firmware is read between the two."""
    script = Script()
    vm = script.vm(2000, "destination")
    vm.socket(DISK, family=FILE)
    vm.ioctls("CREATE_VM CREATE_VCPU SET_REGS SET_XSAVE", 100, 500)
    vm.receive(600, 700, 256 << 10, DISK)
    vm.ioctls("SET_REGS SET_XSAVE", 800, 900)
    if rounds == 3:
        vm.receive(50_000, 60_000, 1 << 20, DISK)
        vm.ioctls("SET_IRQCHIP SET_REGS SET_XSAVE", 61_000, 62_000)
    vm.ioctl("SET_CLOCK", 63_000)
    vm.entered(64_000)
    assert script.result().breakdown.migration.mode == mode


def test_a_log_that_another_thread_writes_is_no_snapshot() -> None:
    script = Script()
    vm = script.vm(1000, "source")
    vm.socket(DISK, family=FILE)
    vm.kick(-20)
    vm.interrupted(0)
    vm.ioctl("GET_CLOCK", 50)
    vm.ioctls("GET_REGS GET_SREGS", 500, 600)
    vm.send(700, 800, 900_000, DISK, tid=9)
    vm.entered(1000, left=0)
    assert script.result().breakdown.migration.result == "unknown"


@pytest.mark.parametrize("reads", [False, True])
def test_what_a_disk_is_written_by_a_ring_is_no_snapshot(reads: bool) -> None:
    """QEMU's main loop stops its guest, and hands over tables of its disk: nobody's call, although it may be its work.

    Nor is reading it a restore.
    """
    script = Script()
    vm = script.vm(1000, "source")
    vm.socket(DISK, family=FILE)
    vm.kick(-20)
    vm.interrupted(0)
    vm.ioctls("GET_REGS GET_SREGS", 500, 600)
    (vm.receive if reads else vm.send)(700, 800, 900_000, DISK, tid=-1000)
    vm.entered(1000, left=0)
    assert not vm.events[-2].tid
    assert script.result().breakdown.migration.mode == "unknown"


def into_a_disk(*tids: int) -> Script:
    """QEMU's savevm: stops the guest, switches logging on, writes memory and state, and syncs the disk."""
    script = Script()
    vm = script.vm(1000, "source")
    vm.socket(DISK, family=FILE)
    vm.kick(-20)
    vm.interrupted(0)
    vm.ioctl("GET_CLOCK", 50)
    vm.logging(100)
    vm.gets(5000)
    for n, tid in enumerate(tids):
        vm.send(10_000 + 10_000 * n, 25_000 + 10_000 * n, 1 << 20, DISK, tid)
    vm.ioctls("GET_REGS GET_SREGS", 80_000, 81_000)
    vm.send(82_000, 83_000, 40_000, DISK, tids[0])
    vm.events.append(Call(at(84_000), at(90_000), 1000, 0, FileCall.FDATASYNC, DISK))
    vm.ioctl("SET_CLOCK", 100_000, tid=0)
    vm.entered(101_000, left=0)
    return script


def test_a_ring_and_workers_save_alike() -> None:
    """Requests of one ring overlap, as those of two workers do. Time counts once."""
    ring, workers = (into_a_disk(*tids).result() for tids in ((-1000, -1000), (8, 9)))
    for found in (ring, workers):
        m = found.breakdown.migration
        assert (m.mode, m.result, m.transport) == ("snapshot", "saved", "file")
        assert [row.bytes for row in found.breakdown.sockets] == [(2 << 20) + 40_000]
    assert ring.phases == workers.phases and ring.phases["sync"] == 16_000, "up to the answer"
    assert ring.phases["memory.send"] >= 25_000


def test_what_the_report_says_first() -> None:
    handed = text.render(analyse(read_recording(DATA / "cloud-hypervisor-54-handed-over.rec")).breakdown)
    assert "snapshot over a file (3 files)" in handed and "write the memory" in handed
    loaded = text.render(analyse(read_recording(DATA / "cloud-hypervisor-54-on-demand-restored.rec")).breakdown)
    assert loaded.startswith("Restored in 93.245 ms ")


def test_a_fetch_behind_the_memory_only_resets_the_log() -> None:
    """Firecracker's full snapshot reads the dirty log when the memory is written."""
    script = Script()
    vm = saved(script)
    vm.gets(150_100, slots=(0,), took=100)
    vm.entered(202_000, left=0)
    found = script.result()
    assert found.phases["fetch.kernel"] == 100 and "fetch.user" not in found.phases


def in_the_background(*, carrier: int = MEMORY, family: int = FILE, tid: int = 1, logs: bool = False) -> Script:
    """QEMU's background-snapshot: the thread that stops the guest reads the state, and writes when the guest runs."""
    script = Script()
    vm = script.vm(1000, "source")
    vm.socket(carrier, family=family)
    if logs:
        vm.logging(-50_000)
    vm.kick(-20)
    vm.interrupted(0)
    vm.ioctl("GET_CLOCK", 200)
    vm.ioctls("GET_REGS GET_SREGS", 1000, 2000)
    vm.ioctl("GET_IRQCHIP", 2500)
    if not logs:
        vm.send(7000, 7900, 40_000, carrier, tid)  # another thread wakes the vCPUs
    vm.ioctl("SET_CLOCK", 8000, tid=0)
    vm.entered(9000, left=0)
    vm.send(20_000, 90_000, 32 << 20, carrier, tid)
    vm.send(90_500, 91_000, 30_000, carrier, tid)
    return script


def test_a_guest_that_is_written_while_it_runs() -> None:
    found = in_the_background().result()
    m = found.breakdown.migration
    assert (m.mode, m.result, m.transport) == ("snapshot", "saved", "file")
    assert (m.paused_before, m.paused_after) == (False, False)
    assert found.breakdown.blackout_ns == 9_000_000
    assert found.phases == {"pause": 20, "quiesce": 1000, "state.save": 7000, "resume": 1000}
    assert (found.breakdown.completeness.verdict, found.breakdown.completeness.reasons) == ("complete", [])


@pytest.mark.parametrize(
    "script",
    [in_the_background(tid=0), in_the_background(tid=9), in_the_background(logs=True)],
    ids=["main-thread", "another", "pre-copy"],
)
def test_what_is_written_later_need_not_be_the_guest(script: Script) -> None:
    """A log of the main thread, a disk, what follows a migration that failed."""
    m = script.result().breakdown.migration
    assert m.result != "saved" and m.mode != "snapshot"


def test_nobody_is_known_to_have_kept_what_goes_into_a_socket() -> None:
    m = in_the_background(carrier=70, family=UNIX).result().breakdown.migration
    assert (m.mode, m.result, m.transport) == ("snapshot", "unknown", "unix")


def test_a_main_loop_that_waits_by_io_uring_does_no_work() -> None:
    """QEMU 11 writes a file, is asked for its status, and is set going much later."""
    script = Script()
    vm = script.vm(1000, "source")
    vm.socket(79, family=UNIX)
    vm.socket(MEMORY, family=FILE)
    vm.logging(-50_000)
    vm.gets(-49_000)
    vm.send(-48_000, -40_000, 8 << 20, MEMORY)
    vm.command(-30_000, 40)
    vm.kick(-20)
    vm.interrupted(0)
    vm.gets(100)
    vm.ioctls("GET_REGS GET_SREGS", 500, 600)
    vm.send(700, 1000, 50_000, MEMORY)
    for us in (20_000, 200_000, 290_000):
        vm.command(us, 40)
        vm.events.append(Call(at(us + 90), at(us + 95), 1000, 1000, FileCall.IO_URING_ENTER))
    vm.command(300_000, 20)
    vm.ioctl("SET_CLOCK", 301_000, tid=0)
    vm.entered(302_000, left=0)
    found = script.result()
    assert 298_900 <= found.phases["management"] <= 299_100 and found.phases["state.send"] == 300
    assert found.breakdown.completeness.verdict == "complete"


def test_a_guest_that_another_process_loads_is_not_loaded_again() -> None:
    """The source takes its guest back, and a copy of it runs in a second process."""
    traced = analyse(read_recording(DATA.parent / "firecracker-1.16-file.rec")).traced
    assert traced.switchover is not None and traced.restored is not None
    copied = replace(traced, switchover=replace(traced.switchover, kind=SwitchoverKind.ABORTED))
    assert not copied.loaded_again and outcome.result(copied) != "completed"
