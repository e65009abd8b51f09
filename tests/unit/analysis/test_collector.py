# SPDX-License-Identifier: Apache-2.0
"""The collector on completed migrations, for every order of steps that VMMs are known to use."""

from __future__ import annotations

import itertools
import json
import random

import msgspec
import pytest

from ebpf_mig import breakdown as b
from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import Recording
from tests.unit import scripts
from tests.unit.script import US, Script


def test_qemu_7_2_phases() -> None:
    result = scripts.qemu_7_2().result()
    assert result.phases == {
        "pause": 2932,
        "quiesce": 3829,
        "fetch.kernel": 40,
        "fetch.user": 440,
        "memory.send": 32_470,
        "state.save": 380 + 1100,
        "state.send": 2500,
        "state.load": 900,
        "resume": 1180,
    }
    assert result.window == 45_771
    assert result.blackout == (2932, 45_771)
    assert result.breakdown.blackout_ns == 42_839 * US
    assert result.spans("state.save") == [(6761, 7141), (40_091, 41_191)]
    assert result.spans("fetch.kernel") == [(7141, 7151), (7161, 7171), (7431, 7441), (7451, 7461)]


def test_qemu_7_2_migration() -> None:
    found = scripts.qemu_7_2().result().breakdown.migration
    assert found == b.Migration(
        vmm="qemu",
        vmm_version="7.2.22",
        mode="precopy",
        transport="tcp",
        connections=1,
        result="completed",
        source=b.Endpoint(host="alpha", pid=1000),
        destination=b.Endpoint(host="alpha", pid=2000),
        stopped_early=False,
        total_ns=445_780 * US,
        paused_before=False,
        paused_after=False,
        pairing=b.Pairing(by=b.PairedBy.CONNECTION),
    )


def test_qemu_7_2_dirty_log() -> None:
    found = scripts.qemu_7_2().result().breakdown.dirty_log
    assert found.mode == "manual"
    assert found.slots == [
        b.Slot(slot=0, base=0, size_bytes=256 << 20),
        b.Slot(slot=3, base=0, size_bytes=16 << 20),
    ]
    assert [(p.begin / US, p.kernel_ns / US, p.user_ns / US, p.bytes, p.send_ns / US) for p in found.passes] == [
        (-399_909, 120, 1780, 20_000_000, 300_000),
        (-769, 20, 10, 0, 0),
    ]
    assert found.final == b.FinalFetch(
        kernel_ns=40 * US, user_ns=440 * US, pages=None, bytes=16_000_000, send_ns=32_470 * US
    )
    (fetch,) = found.fetches
    assert (fetch.begin / US, fetch.end / US, fetch.kernel_ns / US) == (7141, 7461, 40)
    assert [(i.ioctl, i.slot, i.begin / US, i.duration_ns / US) for i in fetch.ioctls] == [
        ("GET_DIRTY_LOG", 0, 7141, 10),
        ("GET_DIRTY_LOG", 3, 7161, 10),
        ("CLEAR_DIRTY_LOG", 3, 7431, 10),
        ("CLEAR_DIRTY_LOG", 0, 7451, 10),
    ]


def test_qemu_7_2_vcpus_sockets_notes() -> None:
    found = scripts.qemu_7_2().result().breakdown
    assert found.vcpus == [
        b.Vcpu(vcpu=0, kick_ns=2932 * US, stop=2932 * US, start=45_771 * US, blackout_ns=42_839 * US)
    ]
    assert [(s.role, s.bytes, s.calls, s.in_call_ns / US, s.between_ns / US) for s in found.sockets] == [
        ("source migration", 16_113_000, 7, 34_270, 1800),
        ("destination migration", 16_113_000, 503, 9030, 26_990),
    ]
    assert found.sockets[0].remote == "127.0.0.1:4444"
    assert found.sockets[0].copy_ns is None and found.sockets[0].blocked_ns is None
    assert found.notes == [
        "1 KVM_RUN of the destination's vCPU 0 returned -EINTR within 122.0 us: taken not to have run the guest"
    ]
    assert found.completeness.verdict == "complete"
    assert found.completeness.reasons == []


def test_qemu_10_0_phases() -> None:
    result = scripts.qemu_10_0().result()
    assert result.phases == {
        "pause": 100,
        "quiesce": 150,
        "fetch.kernel": 30,
        "fetch.user": 40,
        "memory.send": 4180,
        "state.save": 700,
        "state.send": 100,
        "handover": 50 + 40_510,
        "state.load": 150 + 190,
        "resume": 350,
    }
    assert result.window == 46_550
    assert result.breakdown.dirty_log.final is not None
    assert result.breakdown.dirty_log.final.bytes == 2_000_000


