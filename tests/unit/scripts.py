# SPDX-License-Identifier: Apache-2.0
"""Whole migrations as scripts, one per VMM version; see script.py for the language.

Orders and lengths follow traces of real VMMs, rounded so that a reader can add them up. Microsecond 0 is near the
pause request.
"""

from __future__ import annotations

from tests.unit.script import UNIX, Script

MIB = 1 << 20
VCPU = 100
"""Thread of vCPU 0, counted from the pid."""
READS = "GET_VCPU_EVENTS GET_MP_STATE GET_REGS GET_XSAVE2 GET_XCRS GET_SREGS2 GET_MSRS GET_LAPIC GET_DEBUGREGS"
WRITES = "SET_SREGS2 SET_REGS SET_XSAVE SET_XCRS SET_MSRS SET_VCPU_EVENTS SET_MP_STATE SET_DEBUGREGS"
CH_READS = (
    "GET_CPUID2 GET_MP_STATE GET_REGS GET_SREGS GET_XSAVE2 GET_XCRS GET_LAPIC GET_FPU GET_NESTED_STATE GET_MSRS "
    "GET_VCPU_EVENTS GET_TSC_KHZ"
)
CH_WRITES = (
    "SET_CPUID2 SET_MP_STATE SET_REGS SET_SREGS SET_XSAVE SET_XCRS SET_LAPIC SET_FPU SET_TSC_KHZ SET_MSRS "
    "SET_VCPU_EVENTS"
)


def qemu_7_2() -> Script:
    """vCPU registers, final fetch, memory, devices; an old kick interrupts the first KVM_RUN on the destination."""
    script = Script()
    source, destination = script.pair()
    source.socket(71, family=UNIX, peer=999)
    source.logging(-400_000)
    source.gets(-399_900)
    source.ioctl("CLEAR_DIRTY_LOG", -399_000, 100)
    source.send(-398_000, -2_000, 20_000_000, calls=150, in_call_us=300_000)
    source.gets(-760)
    source.kick(9)
    source.interrupted(2941)
    source.ioctl("GET_MSRS", 3360, tid=VCPU)
    source.ioctl("GET_PIT2", 5000)
    source.ioctl("GET_CLOCK", 6220)
    source.send(6350, 6360, 81, socket=71)
    source.ioctls(READS, 6770, 7040, tid=VCPU)
    source.gets(7150)
    source.ioctl("CLEAR_DIRTY_LOG", 7440, slot=3)
    source.ioctl("CLEAR_DIRTY_LOG", 7460)
    source.send(7630, 15_630, 4_000_000)
    source.send(15_730, 23_630, 4_000_000)
    source.send(23_730, 31_700, 4_000_000)
    source.send(31_800, 39_800, 4_000_000)
    source.ioctl("GET_CLOCK", 40_100)
    source.ioctls("GET_IRQCHIP GET_IRQCHIP GET_IRQCHIP", 40_500, 40_530)
    source.send(41_200, 41_300, 30_000)
    source.send(41_400, 41_500, 30_000)
    source.send(41_500, 43_700, 53_000)
    destination.receive(7700, 39_850, 16_000_000, socket=80, calls=500, in_call_us=9000)
    destination.receive(41_310, 41_320, 30_000, socket=80)
    destination.receive(41_510, 41_520, 30_000, socket=80)
    destination.ioctl("SET_USER_MEMORY_REGION", 41_800, 100, slot=0, size=256 * MIB)
    destination.ioctl("SET_LAPIC", 42_200, tid=VCPU)
    destination.ioctl("SET_IRQCHIP", 42_950)
    destination.receive(43_710, 43_720, 53_000, socket=80)
    destination.ioctls(WRITES, 44_200, 44_600, tid=VCPU)
    destination.ioctl("SET_CLOCK", 45_090)
    destination.ioctl("KVMCLOCK_CTRL", 45_200, tid=VCPU)
    destination.ioctl("SET_PIT2", 45_220)
    destination.kick(45_380)
    destination.entered(45_650)
    destination.interrupted(45_772, entered=45_650)
    destination.entered(45_780, left=45_772, ret=-4, runs=2)
    return script


