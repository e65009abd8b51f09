# SPDX-License-Identifier: Apache-2.0
"""A table's types survive the transfer to another process: same members, same offsets, same signedness."""

from __future__ import annotations

import ctypes

import msgspec

from ebpf_mig.probes.leaf_types import LeafType, describe


class Inner(ctypes.Structure):
    _fields_ = [("small", ctypes.c_uint8), ("wide", ctypes.c_int64)]


class Outer(ctypes.Structure):
    _fields_ = [
        ("word", ctypes.c_uint32),
        ("signed", ctypes.c_int64),
        ("array", ctypes.c_uint64 * 3),
        ("inner", Inner * 2),
        ("tail", ctypes.c_int16),
    ]


def over_the_wire(ctype: type) -> type:
    """The type that the receiving process builds from the description."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(describe(ctype)), type=LeafType).ctype()  # type: ignore[no-any-return]


def test_a_struct_with_everything() -> None:
    first = Outer(1, -2, (3, 4, 5), ((6, -7), (8, -9)), -10)
    again = over_the_wire(Outer).from_buffer_copy(bytes(first))  # type: ignore[attr-defined]
    assert ctypes.sizeof(again) == ctypes.sizeof(first)
    assert (again.word, again.signed, list(again.array), again.tail) == (1, -2, [3, 4, 5], -10)
    assert [(inner.small, inner.wide) for inner in again.inner] == [(6, -7), (8, -9)]


def test_plain_numbers_are_signed_as_they_were() -> None:
    for ctype in (ctypes.c_uint8, ctypes.c_uint16, ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_uint64):
        again = over_the_wire(ctype)
        assert again(-1).value == ctype(-1).value, ctype


def test_what_is_no_integer_is_its_bytes() -> None:
    assert ctypes.sizeof(over_the_wire(ctypes.c_double)) == 8
    assert list(over_the_wire(ctypes.c_uint8 * 3)(1, 2, 3)) == [1, 2, 3]  # type: ignore[call-overload]
