# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-untyped, import-not-found"
# pyelftools is needed only for user-space stacks; its versions before 0.33 have no types.
"""What an executable file says of itself: its build ID, its functions, who called whom, and if it has frame pointers.

In: an open ELF file of x86-64. Out: an `Elf`. Tables are read when they are first needed.

Formats: System V ABI (symbol tables, notes), Linux Standard Base 5.0, Core, 10.6 (.eh_frame, .eh_frame_hdr).
"""

from __future__ import annotations

import io
import re
import struct
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from ebpf_mig.errors import PreflightError

DEBUG_FILES = Path("/usr/lib/debug/.build-id")
RETURN_ADDRESS = 16
"""Its number among the registers of x86-64 (System V ABI, AMD64 supplement, figure 3.36)."""
_SYMBOL = struct.Struct("<IBBHQQ")
_FUNCTIONS = (2, 10)
"""STT_FUNC, STT_GNU_IFUNC."""
_ENTRY = struct.Struct("<ii")
_USUAL_TABLE = 0x3B
"""Encoding of the search table: signed, 4 bytes, relative to the section."""
_ARGS_SIZE = 0x2E
"""DW_CFA_GNU_args_size: how much of the stack a call's arguments take."""
_RUST = (("$LT$", "<"), ("$GT$", ">"), ("$RF$", "&"), ("$C$", ","), ("$u20$", " "), ("$u7b$", "{"), ("$u7d$", "}"),
         ("..", "::"))  # fmt: skip
_PROLOGUE = re.compile(rb"(\xf3\x0f\x1e\xfa)?\x55(\x48\x89\xe5|\x48\x8b\xec)", re.DOTALL)
"""[endbr64;] push %rbp; mov %rsp,%rbp"""
_FRAME = re.compile(rb"(\xf3\x0f\x1e\xfa)?([\x53\x55]|\x41[\x54-\x57]|\x48[\x81\x83]\xec)", re.DOTALL)
"""The beginning of a function with a frame: it saves a register, or makes room on the stack."""
_LOOKED_AT = 4000
"""Functions whose first instructions are looked at."""
_KEEPS = 0.5
"""A program keeps frame pointers if at least this share of its functions with a frame begins with setting one up."""


def require_pyelftools() -> Any:
    """PreflightError if pyelftools is missing."""
    try:
        import elftools.elf.elffile as found
    except ImportError as error:
        why = f"user-space stacks need pyelftools, which this Python cannot import: {error}"
        raise PreflightError(why, "apt-get install python3-pyelftools, or leave out --user-stacks") from error
    return found


@dataclass(frozen=True, slots=True)
class Rules:
    """How to find the caller's registers at one instruction."""

    register: int
    """The canonical frame address (CFA) is this register plus `offset`."""
    offset: int
    saved: dict[int, int]
    """Where registers were saved, relative to the CFA, by number."""
    ends: bool
    """There is no caller."""


