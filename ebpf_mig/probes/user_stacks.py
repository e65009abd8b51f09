# SPDX-License-Identifier: Apache-2.0
"""Finds the user-space functions in which threads slept, when the recording ends.

In: `user_stack_record`s (registers and the words above the stack pointer), and the files that the processes execute.
Out: `UserStack` and `Module` events. Words of the stack are never stored.

A caller is found by the program's unwind tables (.eh_frame), which exist without frame pointers, too. Without such a
table for an instruction, the frame pointer is used if the program keeps them. Otherwise the stack ends there, and its
`end` says so. Nothing is done during the migration but to keep the records.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ebpf_mig.linux import clock, procfs
from ebpf_mig.linux.elf import RETURN_ADDRESS, Elf, debug_file, require_pyelftools
from ebpf_mig.recording.events import AnyEvent, Module, UserStack
from ebpf_mig.recording.kinds import BY_TYPE

_RECORD = BY_TYPE[UserStack].record
assert _RECORD is not None  # noqa: S101
NUMBER = _RECORD.number
MOST_KEPT = 4000
"""Records of 4 KiB that are kept, the latest."""
MOST_FRAMES = 48
_FRAME, _STACK = 6, 7
"""rbp and rsp."""
_OF_PT_REGS = (10, 12, 11, 5, 13, 14, 4, 19, 9, 8, 7, 6, 3, 2, 1, 0, 16)
"""Index in `struct pt_regs` of each register, by its DWARF number (arch/x86/include/asm/ptrace.h)."""


class _Mapping(NamedTuple):
    begin: int
    end: int
    offset: int
    key: tuple[str, str]
    """Device and inode."""


@dataclass
class _File:
    """An executed file. Its functions are read when they are first needed."""

    number: int
    path: str
    elf: Elf | None
    debug: Elf | None = None

    def __post_init__(self) -> None:
        if self.elf is not None and (found := debug_file(self.elf.build_id)):
            with contextlib.suppress(OSError, ValueError):
                self.debug = Elf(found.open("rb"))

    def function(self, address: int) -> str:
        """The name; empty if neither the file nor its debug file has one."""
        return next((name for one in (self.debug, self.elf) if one and (name := one.function(address))), "")


@dataclass
class _Memory:
    """The executable memory of a process, each time that it was read."""

    snapshots: list[tuple[int, list[_Mapping]]] = field(default_factory=list)
    files: dict[tuple[str, str], _File] = field(default_factory=dict)

    def at(self, instant: int) -> list[_Mapping]:
        """As it was read last before an instant, or else first after it."""
        before = [mappings for read_ns, mappings in self.snapshots if read_ns <= instant]
        return before[-1] if before else self.snapshots[0][1] if self.snapshots else []


class UserStacks:
    """Keeps the records of a run, and finds their functions at its end. PreflightError without pyelftools."""

    def __init__(self) -> None:
        require_pyelftools()
        self._memory: dict[int, _Memory] = {}
        self._records: deque[bytes] = deque(maxlen=MOST_KEPT)

    def prepare(self, pids: Iterable[int]) -> None:
        """Notes and opens the files that the processes execute: a process may end before the recording does."""
        for pid in pids:
            memory = self._memory.setdefault(pid, _Memory())
            mappings = list(_executable(pid, memory.files))
            if mappings:
                memory.snapshots.append((clock.monotonic_ns(), mappings))

    def take(self, record: bytes) -> bool:
        """Whether it is one of ours; it is kept then."""
        if int.from_bytes(record[:8], "little") != NUMBER:
            return False
        self._records.append(record)
        return True

    def events(self) -> list[AnyEvent]:
        """All stacks and the files in them."""
        self.prepare(self._memory)
        assert _RECORD is not None  # noqa: S101
        read = _RECORD.layout.reader("at_ns", "pid", "tid", "regs", "words", "stack")
        found: list[AnyEvent] = []
        used: dict[tuple[int, int], _File] = {}
        for record in self._records:
            at_ns, pid, tid, regs, words, stack = read(record)
            memory = self._memory.get(pid, _Memory())
            frames, end = _unwound(memory, at_ns, regs, stack[:words])
            used |= {(pid, file.number): file for file, _ in frames}
            names = tuple(file.function(offset + file.elf.bias) if file.elf else "" for file, offset in frames)
            numbers, offsets = tuple(file.number for file, _ in frames), tuple(offset for _, offset in frames)
            found.append(UserStack(at_ns, pid, tid, names, numbers, offsets, end))
        return [*(_module(pid, file) for (pid, _), file in sorted(used.items(), key=lambda item: item[0])), *found]


def _module(pid: int, file: _File) -> Module:
    if file.elf is None:
        return Module(pid, file.number, path=file.path)
    keeps = file.elf.frame_pointers
    return Module(pid, file.number, file.elf.build_id, file.path, file.elf.bias, -1 if keeps is None else int(keeps))


def _executable(pid: int, files: dict[tuple[str, str], _File]) -> Iterable[_Mapping]:
    """The executable mappings of files; new files are added."""
    with contextlib.suppress(OSError):
        for line in procfs.lines(pid, "maps"):
            span, rights, offset, device, inode, *path = procfs.decoded(line).split(None, 5)
            if "x" not in rights or inode == "0":
                continue
            key = device, inode
            begin, _, end = span.partition("-")
            if key not in files:
                name = path[0].strip() if path else ""
                files[key] = _File(len(files), name, _opened(pid, span, name))
            yield _Mapping(int(begin, 16), int(end, 16), int(offset, 16), key)


def _opened(pid: int, span: str, name: str) -> Elf | None:
    """The mapped file itself, also if it was deleted; by its path where the kernel does not give it."""
    for path in (procfs.path(pid, "map_files", span), procfs.path(pid, "root") + name):
        with contextlib.suppress(OSError, ValueError):
            return Elf(Path(path).open("rb"))
    return None


def _unwound(
    memory: _Memory, at_ns: int, regs: tuple[int, ...], stack: tuple[int, ...]
) -> tuple[list[tuple[_File, int]], str]:
    """The frames (file, offset in it), innermost first, and why there are no more."""
    registers = {number: regs[index] for number, index in enumerate(_OF_PT_REGS)}
    begin, mappings = registers[_STACK], memory.at(at_ns)
    words = {begin + 8 * index: word for index, word in enumerate(stack)}
    frames: list[tuple[_File, int]] = []
    while len(frames) < MOST_FRAMES:
        # The innermost instruction is the next one to run. The others are behind a call, which may be the last of its
        # function.
        at = registers[RETURN_ADDRESS] - (1 if frames else 0)
        where = next((m for m in mappings if m.begin <= at < m.end), None)
        if where is None:
            return frames, "" if registers[RETURN_ADDRESS] == 0 else "code without a file"
        file = memory.files[where.key]
        offset = at - where.begin + where.offset
        frames.append((file, offset))
        if file.elf is None:
            return frames, "the file could not be read"
        caller = _caller(file.elf, offset + file.elf.bias, registers, words)
        if not isinstance(caller, dict):
            return frames, caller
        registers = caller
    return frames, "more frames"


def _caller(elf: Elf, address: int, registers: Mapping[int, int], words: Mapping[int, int]) -> dict[int, int] | str:
    """The caller's registers; or why they are not known, empty if there is no caller."""
    rules = elf.rules(address)
    if rules is not None and rules.ends:
        return ""
    if rules is not None and rules.register in registers:
        frame = registers[rules.register] + rules.offset
        saved = rules.saved
    elif elf.frame_pointers:
        frame, saved = registers[_FRAME] + 16, {_FRAME: -16, RETURN_ADDRESS: -8}
    else:
        return "unavailable: no frame pointers"
    found = dict(registers)
    for number, offset in saved.items():
        word = words.get(frame + offset)
        if word is None:
            return "more than 4 KiB of stack"
        found[number] = word
    if frame <= registers[_STACK] or RETURN_ADDRESS not in saved:
        return "the stack is not as its tables say"
    return found | {_STACK: frame}
