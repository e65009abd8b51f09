# SPDX-License-Identifier: Apache-2.0
"""Descriptions of the key and leaf types of a table, so that a process without bcc can rebuild them.

In: a ctypes type that bcc made from the C code. Out: a `LeafType`, and from it an equal ctypes type: the same member
names and signedness, with nested structs and arrays.
"""

from __future__ import annotations

import ctypes
from typing import Any

import msgspec

_INTEGERS: dict[tuple[int, bool], Any] = {
    (ctypes.sizeof(kind), kind(-1).value < 0): kind
    for kind in (
        *(ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64),
        *(ctypes.c_int8, ctypes.c_int16, ctypes.c_int32, ctypes.c_int64),
    )
}


class LeafType(msgspec.Struct, frozen=True):
    """An integer, an array or a struct. Any other type is treated as bytes."""

    size: int
    """Size in bytes."""
    signed: bool = False
    element: LeafType | None = None
    """The element type of an array."""
    members: list[tuple[str, int, LeafType]] = []
    """(name, offset, type) of each member of a struct."""

    def ctype(self) -> Any:
        """Builds the ctypes type."""
        if self.element is not None:
            return self.element.ctype() * (self.size // self.element.size)
        if not self.members:
            return _INTEGERS.get((self.size, self.signed)) or ctypes.c_uint8 * self.size
        fields: list[tuple[str, Any]] = []
        end = 0
        for name, offset, kind in self.members:
            if offset > end:
                fields.append((f"_pad{end}", ctypes.c_uint8 * (offset - end)))
            fields.append((name, kind.ctype()))
            end = offset + kind.size
        if end < self.size:
            fields.append((f"_pad{end}", ctypes.c_uint8 * (self.size - end)))
        return type("Leaf", (ctypes.Structure,), {"_pack_": 1, "_layout_": "ms", "_fields_": fields})


def describe(ctype: Any) -> LeafType:
    """Describes a ctypes type."""
    size = ctypes.sizeof(ctype)
    if issubclass(ctype, ctypes.Structure):
        members = [(name, getattr(ctype, name).offset, describe(kind)) for name, kind, *_ in ctype._fields_]
        return LeafType(size, members=members)
    if issubclass(ctype, ctypes.Array):
        return LeafType(size, element=describe(ctype._type_))
    simple = issubclass(ctype, ctypes._SimpleCData)
    return LeafType(size, signed=simple and isinstance(ctype().value, int) and ctype(-1).value < 0)
