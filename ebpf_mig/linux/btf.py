# SPDX-License-Identifier: Apache-2.0
"""Offsets of kernel struct members, read from BTF, so that no kernel headers are needed.

In: a BTF blob (`/sys/kernel/btf/vmlinux`, or a module's with its base) and (struct, member) pairs. Out: byte offsets,
or None if this kernel has no such struct or member. Members of anonymous inner structs are found, too.
Format: Documentation/bpf/btf.rst (Linux 6.12).
"""

from __future__ import annotations

import contextlib
import functools
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ebpf_mig.errors import PreflightError

VMLINUX, KVM_MODULE = "/sys/kernel/btf/vmlinux", "/sys/kernel/btf/kvm"
VSOCK_MODULE = "/sys/kernel/btf/vsock"

Member = tuple[str, str]
"""(struct, member)."""

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_POINTER, _STRUCT, _UNION, _TYPEDEF, _FUNC, _FUNC_PROTO = 2, 4, 5, 8, 12, 13
_ALIASES = (_TYPEDEF, 9, 10, 11)
"""typedef, volatile, const and restrict: another type follows."""
_ARGUMENT = struct.Struct("=II")
# Bytes that follow the 12-byte type: fixed by kind, or per element of vlen.
_FIXED = {1: 4, 3: 12, 14: 4, 17: 4}
_PER_ELEMENT = {_STRUCT: 12, _UNION: 12, 6: 8, 13: 8, 15: 12, 19: 12}


class _Btf:
    """One parsed blob, with the position of each type record. `base` has the ids and strings that come first."""

    def __init__(self, blob: bytes, base: _Btf | None = None) -> None:
        magic, _, _, header, type_off, type_len, string_off, string_len = _HEADER.unpack_from(blob)
        if magic != _MAGIC:
            raise ValueError(f"magic is {magic:#x}, not {_MAGIC:#x}")
        self.base = base
        self.types = blob[header + type_off : header + type_off + type_len]
        self.strings = blob[header + string_off : header + string_off + string_len]
        if len(self.types) != type_len or len(self.strings) != string_len:
            raise ValueError("sections reach beyond the end of the file")
        self.first_id: int = base.end_id if base else 1
        self.first_string: int = base.end_string if base else 0
        self.records, self.names = self._scan()
        self.end_id: int = self.first_id + len(self.records)
        self.end_string: int = self.first_string + len(self.strings)

    def _scan(self) -> tuple[array[int], array[int]]:
        """Of each type: the position of its record, and that of its name in the strings."""
        records, names, at, end = array("I"), array("I"), 0, len(self.types)
        types, unpack = self.types, _TYPE.unpack_from
        while at < end:
            records.append(at)
            name, info, _ = unpack(types, at)
            names.append(name)
            kind = (info >> 24) & 31
            size = _PER_ELEMENT.get(kind)
            at += 12 + (size * (info & 0xFFFF) if size is not None else _FIXED.get(kind, 0))
        return records, names

    def string(self, offset: int) -> bytes:
        if offset < self.first_string:
            return self.base.string(offset) if self.base else b""
        at = offset - self.first_string
        return self.strings[at : self.strings.index(b"\0", at)]

    def named(self, wanted: set[bytes], of_kind: int = _STRUCT) -> dict[bytes, int]:
        """Ids of the types of one kind with these names, including those of the base."""
        found = self.base.named(wanted, of_kind) if self.base else {}
        places = self._places(wanted)
        for number, name in enumerate(self.names, self.first_id):
            if name in places and (self._record(number)[0] >> 24) & 31 == of_kind:
                found.setdefault(places[name], number)
        return found

    def _places(self, wanted: Iterable[bytes]) -> dict[int, bytes]:
        """Where these strings are. A string may also be the end of a longer one."""
        places = self.base._places(wanted) if self.base else {}
        for text in filter(None, wanted):
            at = self.strings.find(text + b"\0")
            while at >= 0:
                places[self.first_string + at] = text
                at = self.strings.find(text + b"\0", at + 1)
        return places

    def arguments(self, number: int) -> int:
        """Number of arguments of function `number`: its prototype has one entry per argument."""
        prototype = self._record(number)[1]
        info = self._record(prototype)[0]
        return info & 0xFFFF if (info >> 24) & 31 == _FUNC_PROTO else 0

    def pointers(self, number: int) -> tuple[bool, ...]:
        """Of each argument of the prototype to which typedef `number` points, whether it is a pointer."""
        prototype = self._record(self._record(number)[1])[1]
        if prototype < self.first_id or (self._record(prototype)[0] >> 24) & 31 != _FUNC_PROTO:
            return ()
        at = self.records[prototype - self.first_id] + _TYPE.size
        count = self._record(prototype)[0] & 0xFFFF
        kinds = (_ARGUMENT.unpack_from(self.types, at + _ARGUMENT.size * i)[1] for i in range(count))
        return tuple(self._is_pointer(kind) for kind in kinds)

    def _is_pointer(self, number: int) -> bool:
        for _ in range(16):
            info, following = self._record(number) if number else (0, 0)
            kind = (info >> 24) & 31
            if kind not in _ALIASES:
                return kind == _POINTER
            number = following
        return False

    def _record(self, number: int) -> tuple[int, int]:
        """(info, size or type) of a type."""
        if number < self.first_id:
            return self.base._record(number) if self.base else (0, 0)
        info, kind = _TYPE.unpack_from(self.types, self.records[number - self.first_id])[1:]
        return int(info), int(kind)

    def member(self, number: int, wanted: bytes, depth: int = 0) -> int | None:
        """Byte offset of a member of struct or union `number`; looks into anonymous ones."""
        if number < self.first_id:
            return self.base.member(number, wanted, depth) if self.base else None
        at = self.records[number - self.first_id]
        _, info, _ = _TYPE.unpack_from(self.types, at)
        if (info >> 24) & 31 not in (_STRUCT, _UNION) or depth > 16:
            return None
        for i in range(info & 0xFFFF):
            name, kind, bits = _TYPE.unpack_from(self.types, at + 12 + 12 * i)
            offset = int(bits & 0xFFFFFF if info >> 31 else bits) // 8
            if name:
                if self.string(name) == wanted:
                    return offset
                continue
            inner = self.member(kind, wanted, depth + 1)
            if inner is not None:
                return offset + inner
        return None


