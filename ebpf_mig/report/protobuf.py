# SPDX-License-Identifier: Apache-2.0
"""Fields in protobuf's wire format, for the few messages that reports consist of.

In: a field's number and value. Out: its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from ebpf_mig.text import printable


def varint(value: int) -> bytes:
    """Base-128, low groups first; negative numbers as their 64-bit two's complement, as protobuf's int64 is."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(tag: int, value: int) -> bytes:
    """A varint field."""
    return varint(tag << 3) + varint(value)


def chunk(tag: int, data: bytes) -> bytes:
    """A length-delimited field."""
    return varint(tag << 3 | 2) + varint(len(data)) + data


def packed(tag: int, values: Iterable[int]) -> bytes:
    """A repeated varint field."""
    return chunk(tag, b"".join(map(varint, values)))


def text(tag: int, value: str) -> bytes:
    """A string field. Control characters are escaped, so that no terminal or page interprets them."""
    return chunk(tag, printable(value).encode())


def fixed(tag: int, value: int) -> bytes:
    """A fixed64 field."""
    return varint(tag << 3 | 1) + struct.pack("<Q", value)