def qemu_10_0() -> Script:
    """Announcement, final fetch, memory, vCPU registers, devices; the end of the state is held on the wire."""
    script = Script()
    source, destination = script.pair()
    source.logging(-100_000)
    source.gets(-99_900)
    source.send(-98_000, -2_000, 10_000_000, calls=80)
    source.kick(0)
    source.interrupted(100)
    source.ioctl("GET_PIT2", 150)
    source.ioctl("GET_CLOCK", 170)
    source.send(230, 236, 10)
    source.gets(250)
    source.ioctl("CLEAR_DIRTY_LOG", 290)
    source.send(320, 2320, 1_000_000)
    source.send(2330, 4330, 1_000_000)
    source.ioctls(READS, 4500, 4590, tid=VCPU)
    source.ioctl("GET_CLOCK", 4700)
    source.ioctls("GET_IRQCHIP GET_IRQCHIP GET_IRQCHIP", 5000, 5030)
    source.send(5200, 5300, 60_000)
    destination.receive(340, 5320, 2_040_000, socket=80, calls=90, in_call_us=700)
    destination.ioctl("SET_MSRS", 5350, tid=VCPU)
    destination.ioctl("SET_LAPIC", 5370, tid=VCPU)
    destination.ioctl("SET_USER_MEMORY_REGION", 5400, 100, size=256 * MIB)
    destination.receive(46_000, 46_010, 20_000, socket=80, failed=1)
    destination.ioctls(WRITES, 46_100, 46_200, tid=VCPU)
    destination.ioctl("SET_CLOCK", 46_300)
    destination.kick(46_400)
    destination.entered(46_500)
    destination.interrupted(46_540, entered=46_500)
    destination.entered(46_550, left=46_540, ret=-4, runs=2)
    return script


def qemu_11_1() -> Script:
    """The final fetch comes first; then block devices are quieted; no CLEAR in the last round."""
    script = Script()
    source, destination = script.pair()
    source.logging(-50_000)
    source.gets(-49_900)
    source.ioctl("CLEAR_DIRTY_LOG", -49_000)
    source.send(-48_000, -1_000, 5_000_000, calls=40)
    source.kick(0)
    source.interrupted(60)
    source.ioctl("GET_CLOCK", 90)
    source.gets(110)
    source.send(3140, 5140, 1_000_000)
    source.ioctls(READS, 5200, 5290, tid=VCPU)
    source.ioctl("GET_CLOCK", 5300)
    source.send(5600, 5700, 60_000)
    destination.receive(3150, 5720, 1_060_000, socket=80, calls=40, in_call_us=300)
    destination.ioctl("SET_USER_MEMORY_REGION", 5750, 20, size=256 * MIB)
    destination.ioctls(WRITES, 5800, 5900, tid=VCPU)
    destination.ioctl("SET_CLOCK", 6000)
    destination.entered(6100)
    return script


def multifd() -> Script:
    """Two more connections carry the pages, each from its own thread; QMP events are sent in between."""
    script = Script()
    source, destination = script.pair()
    script.join(72, 82)
    script.join(73, 83)
    source.socket(71, family=UNIX, peer=999)
    source.logging(-100_000)
    source.gets(-99_900)
    source.send(-99_000, -1_000, 20_000, calls=20, in_call_us=500)
    source.send(-98_000, -2_000, 20_000_000, socket=72, tid=5, calls=80)
    source.send(-98_000, -2_000, 20_000_000, socket=73, tid=6, calls=80)
    source.kick(0)
    source.interrupted(100)
    source.ioctl("GET_CLOCK", 170)
    source.gets(250)
    source.send(300, 310, 5000)
    source.send(320, 2320, 525_632, socket=72, tid=5)
    source.send(340, 3340, 525_632, socket=73, tid=6)
    source.send(1000, 1010, 112, socket=71)
    source.send(3350, 3360, 1344)
    source.ioctls(READS, 3500, 3590, tid=VCPU)
    source.send(4200, 4300, 60_000)
    destination.receive(4310, 4320, 60_000, socket=80)
    destination.receive(330, 2400, 525_632, socket=82, tid=7)
    destination.receive(350, 3400, 525_632, socket=83, tid=8)
    destination.ioctls(WRITES, 4400, 4480, tid=VCPU)
    destination.ioctl("SET_CLOCK", 4600)
    destination.entered(5000)
    return script


