# SPDX-License-Identifier: Apache-2.0
"""Dirty-log fetches: bursts, passes, modes, and when logging was switched on."""

from __future__ import annotations

import msgspec

from ebpf_mig.analysis import dirty_log, fetch_split
from ebpf_mig.analysis.dirty_log import Burst
from ebpf_mig.analysis.material import split
from ebpf_mig.analysis.passes import DirtyLogRows
from ebpf_mig.analysis.process import Process
from ebpf_mig.breakdown import Slot, Split
from tests.unit.script import US, Script, Vm, at

MIB = 1 << 20


def source_of(vm: Vm, script: Script) -> Process:
    return split(script.recording).processes[vm.pid]


def one() -> tuple[Script, Vm]:
    script = Script()
    return script, script.vm(1000, "source")


def shape(found: list[Burst]) -> list[tuple[int, int]]:
    """Begin in us and number of ioctls of each fetch."""
    return [((burst.begin - at(0)) // US, len(burst.ioctls)) for burst in found]


def test_a_fetch_ends_after_a_millisecond_of_rest() -> None:
    script, vm = one()
    vm.gets(0)
    vm.gets(1020)  # 990 us after the end of the previous fetch, but the slots repeat
    vm.gets(2060, slots=[5])  # 1000 us later: another burst
    assert shape(dirty_log.bursts(source_of(vm, script), 0, None, [])) == [(0, 2), (1020, 2), (2060, 1)]


def test_a_fetch_ends_where_the_vcpus_stop() -> None:
    script, vm = one()
    vm.gets(0, slots=[0, 3, 4], step=20)
    assert shape(dirty_log.bursts(source_of(vm, script), 0, at(30), [])) == [(0, 2), (40, 1)]


def test_a_send_ends_a_fetch() -> None:
    script, vm = one()
    vm.gets(0, slots=[0])
    vm.send(12, 15, 4096)
    vm.gets(20, slots=[3])
    process = source_of(vm, script)
    assert shape(dirty_log.bursts(process, 0, None, process.transfers)) == [(0, 1), (20, 1)]


def test_clears_belong_to_the_fetch_before_them() -> None:
    script, vm = one()
    vm.gets(0)
    vm.send(100, 40_000, 4096)
    vm.ioctl("CLEAR_DIRTY_LOG", 50_000, 30)
    vm.gets(90_000)
    process = source_of(vm, script)
    found = dirty_log.bursts(process, 0, None, process.transfers)
    assert shape(found) == [(0, 3), (90_000, 2)]
    assert found[0].kernel_ns == 50 * US
    assert found[0].end == at(30)


def test_a_clear_after_the_stop_begins_a_fetch_of_its_own() -> None:
    script, vm = one()
    vm.gets(0)
    vm.ioctl("CLEAR_DIRTY_LOG", 500)
    found = dirty_log.bursts(source_of(vm, script), 0, at(400), [])
    assert shape(found) == [(0, 2), (500, 1)]
    assert [burst.fetched for burst in found] == [True, False]


def test_a_fetch_after_stray_clears_is_a_fetch() -> None:
    script, vm = one()
    vm.ioctl("CLEAR_DIRTY_LOG", 0)
    vm.gets(100)
    found = dirty_log.bursts(source_of(vm, script), 0, None, [])
    assert [(burst.fetched, len(burst.ioctls)) for burst in found] == [(False, 1), (True, 2)]


def test_one_thread_fetches_all_slots_another_only_the_displays() -> None:
    script, vm = one()
    vm.gets(0, slots=[0, 7])
    vm.gets(5000, slots=[7], tid=2)
    process = source_of(vm, script)
    assert process.fetchers == {1001}
    assert shape(dirty_log.bursts(process, 0, None, [])) == [(0, 2)]


def test_a_guest_of_one_slot_is_fetched_by_the_thread_of_the_largest() -> None:
    script, vm = one()
    vm.logging(-100, [(0, 256 * MIB)])
    vm.logging(-9_000_000, [(7, 16 * MIB)])
    vm.gets(0, slots=[0])
    vm.gets(5000, slots=[7], tid=2)
    assert source_of(vm, script).fetchers == {1001}


def test_a_lone_fetcher_of_one_unknown_slot_counts() -> None:
    script, vm = one()
    vm.gets(0, slots=[4])
    assert source_of(vm, script).fetchers == {1001}


def test_switched_on_when_the_largest_slot_was() -> None:
    script, vm = one()
    vm.logging(-9_000_000, [(7, 16 * MIB)])
    vm.logging(0)
    assert dirty_log.switched_on(source_of(vm, script), None) == at(0)


def test_a_slot_set_again_while_logging_is_no_new_begin() -> None:
    script, vm = one()
    vm.logging(0)
    vm.ioctl("SET_USER_MEMORY_REGION", 500_000, slot=0, size=0)
    vm.ioctl("SET_USER_MEMORY_REGION", 500_020, slot=0, flags=1, size=256 * MIB)
    assert dirty_log.switched_on(source_of(vm, script), None) == at(0)


def test_the_last_of_two_migrations_counts() -> None:
    script, vm = one()
    vm.logging(0)
    vm.logging(1_000_000, on=False)
    vm.logging(2_000_000)
    vm.logging(9_000_000, [(0, 256 * MIB)], on=False)
    vm.logging(9_500_000)
    process = source_of(vm, script)
    assert dirty_log.switched_on(process, None) == at(9_500_000)
    assert dirty_log.switched_on(process, at(9_400_000)) == at(2_000_000)


def test_never_switched_on() -> None:
    script, vm = one()
    vm.logging(0, on=False)
    assert dirty_log.switched_on(source_of(vm, script), None) is None


def test_modes() -> None:
    def mode(names: str, stop: int | None = None, logging: bool = False) -> str:
        script, vm = one()
        for index, name in enumerate(names.split()):
            vm.ioctl(name, index * 5000)
        process = source_of(vm, script)
        end = None if stop is None else at(stop)
        return dirty_log.mode(dirty_log.bursts(process, 0, end, []), logging, end)

    assert mode("GET_DIRTY_LOG CLEAR_DIRTY_LOG") == "manual"
    assert mode("GET_DIRTY_LOG GET_DIRTY_LOG") == "legacy"
    assert mode("RESET_DIRTY_RINGS") == "ring"
    assert mode("RESET_DIRTY_RINGS GET_DIRTY_LOG", stop=3000) == "ring"  # the backup bitmap of arm64
    assert mode("GET_DIRTY_LOG RESET_DIRTY_RINGS", stop=9000) == "legacy"
    assert mode("") == "none"
    assert mode("", logging=True) == "none"  # failed before the first fetch: the mode is not known
    assert mode("", logging=True, stop=9000) == "ring"


def test_slots_that_were_fetched() -> None:
    script, vm = one()
    vm.logging(-100, [(0, 256 * MIB), (3, 16 * MIB), (9, 4096)])
    vm.gets(0, slots=[3, 0, 5])
    process = source_of(vm, script)
    found = dirty_log.slots(process, dirty_log.bursts(process, 0, None, []))
    assert found == [Slot(slot=0, base=0, size_bytes=256 * MIB), Slot(slot=3, base=0, size_bytes=16 * MIB)]


def test_passes_split_kernel_user_and_sending() -> None:
    script, vm = one()
    vm.gets(0)
    vm.ioctl("CLEAR_DIRTY_LOG", 50)
    vm.send(200, 900, 40_000, in_call_us=300, off_cpu_us=120)
    vm.send(1000, 1500, 60_000, in_call_us=100, off_cpu_us=0)
    vm.gets(5000)
    vm.send(5100, 5200, 7_000)
    vm.gets(9000)
    process = source_of(vm, script)
    bursts = dirty_log.bursts(process, 0, at(8000), process.transfers)
    found = DirtyLogRows(process, bursts, at(8000), process.transfers, at(0)).passes()
    rows = [(p.begin // US, p.kernel_ns // US, p.user_ns // US, p.bytes, p.send_ns // US) for p in found]
    assert rows == [(0, 30, 170, 100_000, 400), (5000, 20, 80, 7_000, 100)]
    assert [p.blocked_ns for p in found] == [120 * US, None]


def test_an_ioctl_measured_inside_is_split_to_the_nanosecond() -> None:
    script, vm = one()
    vm.gets(0, slots=[0], took=100)
    plain = source_of(vm, script).ioctls[0]
    assert fetch_split.split([plain], {}) is None
    measured = msgspec.structs.replace(
        plain, off_cpu_ns=10_000, spin_ns=5_000, walk_ns=40_001, flush_ns=20_000, copy_ns=7_000
    )
    assert fetch_split.split([measured], {}) == Split(
        walk=40_001, flush=20_000, copy=7_000, other=17_999, samples="exact"
    )
    assert fetch_split.on_cpu(measured) == 85_000
