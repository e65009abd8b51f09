# SPDX-License-Identifier: Apache-2.0
"""Rows of the dirty log: ring pages, re-arming, logging, time off the CPU, brownout; figures worked out by hand."""

from __future__ import annotations

import msgspec
import pytest

from ebpf_mig.analysis import dirty_log
from ebpf_mig.analysis.material import split
from ebpf_mig.analysis.passes import DirtyLogRows
from ebpf_mig.breakdown import Logging, VcpuShare
from ebpf_mig.linux import kvm
from ebpf_mig.recording import events as ev
from tests.unit import scripts
from tests.unit.script import US, Script, Vm, at

MIB = 1 << 20
COPY, WALK = ("_copy_to_user",), ("rmap_write_protect",)


def one() -> tuple[Script, Vm]:
    script = Script()
    return script, script.vm(1000, "source")


def rows_of(vm: Vm, script: Script, stop: int | None = None, **more: bool) -> DirtyLogRows:
    process = split(script.recording).processes[vm.pid]
    sends = [t for t in process.transfers if t.direction == 0]
    return DirtyLogRows(process, dirty_log.bursts(process, 0, stop, sends), stop, sends, at(0), **more)


def reset(vm: Vm, us: float, pages: int, tid: int = 1) -> None:
    vm.ioctl("RESET_DIRTY_RINGS", us, tid=tid)
    event = vm.events[-1]
    assert isinstance(event, ev.Ioctl)
    vm.events[-1] = msgspec.structs.replace(event, ret=pages)


def test_pages_of_a_pass_are_the_ring_entries_reset_since_the_previous_fetch() -> None:
    script, vm = one()
    vm.entered(-50_000)
    vm.interrupted(25_000, entered=-50_000)
    reset(vm, 0, 0)
    vm.send(100, 900, 8192)
    reset(vm, 4_000, 30, tid=100)  # the vCPU's own thread: its ring was full
    reset(vm, 10_000, 70)
    vm.send(10_100, 10_900, 409_700)
    rows = rows_of(vm, script).passes()
    assert [(p.pages, p.pages_at_most, p.dirty_pages_per_s) for p in rows] == [(0, 2, None), (100, 100, 10_000)]


def test_a_bitmap_gives_a_bound_and_a_rate_from_it() -> None:
    script, vm = one()
    vm.gets(0)
    vm.send(100, 900, 409_600)
    vm.gets(50_000)
    vm.send(50_100, 50_900, 45_000)
    rows = rows_of(vm, script).passes()
    assert [(p.pages, p.pages_at_most, p.dirty_pages_per_s) for p in rows] == [(None, 100, None), (None, 10, 200)]


def test_re_arming_by_clear_is_all_of_it() -> None:
    script, vm = one()
    vm.gets(0)
    vm.ioctl("CLEAR_DIRTY_LOG", 500, size=1000)
    vm.gets(10_000)
    vm.ioctl("CLEAR_DIRTY_LOG", 10_100, 40, size=2000)
    found = rows_of(vm, script, at(9000)).rearm(at(99_000))
    assert found is not None
    assert (found.ns, found.pages, found.samples, found.error_ns) == (40 * US, 2000, "exact", 0)
    assert (found.ns_per_page, found.ms_per_gib) == (20.0, 5.24288)


def test_re_arming_by_legacy_gets_is_their_walk_and_flush() -> None:
    script, vm = one()
    vm.logging(-5000, [(0, 256 * MIB)])
    vm.gets(0, [0])
    vm.gets(10_000, [0], took=1000)
    assert rows_of(vm, script, at(9000)).rearm(at(99_000)) is None, "not known without samples"
    vm.events += [ev.Samples(at(10_000), 1000, 1001, 100_000, n, stack) for n, stack in ((6, WALK), (4, COPY))]
    found = rows_of(vm, script, at(9000)).rearm(at(99_000))
    assert found is not None
    assert (found.ns, found.pages, found.samples) == (600 * US, 65_536, 10)
    assert 200 * US < found.error_ns < 700 * US
    assert found.ms_per_gib == pytest.approx(2.4)


def test_a_get_with_manual_protection_re_arms_nothing() -> None:
    script, vm = one()
    vm.gets(0)
    vm.ioctl("CLEAR_DIRTY_LOG", 500, size=1000)
    vm.gets(10_000)
    assert rows_of(vm, script, at(9000)).rearm(at(99_000)) is None


def test_logging_switched_off_in_the_blackout_is_reported() -> None:
    script, vm = one()
    vm.logging(-9_000_000, [(7, 16 * MIB)])  # for a display
    vm.logging(0)
    vm.logging(500_000, on=False)
    found = rows_of(vm, script, at(400_000)).logging((at(400_000), at(500_025)))
    assert found == [
        Logging(on=True, begin=0, end=30 * US, kernel_ns=20 * US, slots=2, in_blackout_ns=0),
        Logging(on=False, begin=500_000 * US, end=500_030 * US, kernel_ns=20 * US, slots=2, in_blackout_ns=15 * US),
    ]