def test_qemu_11_1_phases() -> None:
    result = scripts.qemu_11_1().result()
    assert result.phases == {
        "pause": 60,
        "quiesce": 50,
        "fetch.kernel": 20,
        "fetch.user": 3010,
        "memory.send": 2060,
        "state.save": 400,
        "state.send": 100,
        "handover": 50,
        "state.load": 150,
        "resume": 200,
    }
    assert result.breakdown.dirty_log.mode == "manual"


def test_multifd() -> None:
    result = scripts.multifd().result()
    assert result.phases == {
        "pause": 100,
        "quiesce": 150,
        "fetch.kernel": 20,
        "fetch.user": 30,
        "memory.send": 3200,
        "state.save": 700,
        "state.send": 100,
        "handover": 100,
        "state.load": 80,
        "resume": 520,
    }
    assert result.breakdown.migration.connections == 3
    assert result.breakdown.dirty_log.final is not None
    assert result.breakdown.dirty_log.final.bytes == 5000 + 2 * 525_632 + 1344
    assert {s.local for s in result.breakdown.sockets if s.role == "source migration"} == {
        "127.0.0.1:50070",
        "127.0.0.1:50072",
        "127.0.0.1:50073",
    }


def test_cloud_hypervisor_53() -> None:
    result = scripts.cloud_hypervisor_53().result()
    assert result.phases == {
        "pause": 40,
        "quiesce": 1360,
        "fetch.kernel": 40,
        "fetch.user": 80,
        "memory.send": 2500,
        "state.save": 500 + 980,
        "state.send": 20,
        "handover": 44_280,
        "state.load": 910,
        "resume": 1690,
    }
    found = result.breakdown
    assert found.dirty_log.mode == "legacy"
    assert len(found.dirty_log.fetches) == 2
    assert found.dirty_log.final is not None and found.dirty_log.final.bytes == 4_096_176
    assert [p.bytes for p in found.dirty_log.passes] == [0]
    assert found.vcpus[0].stop == 40 * US
    assert len(found.notes) == 2


def test_cloud_hypervisor_53_when_the_second_fetch_finds_pages() -> None:
    result = scripts.cloud_hypervisor_53(second=True).result()
    assert result.spans("memory.send") == [(1500, 4000), (4600, 4800)]
    assert result.phases["fetch.user"] == 80 + 80
    assert result.phases["state.save"] == 500 + 700
    assert result.phases["state.send"] == 20
    assert result.breakdown.dirty_log.final is not None
    assert result.breakdown.dirty_log.final.bytes == 4_096_176 + 40_992


def test_cloud_hypervisor_local() -> None:
    result = scripts.cloud_hypervisor_local().result()
    assert result.phases == {
        "pause": 30,
        "quiesce": 1270,
        "state.save": 700,
        "state.send": 20,
        "handover": 180,
        "state.load": 810,
        "resume": 790,
    }
    found = result.breakdown
    assert (found.migration.mode, found.migration.transport) == ("local", "unix")
    assert found.dirty_log == b.DirtyLog(mode="none", slots=[], passes=[], final=None, fetches=[])


def test_dirty_ring() -> None:
    result = scripts.dirty_ring().result()
    assert result.phases == {
        "pause": 100,
        "quiesce": 300,
        "fetch.user": 410,
        "memory.send": 2100,
        "state.save": 90 + 400,
        "state.send": 100,
        "handover": 100,
        "state.load": 80,
        "resume": 320,
    }
    found = result.breakdown.dirty_log
    assert found.mode == "ring"
    assert [(p.kernel_ns / US, p.bytes) for p in found.passes] == [(90, 10_000_000), (60, 5_000_000)]
    assert found.fetches == []
    assert found.final is not None and (found.final.kernel_ns, found.final.bytes) == (0, 1_000_000)


def test_three_vcpus_stop_and_start_apart() -> None:
    script = Script()
    source, destination = script.pair(vcpus=3)
    source.logging(-100_000)
    source.gets(-99_900)
    source.send(-98_000, -2_000, 10_000_000, calls=80)
    # vCPU 0 is quick, vCPU 1 has left for an access and waits, vCPU 2 is slow.
    source.kick(10, 0)
    source.kick(12, 1)
    source.kick(14, 2)
    source.interrupted(50, 0)
    source.last(1, entered=-9000, left=-400, end=90_000)
    source.interrupted(900, 2)
    source.ioctls(scripts.READS, 1000, 1090, tid=100)
    source.gets(1200)
    source.send(1300, 1400, 8192)
    source.ioctl("GET_CLOCK", 1500)
    source.send(1600, 1700, 60_000)
    destination.ioctls(scripts.WRITES, 1800, 1900, tid=100)
    destination.entered(2000, 1)
    destination.entered(2100, 0)
    destination.entered(2500, 2)
    result = script.result()
    assert result.window == 2490
    assert result.blackout == (890, 1990)
    assert result.phases["pause"] == 890
    assert result.phases["resume"] == 600
    assert [
        (v.vcpu, v.kick_ns and v.kick_ns / US, (v.stop or 0) / US, (v.start or 0) / US, (v.blackout_ns or 0) / US)
        for v in result.breakdown.vcpus
    ] == [(0, 40, 40, 2090, 2050), (1, None, -410, 1990, 2400), (2, 886, 890, 2490, 1600)]