@functools.lru_cache(maxsize=4)
def _parsed(path: str, base: str | None) -> _Btf:
    """Parses once: vmlinux takes a twentieth of a second and about 8 MB. `forget` frees it."""
    return _Btf(Path(path).read_bytes(), _parsed(base, None) if base else None)


def forget() -> None:
    """Frees the parsed BTF; the next call parses it again."""
    _parsed.cache_clear()


def offsets(path: str, members: Sequence[Member], base: str | None = None) -> dict[Member, int | None]:
    """Byte offsets of `members` from the BTF at `path`. `base`: vmlinux's BTF if `path` is a module's.

    PreflightError if the file cannot be read or is not BTF.
    """
    with _clear_errors(path):
        btf = _parsed(path, base)
        ids = btf.named({name.encode() for name, _ in members})
        return {
            (name, member): btf.member(ids[name.encode()], member.encode()) if name.encode() in ids else None
            for name, member in members
        }


@dataclass(frozen=True)
class FunctionType:
    """A function in BTF: its id, for attaching to it, in the BTF of vmlinux or of a module."""

    btf_id: int
    arguments: int
    module: str
    """Its name; empty for vmlinux."""


def functions(path: str, names: Iterable[str], base: str | None = None) -> dict[str, FunctionType]:
    """The given functions that exist in the BTF at `path`. For a module, only its own functions count."""
    with _clear_errors(path):
        btf = _parsed(path, base)
        found = btf.named({name.encode() for name in names}, _FUNC)
        return {
            name.decode(): FunctionType(number, btf.arguments(number), Path(path).name if base else "")
            for name, number in found.items()
            if base is None or number >= btf.first_id
        }


def tracepoints(path: str, names: Iterable[str]) -> set[str]:
    """The given tracepoints that the kernel or a loaded kvm.ko has. Each has a typedef `btf_trace_NAME` in BTF."""
    with _clear_errors(path):
        wanted = {b"btf_trace_" + name.encode() for name in names}
        found = _parsed(path, None).named(wanted, _TYPEDEF)
        if path == VMLINUX and any(b"_kvm_" in name for name in wanted - found.keys()) and Path(KVM_MODULE).exists():
            found = _parsed(KVM_MODULE, path).named(wanted, _TYPEDEF)
        return {name.decode().removeprefix("btf_trace_") for name in found}


def tracepoint_arguments(path: str, name: str) -> tuple[bool, ...]:
    """Of each argument that a raw tracepoint's program gets, whether it is a pointer; empty if there is no such
    tracepoint. The first one of its prototype (`void *__data`, __BPF_DECLARE_TRACE, include/trace/bpf_probe.h) is not
    passed on.
    """
    with _clear_errors(path):
        btf, wanted = _parsed(path, None), b"btf_trace_" + name.encode()
        found = btf.named({wanted}, _TYPEDEF)
        return btf.pointers(found[wanted])[1:] if wanted in found else ()


@contextlib.contextmanager
def _clear_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PreflightError(
            f"cannot read the kernel's BTF at {path}: {error.strerror}",
            "use a kernel built with CONFIG_DEBUG_INFO_BTF=y (every Debian kernel since 11 is)",
        ) from error
    except (ValueError, struct.error, IndexError) as error:
        raise PreflightError(f"{path} is not valid BTF: {error}") from error