class Elf:
    """One file. ValueError if it is no ELF file of x86-64 that can be read."""

    def __init__(self, file: BinaryIO) -> None:
        module = require_pyelftools()
        try:
            self._elf = module.ELFFile(file)
            if self._elf["e_machine"] != "EM_X86_64":
                raise ValueError("not of x86-64")
            loads = [s.header for s in self._elf.iter_segments() if s["p_type"] == "PT_LOAD"]
        except Exception as error:  # whatever a damaged file makes the library raise
            raise ValueError(f"no readable ELF file: {error}") from error
        self._file = file
        self._loads = [(h.p_offset, h.p_filesz, h.p_vaddr, bool(h.p_flags & 1)) for h in loads]
        self._rules: dict[int, tuple[int, list[tuple[int, Rules | None]]]] = {}

    @cached_property
    def bias(self) -> int:
        """What to add to an offset in the executable part of the file for its address."""
        return next((address - offset for offset, _, address, executable in self._loads if executable), 0)

    @cached_property
    def build_id(self) -> str:
        """Hexadecimal digits; empty without one."""
        section = self._section(".note.gnu.build-id")
        if section is None or len(section[1]) < 16:
            return ""
        name, size, _ = struct.unpack_from("<III", section[1])
        begin = 12 + (name + 3 & ~3)
        return section[1][begin : begin + size].hex()

    @cached_property
    def functions(self) -> list[tuple[int, int, str]]:
        """(address, size, name) of each named function, in order: of .symtab and of .dynsym."""
        found: dict[int, tuple[int, int, str]] = {}
        for table, names in ((".dynsym", ".dynstr"), (".symtab", ".strtab")):
            symbols, texts = self._section(table), self._section(names)
            if symbols is None or texts is None:
                continue
            whole = symbols[1][: len(symbols[1]) // _SYMBOL.size * _SYMBOL.size]
            for name, info, _, where, address, size in _SYMBOL.iter_unpack(whole):
                if info & 15 in _FUNCTIONS and where and address:
                    end = texts[1].find(b"\0", name)
                    found[address] = address, size, _readable(texts[1][name:end].decode("utf-8", "replace"))
        return sorted(found.values())

    def function(self, address: int) -> str:
        """The name of the function that has this address; empty if none has."""
        at = bisect_right(self.functions, (address, 1 << 64, "")) - 1
        if at < 0:
            return ""
        begin, size, name = self.functions[at]
        return name if address < begin + max(size, 1) else ""

    @cached_property
    def frame_pointers(self) -> bool | None:
        """Whether its functions keep a frame pointer; None if no function is known."""
        starts = sorted({begin for begin, _ in self._frames} | {begin for begin, *_ in self.functions})
        some = starts[:: max(1, len(starts) // _LOOKED_AT)]
        codes = [code for begin in some if _FRAME.match(code := self._code(begin))]
        if not codes:
            return None
        return sum(_PROLOGUE.match(code) is not None for code in codes) >= _KEEPS * len(codes)

    def rules(self, address: int) -> Rules | None:
        """How to find the caller of the instruction at an address; None if the file does not say."""
        at = bisect_right(self._frames, (address, 1 << 64)) - 1
        if at < 0:
            return None
        begin, place = self._frames[at]
        if place not in self._rules:
            try:
                self._rules[place] = self._decoded(place)
            except Exception:  # the tables are part of a file that may be damaged
                self._rules[place] = 0, []
        size, rows = self._rules[place]
        if address >= begin + size:
            return None
        row = bisect_right([relative for relative, _ in rows], address - begin) - 1
        return rows[row][1] if row >= 0 else None

    def _code(self, address: int) -> bytes:
        for offset, size, begin, executable in self._loads:
            if executable and begin <= address < begin + size:
                self._file.seek(offset + address - begin)
                return self._file.read(12)
        return b""

    def _section(self, name: str) -> tuple[int, bytes] | None:
        """(address, content)"""
        try:
            section = self._elf.get_section_by_name(name)
            return (
                None if section is None or section["sh_type"] == "SHT_NOBITS" else (section["sh_addr"], section.data())
            )
        except Exception:  # whatever a damaged file makes the library raise
            return None

    @cached_property
    def _unwind(self) -> tuple[int, bytes] | None:
        return self._section(".eh_frame")

    @cached_property
    def _frames(self) -> list[tuple[int, int]]:
        """(begin of the function, place of its entry in .eh_frame), in order, from the search table."""
        header = self._section(".eh_frame_hdr")
        if header is None or self._unwind is None or header[1][:1] != b"\1" or header[1][3:4] != bytes([_USUAL_TABLE]):
            return []
        address, content = header
        table = content[12 : 12 + (len(content) - 12) // _ENTRY.size * _ENTRY.size]
        return sorted(
            (address + begin, address + place - self._unwind[0]) for begin, place in _ENTRY.iter_unpack(table)
        )

    def _decoded(self, place: int) -> tuple[int, list[tuple[int, Rules | None]]]:
        """(size of the function, its rows: offset in the function, rules), from one entry of .eh_frame.

        The library reads whole sections only, so it is given one with this entry and what it refers to.
        """
        from elftools.dwarf.callframe import FDE, CallFrameInfo
        from elftools.dwarf.structs import DWARFStructs

        assert self._unwind is not None  # noqa: S101 - `_frames` is empty without it
        content = self._unwind[1]
        back = struct.unpack_from("<I", content, place + 4)[0]
        common, own = _entry(content, place + 4 - back), _entry(content, place)
        text = common + own[:4] + struct.pack("<I", len(common) + 4) + own[8:] + b"\0\0\0\0"
        structs = DWARFStructs(little_endian=True, dwarf_format=32, address_size=8)
        info = CallFrameInfo(io.BytesIO(text), len(text), 0, structs, for_eh_frame=True)
        entry = next(entry for entry in info.get_entries() if isinstance(entry, FDE))
        # The library reads this instruction and does not know what to do with it: nothing, for our purpose.
        entry.instructions = [one for one in entry.instructions if one.opcode != _ARGS_SIZE]
        first = entry.header["initial_location"]
        return entry.header["address_range"], [(r["pc"] - first, _rules(r)) for r in entry.get_decoded().table]


def _entry(content: bytes, at: int) -> bytes:
    size = struct.unpack_from("<I", content, at)[0]
    if at < 0 or size in (0, 0xFFFFFFFF) or at + 4 + size > len(content):
        raise ValueError("no entry")
    return content[at : at + 4 + size]


def _rules(row: dict[Any, Any]) -> Rules | None:
    """None where an expression would have to be evaluated, as in the procedure linkage table."""
    cfa = row["cfa"]
    if cfa.reg is None:
        return None
    kinds = {number: rule for number, rule in row.items() if isinstance(number, int)}
    ends = RETURN_ADDRESS in kinds and kinds[RETURN_ADDRESS].type == "UNDEFINED"
    saved = {number: rule.arg for number, rule in kinds.items() if rule.type == "OFFSET"}
    return Rules(cfa.reg, cfa.offset, saved, ends)


def _readable(name: str) -> str:
    """`vmm::vm::Vm::pause` for Rust's `_ZN3vmm2vm2Vm5pause17h0123456789abcdefE`; other names stay."""
    if not name.startswith("_ZN") or not name.endswith("E"):
        return name.partition("@")[0].removeprefix("__GI_")  # how glibc names its own copy of a function
    parts, rest = [], name[3:-1]
    while match := re.match(r"\d+", rest):
        begin, size = match.end(), int(match[0])
        if begin + size > len(rest):
            return name
        parts.append(rest[begin : begin + size])
        rest = rest[begin + size :]
    if rest or not parts:
        return name
    if re.fullmatch(r"h[0-9a-f]{16}", parts[-1]):
        parts.pop()
    for word, text in _RUST:
        parts = [part.replace(word, text) for part in parts]
    return "::".join(part.removeprefix("_") if part.startswith("_<") else part for part in parts)


def debug_file(build_id: str) -> Path | None:
    """The file with the symbols of a stripped program, as distributions install it; None if there is none."""
    path = DEBUG_FILES / build_id[:2] / f"{build_id[2:]}.debug"
    return path if build_id and path.is_file() else None