def test_the_kick_to_a_vcpu_that_had_left_opens_the_window() -> None:
    script = scripts.qemu_11_1()
    source = script.vms[0]
    # A second vCPU, out of KVM_RUN since before, is kicked first.
    source.last(1, entered=-700, left=-300, end=90_000)
    source.kick(-30, 1)
    script.vms[1].entered(6150, 1)
    result = script.result()
    assert result.phases["pause"] == 90
    assert result.window == 6180


def test_without_kicks_the_first_stop_opens_the_window() -> None:
    script = Script()
    source, destination = script.pair(vcpus=2)
    source.interrupted(200, 0)
    source.interrupted(700, 1)
    source.ioctls(scripts.READS, 800, 890, tid=100)
    source.send(1000, 1100, 60_000)
    destination.ioctls(scripts.WRITES, 1200, 1280, tid=100)
    destination.entered(1500, 0)
    destination.entered(1600, 1)
    result = script.result()
    assert result.phases["pause"] == 500
    assert result.window == 1400


def test_kicks_for_other_work_do_not_open_the_window() -> None:
    """Each dirty-ring sync kicks all vCPUs out; they re-enter."""
    script = scripts.dirty_ring()
    source = script.vms[0]
    source.kick(-60_000)
    source.interrupted(-59_900)
    source.entered(-59_700, left=-59_900, ret=-4)
    assert script.result().window == 4000


def test_an_immediate_return_after_a_kick_inside_the_call_did_run_the_guest() -> None:
    script = scripts.qemu_11_1()
    source = script.vms[0]
    # Kicked out for other work, re-entered, and kicked again 160 us later: that call ran the guest.
    source.events = [e for e in source.events if not (hasattr(e, "ret") and hasattr(e, "enter_ns"))]
    source.kick(-110)
    source.interrupted(-100)
    source.entered(-100 + 0.5, left=-100, ret=-4)
    source.interrupted(60, entered=-100 + 0.5)
    result = script.result()
    assert result.breakdown.vcpus[0].stop == 60 * US
    assert result.window == 6100


def test_vga_fetches_are_not_the_migrations() -> None:
    script = scripts.qemu_7_2()
    source = script.vms[0]
    source.logging(-900_000, [(7, 16 << 20)])
    for us in (-850_000, -300_000, -200_000, 20_000):
        source.gets(us, [7], tid=2)
    plain, noisy = scripts.qemu_7_2().result().breakdown, script.result().breakdown
    assert noisy.phases == plain.phases
    assert noisy.dirty_log == plain.dirty_log
    assert noisy.migration == plain.migration


def test_nothing_but_the_migration_counts_on_other_sockets() -> None:
    script = scripts.qemu_7_2()
    source = script.vms[0]
    source.socket(75, "127.0.0.1:5900", "10.0.0.9:41000")
    source.send(-300_000, -100_000, 900_000_000, socket=75, tid=3, calls=900)
    source.send(5000, 30_000, 90_000_000, socket=75, tid=3)
    assert script.result().phases == scripts.qemu_7_2().result().phases


def test_sends_recorded_as_one_run_are_split_at_the_saving_of_state() -> None:
    script = scripts.qemu_11_1()
    source = script.vms[0]
    source.events = [e for e in source.events if getattr(e, "bytes", None) not in (1_000_000, 60_000)]
    source.send(3140, 5700, 1_060_000, calls=20, in_call_us=900)
    result = script.result()
    assert result.phases["memory.send"] == 2060
    assert result.phases["state.save"] == 110
    assert result.phases["state.send"] == 390
    assert result.breakdown.notes == [
        "sends in the blackout were recorded as one batch: the boundary between memory and state is estimated"
    ]


