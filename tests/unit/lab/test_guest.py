# SPDX-License-Identifier: Apache-2.0
"""The tiny guest's ELF, read back by its definitions. That it runs is for tests/integration/test_lab_qemu.py."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpf_mig.errors import UsageError
from ebpf_mig.lab.guest import FIRST_BYTE, PAGE, build_guest
from ebpf_mig.lab.scenario import MIB, Scenario

LOAD, NOTE = 1, 4


@dataclass
class Elf:
    """The parts of an ELF64 that a PVH loader looks at."""

    data: bytes
    entry: int
    segments: dict[int, tuple[int, int, int, int]]
    """By type: file offset, physical address, bytes in the file, bytes in memory."""

    def at(self, address: int, size: int) -> bytes:
        offset, physical, filesz, _ = self.segments[LOAD]
        assert physical <= address and address + size <= physical + filesz
        return self.data[offset + address - physical :][:size]


def parse(data: bytes) -> Elf:
    ident, kind, machine, version, entry, phoff, *_rest, phentsize, phnum, _, _, _ = struct.unpack_from(
        "<16sHHIQQQIHHHHHH", data
    )
    assert ident[:7] == b"\x7fELF\x02\x01\x01", "64 bits, little endian, version 1"
    assert (kind, machine, version, phentsize) == (2, 62, 1, 56), "an x86-64 executable"
    segments = {}
    for i in range(phnum):
        p_type, _, offset, _, physical, filesz, memsz, _ = struct.unpack_from("<IIQQQQQQ", data, phoff + i * phentsize)
        assert offset + filesz <= len(data) and filesz <= memsz
        segments[p_type] = (offset, physical, filesz, memsz)
    return Elf(data, entry, segments)


@given(st.integers(1, 26), st.integers(1, 4096), st.none() | st.integers(1, 10**6), st.integers(500_000, 2_000_000))
def test_any_guest_is_a_pvh_elf(vcpus: int, pages: int, pace: int | None, khz: int) -> None:
    pace = pace if pace is None or khz * 1000 // pace < 1 << 31 else 1000
    elf = parse(build_guest(vcpus, pages * PAGE, pace, khz))
    offset, physical, filesz, _ = elf.segments[LOAD]
    assert physical == 1 << 20 and physical + filesz < FIRST_BYTE
    at, _, size, _ = elf.segments[NOTE]
    namesz, descsz, kind = struct.unpack_from("<III", elf.data, at)
    assert (namesz, descsz, kind, size) == (4, 4, 18, 20), "XEN_ELFNOTE_PHYS32_ENTRY"
    assert elf.data[at + 12 : at + 16] == b"Xen\0"
    assert struct.unpack_from("<I", elf.data, at + 16)[0] == elf.entry
    assert elf.at(elf.entry, 1) == b"\xfc", "the entry is the first instruction, cld"
    assert offset + filesz == len(elf.data) <= 8192


def test_the_trampoline_leads_to_32_bit_code() -> None:
    """Position-dependent by hand: the GDT pointer must be right after the copy to 0x8000."""
    elf = parse(build_guest(vcpus=4))
    code = elf.at(elf.entry, elf.segments[LOAD][2] - 0x1000)
    source, size = struct.unpack("<x I x I x I", code[1:16])[0], struct.unpack_from("<I", code, 12)[0]
    trampoline = elf.at(source, size)
    assert struct.unpack_from("<I", code, 7)[0] == 0x8000
    assert trampoline[:6] == bytes.fromhex("fa 66 2e 0f 01 16"), "cli; lgdt cs:[disp16]"
    pointer = struct.unpack_from("<H", trampoline, 6)[0]
    limit, base = struct.unpack_from("<HI", trampoline, pointer)
    gdt = trampoline[base - 0x8000 :][: limit + 1]
    null, flat_code, flat_data = struct.unpack("<QQQ", gdt)
    assert (null, flat_code, flat_data) == (0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF)
    jump = trampoline.index(bytes.fromhex("66 ea"))
    target, selector = struct.unpack_from("<IH", trampoline, jump + 2)
    assert selector == 8
    assert elf.at(target, 4) == bytes.fromhex("66 b8 10 00"), "mov ax, 0x10: the data selector"


def test_one_vcpu_wakes_nobody() -> None:
    icr = struct.pack("<I", 0xFEE00300)
    assert icr not in build_guest(vcpus=1)
    assert build_guest(vcpus=2).count(icr) == 2, "INIT and SIPI"


def test_the_numbers_are_in_the_code() -> None:
    paced = build_guest(2, 3 * MIB, pages_per_s=1000, tsc_khz=2_000_000)
    cycles = struct.pack("<I", 2_000_000)
    assert paced.count(cycles) == 2, "compared with, and added to the turn"
    assert struct.pack("<I", 3 * MIB) in paced and struct.pack("<I", 3 * MIB // PAGE) in paced
    assert cycles not in build_guest(2, 3 * MIB)


def test_counter_is_aligned() -> None:
    """A locked add across cache lines is a split lock."""
    for vcpus, pace in itertools.product((1, 2), (None, 1000)):
        assert len(build_guest(vcpus, MIB, pace, 2_000_000)) % 4 == 0


@pytest.mark.parametrize(
    ("vcpus", "working_set", "pace", "khz"),
    [
        (0, MIB, None, 0),
        (27, MIB, None, 0),
        (1, PAGE - 1, None, 0),
        (1, 0, None, 0),
        (2, 2 << 30, None, 0),
        (1, MIB, 1000, 0),
        (1, MIB, 1, 3_000_000),
        (1, MIB, 10**10, 3_000_000),
    ],
)
def test_numbers_that_make_no_guest(vcpus: int, working_set: int, pace: int | None, khz: int) -> None:
    with pytest.raises(ValueError, match=r"vCPUs|working sets|pace"):
        build_guest(vcpus, working_set, pace, khz)


def test_a_working_set_larger_than_the_memory() -> None:
    with pytest.raises(UsageError, match="do not fit") as caught:
        Scenario(memory_bytes=128 * MIB, working_set_bytes=64 * MIB, vcpus=2).guest()
    assert caught.value.remedy == "use --memory 144MiB or more"


def test_a_large_guest_is_waited_for() -> None:
    """The first beat comes once it has written all of its memory, which is not paced."""
    assert Scenario(working_set_bytes=64 << 30, pages_per_s=1).fill_s() > 60
    assert Scenario(working_set_bytes=4 * MIB, pages_per_s=1).fill_s() < 1