def cloud_hypervisor_53(second: bool = False) -> Script:
    """Two final fetches, answers to every message, `immediate_exit` on both sides, Nagle holding the state back.

    `second`: the second fetch finds ten pages.
    """
    script = Script()
    source, destination = script.pair()
    slots = ((0, 256 * MIB),)
    source.logging(-100_000, slots)
    source.send(-99_000, -20_000, 256 * MIB)
    source.receive(-19_990, -19_900, 16)
    source.gets(-500, [0])
    source.kick(0)
    source.interrupted(40)
    source.entered(55, left=40, ret=-4, runs=2)
    source.interrupted(60, entered=55)
    source.ioctl("KVMCLOCK_CTRL", 1100)
    source.ioctl("GET_CLOCK", 1150)
    source.gets(1400, [0], took=20)
    source.send(1500, 1505, 16)
    source.send(1510, 1515, 160)
    source.send(1520, 3520, 4_096_000)
    source.receive(3530, 3900, 16)
    source.ioctls(CH_READS, 4000, 4240)
    source.gets(4500, [0], took=20)
    if second:
        source.send(4600, 4605, 16)
        source.send(4610, 4615, 16)
        source.send(4620, 4700, 40_960)
        source.receive(4710, 4800, 16)
    source.send(5500, 5505, 16)
    source.send(5510, 5520, 43_047)
    source.receive(5530, 52_000, 16)
    source.send(52_010, 52_015, 16)
    source.receive(52_020, 52_900, 16)
    destination.receive(1503, 3525, 4_096_176, socket=80, calls=400, in_call_us=1000)
    destination.send(3528, 3530, 16, socket=80)
    destination.receive(5525, 49_600, 43_047, socket=80)
    destination.ioctl("CREATE_VCPU", 49_800, 50)
    destination.ioctls(CH_WRITES, 49_900, 50_120)
    destination.ioctl("IRQFD", 50_500)
    destination.ioctl("SET_GSI_ROUTING", 50_700)
    destination.entered(51_000)
    destination.interrupted(51_010, entered=51_000)
    destination.send(51_500, 51_505, 16, socket=80)
    destination.receive(51_510, 52_030, 16, socket=80)
    destination.ioctl("SET_CLOCK", 52_100)
    destination.entered(52_400, left=51_010, ret=-4, runs=2)
    return script


def cloud_hypervisor_local() -> Script:
    """Memory stays where it is: no dirty log, no pages; state and two answers over a UNIX socket."""
    script = Script()
    source, destination = script.pair(unix=True)
    source.send(-5000, -4990, 5000)
    source.receive(-4980, -4000, 16)
    source.kick(0)
    source.interrupted(30)
    source.entered(45, left=30, ret=-4, runs=2)
    source.interrupted(50, entered=45)
    source.ioctl("KVMCLOCK_CTRL", 1100)
    source.ioctls(CH_READS, 1300, 1540)
    source.send(2000, 2005, 16)
    source.send(2010, 2020, 43_047)
    source.receive(2030, 3500, 16)
    source.send(3510, 3515, 16)
    source.receive(3520, 3900, 16)
    destination.receive(2015, 2040, 43_063, socket=80)
    destination.ioctl("CREATE_VCPU", 2200, 50)
    destination.ioctls(CH_WRITES, 2300, 2520)
    destination.ioctl("IRQFD", 3000)
    destination.send(3400, 3405, 16, socket=80)
    destination.receive(3410, 3525, 16, socket=80)
    destination.ioctl("SET_CLOCK", 3600)
    destination.entered(3800)
    return script


def dirty_ring() -> Script:
    """QEMU 7.2 with rings: they are already drained at the end, so the final fetch has no ioctl."""
    script = Script()
    source, destination = script.pair()
    source.logging(-100_000)
    source.ioctl("RESET_DIRTY_RINGS", -99_000, 90)
    source.send(-98_000, -50_000, 10_000_000, calls=80)
    source.ioctl("RESET_DIRTY_RINGS", -40_000, 60)
    source.send(-39_000, -2_000, 5_000_000, calls=40)
    source.kick(0)
    source.interrupted(100)
    source.ioctl("GET_CLOCK", 150)
    source.ioctls(READS, 400, 490, tid=VCPU)
    source.send(900, 2900, 1_000_000)
    source.ioctl("GET_CLOCK", 3000)
    source.send(3400, 3500, 60_000)
    destination.receive(3510, 3520, 60_000, socket=80)
    destination.ioctls(WRITES, 3600, 3680, tid=VCPU)
    destination.entered(4000)
    return script


ALL = [qemu_7_2, qemu_10_0, qemu_11_1, multifd, cloud_hypervisor_53, cloud_hypervisor_local, dirty_ring]
"""A migration of each kind."""
