# SPDX-License-Identifier: Apache-2.0
"""The tiny guest for x86-64: a PVH ELF that dirties memory at a known pace and beats on the serial port.

In: vCPUs, working set and pace. Out: the bytes of an ELF64 file that QEMU, Cloud Hypervisor and Firecracker boot in
milliseconds with no firmware, initrd or disk. Every vCPU increments one word a page over an area of its own, from
16 MiB up, and prints its letter (`A` for the first) after each round.

The boot processor enters in 32-bit protected mode without paging, stack or interrupts (Xen's PVH ABI). It wakes the
others by INIT and SIPI to a real-mode trampoline at 0x8000. The pace is kept with the TSC, so that it is the same
on hardware and where KVM emulates the guest. A guest that fell behind, or was stopped, does not catch up.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

PAGE = 4096
FIRST_BYTE = 16 << 20
"""Where the first vCPU's area begins."""

_LOAD = 0x100000
_TRAMPOLINE = 0x8000
_TRAMPOLINE_BYTES = 56
_LAPIC_SVR, _LAPIC_ICR = 0xFEE000F0, 0xFEE00300
_INIT_OTHERS, _SIPI_OTHERS = 0xC4500, 0xC4600 | _TRAMPOLINE >> 12
_WAKE_DELAY = 200_000
_PHYS32_ENTRY = 18
_BEAT = "89e8 66ba f803 ee"
"""mov eax, ebp; mov dx, COM1; out dx, al: the vCPU's letter."""


@dataclass
class _Code:
    """A minimal assembler: bytes, and labels that are resolved at the end."""

    base: int
    data: bytearray = field(default_factory=bytearray)
    labels: dict[str, int] = field(default_factory=dict)
    fixups: list[tuple[int, str, int]] = field(default_factory=list)

    def label(self, name: str) -> None:
        self.labels[name] = self.base + len(self.data)

    def op(self, code: str, *values: int | str) -> None:
        """Hex bytes, then 32-bit values or the absolute addresses of labels."""
        self.data += bytes.fromhex(code)
        for value in values:
            if isinstance(value, str):
                self.fixups.append((len(self.data), value, 4))
            self.data += struct.pack("<I", 0 if isinstance(value, str) else value)

    def jump(self, code: str, target: str) -> None:
        """A short jump: opcode, then the distance to a label."""
        self.data += bytes.fromhex(code)
        self.fixups.append((len(self.data), target, 1))
        self.data += b"\0"

    def finish(self) -> bytes:
        for at, name, size in self.fixups:
            if size == 4:
                struct.pack_into("<I", self.data, at, self.labels[name])
            else:
                struct.pack_into("<b", self.data, at, self.labels[name] - (self.base + at + 1))
        return bytes(self.data)


def _wake_others(c: _Code) -> None:
    """Copies the trampoline below 1 MiB and sends INIT, then SIPI, to all processors but this one."""
    c.op("be", "trampoline")  # mov esi, trampoline
    c.op("bf", _TRAMPOLINE)  # mov edi
    c.op("b9", _TRAMPOLINE_BYTES)  # mov ecx
    c.op("f3a4")  # rep movsb
    c.op("c705", _LAPIC_SVR, 0x1FF)  # mov dword [SVR], enable
    for i, command in enumerate((_INIT_OTHERS, _SIPI_OTHERS)):
        c.op("c705", _LAPIC_ICR, command)
        c.op("b9", _WAKE_DELAY)  # mov ecx
        c.label(f"wait{i}")
        c.op("49")  # dec ecx
        c.jump("75", f"wait{i}")  # jnz


def _trampoline(c: _Code) -> None:
    """16-bit code, run at 0x8000: into protected mode with flat segments, then to `ap`."""
    start = len(c.data)
    c.label("trampoline")
    c.op("fa")  # cli
    gdt_pointer = start + 26
    c.op("66 2e 0f 01 16")  # lgdt cs:[...]
    c.data += struct.pack("<H", gdt_pointer - start)
    c.op("0f20c0 0c01 0f22c0")  # mov eax, cr0; or al, 1; mov cr0, eax
    c.op("66 ea", "ap")  # jmp 8:ap
    c.data += struct.pack("<H", 8)
    c.data += b"\x90" * (gdt_pointer - len(c.data))
    c.data += struct.pack("<HI", 23, _TRAMPOLINE + gdt_pointer + 6 - start)
    c.data += struct.pack("<QQQ", 0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF)
    assert len(c.data) - start == _TRAMPOLINE_BYTES  # noqa: S101 - what _wake_others copies


