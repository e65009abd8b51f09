# SPDX-License-Identifier: Apache-2.0
"""The tiny guest for arm64: the same work and the same beat as `guest`, in QEMU's `virt` machine.

In: vCPUs, working set and pace. Out: the bytes of an ELF64 file. QEMU loads it and starts the first vCPU at its entry,
at EL1 with the MMU off. The others are started by PSCI (CPU_ON by `hvc`, which KVM answers). The pace is kept with the
virtual counter. The code is the same for all guests: its numbers lie behind it.
Facts: hw/arm/virt.c (memory from 1 GiB, PL011 at 0x9000000), hw/arm/boot.c, QEMU 10.0; arch/arm64/kvm/sys_regs.c
(`reset_mpidr`: 16 vCPUs to a cluster), Linux 6.12.
"""

from __future__ import annotations

import struct

from ebpf_mig.lab.guest import FIRST_BYTE, PAGE, checked_pages

RAM = 1 << 30
"""Where the guest's memory begins: byte 0 of it is at this guest physical address."""
_LOAD = RAM + (2 << 20)
_CODE_AT = 0x1000
_CODE = (
    (0x100006CA, "start: adr x10, numbers"),
    (0xF9400152, "ldr x18, [x10]"),
    (0xD2800033, "mov x19, #1"),
    (0xEB12027F, "wake: cmp x19, x18"),
    (0x5400016A, "b.ge first"),
    (0xD2800060, "mov x0, #3"),
    (0xF2B88000, "movk x0, #0xc400, lsl #16 - CPU_ON"),
    (0x92400E61, "and x1, x19, #15 - MPIDR: affinity 0"),
    (0xD344FE62, "lsr x2, x19, #4"),
    (0xAA022021, "orr x1, x1, x2, lsl #8 - affinity 1"),
    (0x100000C2, "adr x2, work"),
    (0xAA1303E3, "mov x3, x19 - its x0"),
    (0xD4000002, "hvc #0"),
    (0x91000673, "add x19, x19, #1"),
    (0x17FFFFF5, "b wake"),
    (0xD2800000, "first: mov x0, #0"),
    (0x100004CA, "work: adr x10, numbers - x0 is the index of this vCPU"),
    (0xA940B14B, "ldp x11, x12, [x10, #8] - bytes and pages of an area"),
    (0xA941B94D, "ldp x13, x14, [x10, #24] - pages a second, first area"),
    (0x9B0B380F, "madd x15, x0, x11, x14"),
    (0x11010410, "add w16, w0, #'A'"),
    (0xD2A12011, "movz x17, #0x900, lsl #16 - the PL011"),
    (0xAA0F03F6, "mov x22, x15"),
    (0xAA0C03F7, "mov x23, x12"),
    (0xB94002D8, "fill: ldr w24, [x22] - each page once, without a pace"),
    (0x11000718, "add w24, w24, #1"),
    (0xB90002D8, "str w24, [x22]"),
    (0x914006D6, "add x22, x22, #4096"),
    (0xF10006F7, "subs x23, x23, #1"),
    (0x54FFFF61, "b.ne fill"),
    (0xB9000230, "str w16, [x17] - the letter"),
    (0xD53BE014, "mrs x20, cntfrq_el0"),
    (0xB400004D, "cbz x13, begin"),
    (0x9ACD0A8D, "udiv x13, x20, x13 - counts for a page"),
    (0xD53BE055, "begin: mrs x21, cntvct_el0 - the next deadline"),
    (0xAA0F03F6, "round: mov x22, x15"),
    (0xAA0C03F7, "mov x23, x12"),
    (0xB94002D8, "page: ldr w24, [x22]"),
    (0x11000718, "add w24, w24, #1"),
    (0xB90002D8, "str w24, [x22]"),
    (0x914006D6, "add x22, x22, #4096"),
    (0xB400012D, "cbz x13, next"),
    (0xD5033FDF, "spin: isb"),
    (0xD53BE058, "mrs x24, cntvct_el0"),
    (0xEB150318, "subs x24, x24, x21"),
    (0x54FFFFA4, "b.mi spin"),
    (0xEB0D031F, "cmp x24, x13"),
    (0x54000043, "b.lo on_time"),
    (0x8B1802B5, "add x21, x21, x24 - late: the schedule restarts"),
    (0x8B0D02B5, "on_time: add x21, x21, x13"),
    (0xF10006F7, "next: subs x23, x23, #1"),
    (0x54FFFE41, "b.ne page"),
    (0xB9000230, "str w16, [x17] - the letter"),
    (0x17FFFFEE, "b round"),
)
"""Each instruction, and its source for an assembler: a test assembles it again. `numbers` follow."""


def build_arm64_guest(vcpus: int = 1, working_set_bytes: int = 16 << 20, pages_per_s: int | None = None) -> bytes:
    """The ELF of a guest as `build_guest` makes it. It reads its counter's frequency itself."""
    pages = checked_pages(vcpus, working_set_bytes)
    if pages_per_s is not None and pages_per_s < 1:
        raise ValueError(f"cannot pace {pages_per_s} pages/s")
    code = b"".join(struct.pack("<I", word) for word, _ in _CODE)
    code += struct.pack("<5Q", vcpus, pages * PAGE, pages, pages_per_s or 0, RAM + FIRST_BYTE)
    size, entry = _CODE_AT + len(code), _LOAD + _CODE_AT
    elf = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 183, 1, entry, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    elf += struct.pack("<IIQQQQQQ", 1, 7, 0, _LOAD, _LOAD, size, size, _CODE_AT)
    return elf.ljust(_CODE_AT, b"\0") + code