def test_bitmap_work_off_the_cpu_is_the_difference_of_totals() -> None:
    script, vm = one()
    vm.gets(0, [0])
    vm.send(200, 300, 4096)
    get, send = vm.events[-2:]
    assert isinstance(get, ev.Ioctl) and isinstance(send, ev.Transfer)
    vm.events[-2] = msgspec.structs.replace(get, off_cpu_ns=2 * US, off_total_ns=7 * US)
    vm.events[-1] = msgspec.structs.replace(send, off_before_ns=57 * US)
    (row,) = rows_of(vm, script).passes()
    assert (row.user_ns, row.user_off_cpu_ns) == (190 * US, 50 * US)
    vm.events[-1] = msgspec.structs.replace(send, off_before_ns=57 * US, tid=1009)
    (row,) = rows_of(vm, script).passes()
    assert row.user_off_cpu_ns is None, "another thread sends: what the fetching thread did at that time is unknown"


def span(vm: Vm, since: float, until: float, outside: float, longest: float, lock: float = 0) -> None:
    ends = at(since), at(until)
    vm.events.append(
        ev.VcpuSpan(*ends, vm.pid, vm.tid(0), round(outside * US), round(longest * US), 3, round(lock * US))
    )


def test_brownout_of_a_pass_beside_as_long_a_stretch_before_logging() -> None:
    script, vm = one()
    vm.entered(-50_000)
    vm.interrupted(25_000, entered=-50_000)
    span(vm, -30_000, -24_000, 900, 500)  # too early
    span(vm, -12_000, -4_000, 800, 300)  # two thirds of it are in the stretch before logging
    span(vm, -2_000, -1_500, 100, 90)
    vm.logging(0)
    vm.gets(100)
    span(vm, 1_000, 9_000, 2_000, 1_500, lock=40)
    vm.gets(10_000)
    (first, second) = rows_of(vm, script, at(20_000), brownout=True).passes()
    assert first.brownout is not None and first.baseline is not None and second.brownout is not None
    assert first.brownout.duration_ns == 9_900 * US and first.baseline.duration_ns == 9_900 * US
    assert first.brownout.vcpus == [
        VcpuShare(vcpu=0, outside_ns=2_000 * US, longest_gap_ns=1_500 * US, lock_wait_ns=40 * US)
    ]
    # [-9900, -4000) is 5900 of the span's 8000 us: 590 of 800, and 100 more.
    (before,) = first.baseline.vcpus
    assert (before.outside_ns, before.longest_gap_ns) == (690 * US, 300 * US)
    assert second.brownout.vcpus == [VcpuShare(vcpu=0, outside_ns=0, longest_gap_ns=0, lock_wait_ns=0)]


def test_recordings_without_vcpu_spans_show_no_brownout() -> None:
    script, vm = one()
    vm.gets(0)
    (row,) = rows_of(vm, script).passes()
    assert row.brownout is None and row.baseline is None


def test_own_cost_in_the_window_lies_between_the_readings_around_it_and_in_it() -> None:
    script = scripts.qemu_7_2()
    plain = script.result().breakdown
    assert plain.completeness.observer_window_ns is None and plain.window_ns is not None
    begin = next(e.at_ns for e in script.events if isinstance(e, ev.Kick))
    end = begin + plain.window_ns
    readings = [(begin - 9000, 100), (begin - 500, 150), (begin + 200, 160), (end - 100, 400), (end + 50, 450)]
    script.marks += [ev.OwnCost(when, run, 1) for when, run in readings]
    state = script.result().breakdown.completeness
    assert (state.observer_window_least_ns, state.observer_window_ns) == (240, 300)


def test_sends_past_the_system_calls_are_said() -> None:
    script = scripts.qemu_7_2()
    source = script.vms[0]
    last = next(e for e in reversed(source.events) if isinstance(e, ev.Transfer) and e.direction == 0)
    source.events.append(msgspec.structs.replace(last, bytes=70_000, in_call_ns=0, off_cpu_ns=-1, hidden=1))
    assert any(
        "70000 bytes were sent without a system call that is traced" in note for note in script.result().breakdown.notes
    )


def test_ring_resets_that_failed_count_nothing() -> None:
    script, vm = one()
    reset(vm, 0, -1)
    (row,) = rows_of(vm, script).passes()
    assert row.pages == 0
    assert kvm.name_of(kvm.RESET_DIRTY_RINGS) == "RESET_DIRTY_RINGS"
