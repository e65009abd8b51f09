# SPDX-License-Identifier: Apache-2.0
"""The layout of a struct that the BPF programs write and Python reads.

In: the fields of the struct, declared as in C. Out: a `Layout`, which unpacks the bytes of the struct and returns
values by field name. `probes/contract.py` compares each layout with the C struct when a program is compiled.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

WORD = 8
"""Bytes of every field, or of each element of an array."""
_TYPES = {"u64": False, "s64": True}
_NAME = re.compile(r"(\w+)(?:\[(\d+)\])?")


@dataclass(frozen=True)
class Field:
    """One member of the struct."""

    name: str
    signed: bool
    at: int
    """Index of its first word."""
    length: int | None = None
    """Number of elements; None if it is not an array."""

    @property
    def words(self) -> int:
        """Its size in words of 64 bits."""
        return 1 if self.length is None else self.length


@dataclass(frozen=True)
class Layout:
    """A struct of u64 and s64 members and arrays of them."""

    struct: str
    """The name of the C struct."""
    declaration: str
    """Its members as in C: `u64 kind, at_ns; s64 ret; u64 frames[24]`."""

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """The members in order. ValueError if the declaration is invalid."""
        fields: list[Field] = []
        at = 0
        for statement in self.declaration.split(";"):
            type_name, _, names = statement.strip().partition(" ")
            for name in names.split(","):
                match = _NAME.fullmatch(name.strip())
                if type_name not in _TYPES or match is None:
                    raise ValueError(f"struct {self.struct}: {statement.strip()!r} declares no field")
                length = None if match[2] is None else int(match[2])
                fields.append(Field(match[1], _TYPES[type_name], at, length))
                at += fields[-1].words
        return tuple(fields)

    @property
    def size(self) -> int:
        """Bytes of the whole struct."""
        return WORD * sum(field.words for field in self.fields)

    def reader(self, *names: str) -> Callable[[bytes], tuple[Any, ...]]:
        """A function from the struct's bytes to the values of these fields, at least two; arrays become tuples.

        KeyError if there is no such field. The function raises struct.error if the bytes have a wrong size.
        """
        unpack = struct.Struct("=" + "".join(f"{f.words}{'q' if f.signed else 'Q'}" for f in self.fields)).unpack
        places = {f.name: f.at if f.length is None else slice(f.at, f.at + f.words) for f in self.fields}
        pick = itemgetter(*(places[name] for name in names))
        return lambda data: pick(unpack(data))
