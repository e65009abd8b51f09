# SPDX-License-Identifier: Apache-2.0
"""arm64's vCPU of the truth machine, at EL1 with the MMU off, so that its addresses are the guest's physical ones.

In: descriptors of a VM and a vCPU. Out: a `Cpu`. There is no interrupt controller in the kernel, since nothing
interrupts the guest, and no clock of the VM, since each vCPU has a counter. Numbers:
arch/arm64/include/uapi/asm/kvm.h, Linux 6.12.
"""

from __future__ import annotations

import struct

from tests.truth.cpu import LIST, Cpu, Part

_GET_ONE_REG, _SET_ONE_REG = 0x4010AEAB, 0x4010AEAC
_PREFERRED_TARGET, _VCPU_INIT = 0x8020AEAF, 0x4020AEAE
_CORE = 0x6030_0000_0010_0000
"""KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE; the rest is an offset in struct kvm_regs, in 32-bit words."""
_CAP_DIRTY_LOG_RING_ACQ_REL = 223
_EXIT_MMIO = 6
_NO_SLOT = 0xE000_0000
"""No memslot is here, so that a write leaves KVM_RUN."""
_EL1H_MASKED = 0x3C5
"""PSTATE: EL1 with its own stack pointer; no interrupt is taken."""


def _core(words: int) -> Part:
    return Part(_GET_ONE_REG, _SET_ONE_REG, 8, _CORE | words)


X = tuple(_core(2 * number) for number in range(31))
SP, PC, PSTATE = _core(62), _core(64), _core(66)
MP_STATE = Part(0x8004AE98, 0x4004AE99, 4)


def _create(vm: int, vcpu: int) -> None:
    """Initialises the vCPU as the kind of CPU that the host has. It begins to run with its first KVM_RUN."""
    Part(0, _VCPU_INIT, 32).write(vcpu, Part(_PREFERRED_TARGET, 0, 32).read(vm))


def _prepare(fd: int, count: int, at: int) -> None:
    for part, value in ((X[0], count), (X[1], LIST), (X[4], _NO_SLOT), (PC, at), (PSTATE, _EL1H_MASKED)):
        part.write(fd, struct.pack("<Q", value))


WRITE_LIST = (
    (0xB40000E0, "next: cbz x0, done"),
    (0xB8404422, "ldr w2, [x1], #4"),
    (0xB9400043, "ldr w3, [x2]"),
    (0x11000463, "add w3, w3, #1"),
    (0xB9000043, "str w3, [x2]"),
    (0xD1000400, "sub x0, x0, #1"),
    (0x17FFFFFA, "b next"),
    (0xB9000080, "done: str w0, [x4]"),
    (0xD503207F, "halt: wfi"),
    (0x17FFFFFF, "b halt"),
)
"""Each instruction, and its source for an assembler: a test assembles it again. List at x1, its length in x0."""
LEAVE = ((0xB9000080, "leave: str w0, [x4]"), (0x17FFFFFF, "b leave"))
SPIN = ((0x14000000, "spin: b spin"),)


def _bytes(code: tuple[tuple[int, str], ...]) -> bytes:
    return b"".join(struct.pack("<I", word) for word, _ in code)


CPU = Cpu(
    state=(*X, SP, PC, PSTATE, MP_STATE),
    chip=None,
    clock=None,
    create_chip=None,
    dirty_ring=_CAP_DIRTY_LOG_RING_ACQ_REL,
    userfaultfd=282,
    write_list=_bytes(WRITE_LIST),
    halt=_bytes(WRITE_LIST[-2:]),
    spin=_bytes(SPIN),
    leave=_bytes(LEAVE),
    written=_EXIT_MMIO,
    create=_create,
    prepare=_prepare,
)