def in_postcopy(started: int) -> Script:
    """All memory is sent by 90 ms. `started`: when the guest runs at the destination, us."""
    script = Script()
    source, destination = script.pair()
    source.logging(-100_000)
    source.gets(-99_900)
    source.send(-98_000, -2_000, 10_000_000, calls=80)
    source.kick(0)
    source.interrupted(100)
    source.gets(300)
    source.ioctls(scripts.READS, 500, 590, tid=100)
    source.send(800, 900, 60_000)
    source.send(950, 40_000, 50_000_000)
    destination.receive(910, 920, 60_000, socket=80)
    destination.ioctls(scripts.WRITES, 1200, 1280, tid=100)
    destination.entered(started)
    source.send(40_010, 90_000, 50_000_000)
    return script


def test_postcopy_does_not_hide_the_loading() -> None:
    result = in_postcopy(1500).result()
    assert result.breakdown.migration.mode == "postcopy"
    assert result.blackout == (100, 1500)
    assert result.phases == {
        "pause": 100,
        "quiesce": 200,
        "fetch.kernel": 20,
        "fetch.user": 10 + 170,
        "state.save": 90 + 210,
        "state.send": 100,
        "handover": 300,
        "state.load": 80,
        "resume": 220,
    }


def test_postcopy_whose_manager_is_slower_than_all_the_pages() -> None:
    early, late = in_postcopy(1500).result(), in_postcopy(100_000).result()
    assert late.breakdown.migration.mode == "postcopy"
    assert late.phases == early.phases | {"resume": 100_000 - 1280}


def test_roles_follow_the_events_not_the_hints() -> None:
    script = scripts.qemu_7_2()
    script.vms[0].role, script.vms[1].role = "destination", "source"
    found = script.result().breakdown
    assert found.migration.source == b.Endpoint(host="alpha", pid=1000)
    assert found.phases == scripts.qemu_7_2().result().breakdown.phases
    assert found.notes[:2] == [
        "process 1000 was given as the destination, but behaved as the source",
        "process 2000 was given as the source, but behaved as the destination",
    ]


def test_roles_without_hints() -> None:
    script = scripts.cloud_hypervisor_53()
    script.vms[0].role = script.vms[1].role = "unknown"
    assert script.result().breakdown.phases == scripts.cloud_hypervisor_53().result().breakdown.phases


@pytest.mark.parametrize("make", scripts.ALL, ids=lambda make: make.__name__)
def test_the_order_of_events_does_not_matter(make: type) -> None:
    script: Script = make()
    expected = msgspec.json.encode(analyse(script.recording).breakdown, order="deterministic")
    for seed in range(5):
        events = script.events
        random.Random(seed).shuffle(events)
        assert (
            msgspec.json.encode(
                analyse(Recording(header=script.header, events=events)).breakdown, order="deterministic"
            )
            == expected
        )


@pytest.mark.parametrize("make", scripts.ALL, ids=lambda make: make.__name__)
def test_the_partition_is_exact(make: type) -> None:
    found = make().result().breakdown
    spans = sorted(span for phase in found.phases for span in phase.spans)
    assert spans[0][0] == 0 and spans[-1][1] == found.window_ns
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
    assert [(p.phase, p.side) for p in found.phases] == list(b.sides_of(False))
    assert found.phase_ns("unattributed") == 0
    json.loads(msgspec.json.encode(found))


@pytest.mark.parametrize("wait_us", [500, 15_000, 30_000, 3_000_000])
def test_a_destination_alone_that_waits_for_its_manager_after_the_load(wait_us: int) -> None:
    """`-S` and `cont`: loading has set the vCPUs, even if devices are resumed long after it."""
    figures = []
    for alone in (False, True):
        script = Script()
        source, destination = script.vm(1000, "source"), script.vm(2000, "destination")
        script.join(70, 80)
        destination.ioctls("CREATE_VCPU SET_SREGS SET_REGS", 100, 400)
        source.logging(100_000)
        source.gets(101_000)
        source.send(102_000, 103_000, 1 << 20)
        source.kick(200_000)
        source.interrupted(200_050)
        source.gets(201_000)
        source.send(202_000, 203_000, 65536)
        source.ioctls("GET_REGS GET_SREGS", 203_100, 203_200)
        source.send(203_300, 203_400, 4000)
        destination.receive(102_000, 203_410, (1 << 20) + 69536, socket=80)
        destination.ioctls("SET_USER_MEMORY_REGION SET_IRQCHIP SET_SREGS SET_REGS", 204_000, 204_900)
        cont = 204_900 + wait_us
        destination.ioctls("SET_CLOCK KVMCLOCK_CTRL SET_PIT2 IOEVENTFD", cont, cont + 200)
        destination.ioctl("SET_MSRS", cont + 250)
        destination.entered(cont + 400)
        if alone:
            script.vms.remove(source)
        result = script.result()
        figures.append((result.phases["state.load"], result.phases["resume"]))
    assert figures[0] == figures[1] == (900, wait_us + 400)
