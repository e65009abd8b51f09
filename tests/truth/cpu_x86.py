# SPDX-License-Identifier: Apache-2.0
"""x86-64's vCPU of the truth machine, in flat 32-bit protected mode without paging.

In: descriptors of a VM and a vCPU. Out: a `Cpu`. Numbers: arch/x86/include/uapi/asm/kvm.h, Linux 6.12.
"""

from __future__ import annotations

import struct

from ebpf_mig.linux import kvm as numbers
from tests.truth.cpu import LIST, Cpu, Part

REGISTERS = Part(0x8090AE81, 0x4090AE82, 144)
SREGS, FPU = Part(0x8138AE83, 0x4138AE84, 312), Part(0x81A0AE8C, 0x41A0AE8D, 416)
MP_STATE = Part(0x8004AE98, 0x4004AE99, 4)
CHIP = Part(0xC208AE62, 0x8208AE63, 520)
CLOCK = Part(numbers.GET_CLOCK, numbers.SET_CLOCK, 48)

_CREATE_IRQCHIP = 0xAE60
_CAP_DIRTY_LOG_RING = 192
_SET_MSRS, _MSR_WALL_CLOCK = 0x4008AE89, 0x4B564D00
"""arch/x86/include/uapi/asm/kvm_para.h, MSR_KVM_WALL_CLOCK_NEW."""
_EXIT_IO = 2
_MP_STATE_RUNNABLE = 0
_RFLAGS, _INTERRUPTS = 17 * 8, 1 << 9
"""Where the flags are in struct kvm_regs, and EFLAGS.IF."""


def _create(_vm: int, _vcpu: int) -> None:
    """Nothing is left to do."""


def _prepare(fd: int, count: int, at: int) -> None:
    sregs = bytearray(SREGS.read(fd))
    code = struct.pack("<QIHBBBBBBBBBB", 0, 0xFFFFFFFF, 8, 11, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    data = struct.pack("<QIHBBBBBBBBBB", 0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    sregs[0:24] = code
    for index in range(1, 6):
        sregs[24 * index : 24 * index + 24] = data
    cr0 = 8 * 24 + 2 * 16
    sregs[cr0 : cr0 + 8] = struct.pack("<Q", struct.unpack_from("<Q", sregs, cr0)[0] | 1)
    SREGS.write(fd, bytes(sregs))
    regs = [0] * 18
    regs[2], regs[4], regs[16], regs[17] = count, LIST, at, 2
    REGISTERS.write(fd, struct.pack("<18Q", *regs))
    MP_STATE.write(fd, struct.pack("<I", _MP_STATE_RUNNABLE))


def interruptible(fd: int) -> None:
    """Lets the guest of this vCPU take interrupts, of which there are none. KVM then fetches its pages in the
    background.
    """
    regs = bytearray(REGISTERS.read(fd))
    flags = struct.unpack_from("<Q", regs, _RFLAGS)[0]
    struct.pack_into("<Q", regs, _RFLAGS, flags | _INTERRUPTS)
    REGISTERS.write(fd, bytes(regs))


def write_wall_clock(fd: int, address: int) -> None:
    """Makes KVM write the wall clock to guest memory, which it does inside its SRCU (kvm_write_wall_clock)."""
    Part(0, _SET_MSRS, 24).write(fd, struct.pack("<IIIIQ", 1, 0, _MSR_WALL_CLOCK, 0, address))


CPU = Cpu(
    state=(SREGS, REGISTERS, FPU, MP_STATE),
    chip=CHIP,
    clock=CLOCK,
    create_chip=_CREATE_IRQCHIP,
    dirty_ring=_CAP_DIRTY_LOG_RING,
    userfaultfd=323,
    # jecxz 2f; 1: lodsd; inc dword [eax]; loop 1b; 2: out 0x10, al; 3: hlt; jmp 3b. List at esi, its length in ecx.
    write_list=bytes.fromhex("e305 ad ff00 e2fb e610 f4 ebfd"),
    halt=bytes.fromhex("f4 ebfd"),  # 1: hlt; jmp 1b
    spin=bytes.fromhex("ebfe"),  # 1: jmp 1b
    leave=bytes.fromhex("e610 ebfc"),  # 1: out 0x10, al; jmp 1b
    written=_EXIT_IO,
    create=_create,
    prepare=_prepare,
)