def _wait_for_turn(c: _Code, cycles: int) -> None:
    """Spins on the TSC until `esp:edi`, then sets the next deadline. More than a page late restarts the schedule.

    There is no stack, so `esp` is free. Both halves are needed: the low one alone wraps in about a second.
    """
    c.label("spin")
    c.op("0f31")  # rdtsc
    c.op("29f8 19e2")  # sub eax, edi; sbb edx, esp
    c.jump("78", "spin")  # js
    c.jump("75", "late")  # jnz: of edx
    c.op("3d", cycles)  # cmp eax, cycles
    c.jump("72", "on_time")  # jb
    c.label("late")
    c.op("01c7 11d4")  # add edi, eax; adc esp, edx
    c.label("on_time")
    c.op("81c7", cycles)  # add edi, cycles
    c.op("83d400")  # adc esp, 0


def _work(c: _Code, pages: int, cycles: int | None) -> None:
    """Writes each page once, without a pace, and then the endless loop of each processor. `counter` assigns the
    indices."""
    c.label("work")
    c.op("b8", 1)  # mov eax, 1
    c.op("f00fc105", "counter")  # lock xadd [counter], eax
    c.op("8d6841")  # lea ebp, [eax+'A']
    c.op("69d8", pages * PAGE)  # imul ebx, eax, area
    c.op("81c3", FIRST_BYTE)  # add ebx
    c.op("89de")  # mov esi, ebx
    c.op("b9", pages)  # mov ecx
    c.label("fill")
    c.op("ff06")  # inc dword [esi]
    c.op("81c6", PAGE)  # add esi
    c.op("49")  # dec ecx
    c.jump("75", "fill")  # jnz
    c.op(_BEAT)
    c.op("0f31 89c7 89d4")  # rdtsc; mov edi, eax; mov esp, edx
    c.label("round")
    c.op("89de")  # mov esi, ebx
    c.op("b9", pages)  # mov ecx
    c.label("page")
    c.op("ff06")  # inc dword [esi]
    c.op("81c6", PAGE)  # add esi
    if cycles is not None:
        _wait_for_turn(c, cycles)
    c.op("49")  # dec ecx
    c.jump("75", "page")  # jnz
    c.op(_BEAT)
    c.jump("eb", "round")  # jmp


def _code(vcpus: int, pages: int, cycles: int | None) -> tuple[bytes, int]:
    c = _Code(_LOAD + 0x1000)
    c.op("fc")  # cld
    if vcpus > 1:
        _wake_others(c)
    c.jump("eb", "work")
    c.label("ap")
    c.op("66b81000 8ed8 8ec0")  # mov ax, 0x10; mov ds, ax; mov es, ax
    _work(c, pages, cycles)
    _trampoline(c)
    c.data += bytes(-len(c.data) % 4)  # a lock across cache lines is a split lock, which hosts punish
    c.label("counter")
    c.data += bytes(4)
    return c.finish(), c.base


def checked_pages(vcpus: int, working_set_bytes: int) -> int:
    """The pages of a working set; ValueError if the numbers are out of range."""
    pages = working_set_bytes // PAGE
    if not 1 <= vcpus <= 26:
        raise ValueError("1 to 26 vCPUs: each has a letter")
    if pages < 1 or FIRST_BYTE + vcpus * pages * PAGE > 3 << 30:
        raise ValueError("the working sets must be at least a page each and fit below 3 GiB")
    return pages


def build_guest(
    vcpus: int = 1, working_set_bytes: int = 16 << 20, pages_per_s: int | None = None, tsc_khz: int = 0
) -> bytes:
    """The ELF of a guest whose vCPUs each dirty `working_set_bytes`, at most `pages_per_s` pages a second each.

    `pages_per_s` None: as fast as possible; otherwise `tsc_khz` must be the TSC frequency that the guest will see. The
    guest needs `FIRST_BYTE + vcpus * working_set_bytes` of memory. ValueError if the numbers are out of range.
    """
    pages = checked_pages(vcpus, working_set_bytes)
    cycles = None
    if pages_per_s is not None:
        cycles = tsc_khz * 1000 // pages_per_s
        if not 0 < cycles < 1 << 31:
            raise ValueError(f"cannot pace {pages_per_s} pages/s with a TSC of {tsc_khz} kHz")
    code, entry = _code(vcpus, pages, cycles)
    note = struct.pack("<III4sI", 4, 4, _PHYS32_ENTRY, b"Xen\0", entry)
    headers = 64 + 2 * 56
    elf = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, entry, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    size = 0x1000 + len(code)
    elf += struct.pack("<IIQQQQQQ", 1, 7, 0, _LOAD, _LOAD, size, size, 0x1000)
    elf += struct.pack("<IIQQQQQQ", 4, 4, headers, _LOAD + headers, _LOAD + headers, len(note), len(note), 4)
    return (elf + note).ljust(0x1000, b"\0") + code
