# SPDX-License-Identifier: Apache-2.0
"""Mutations of inputs: of any bytes, and of recordings with their checksums and types kept valid.

In: an input and a source of random numbers. Out: another input. The same numbers give the same input.
"""

from __future__ import annotations

import functools
import struct
import zlib
from random import Random
from typing import Any

import msgspec

from ebpf_mig.recording.format import FRAME, MAGIC

INTEGERS = (
    0, 1, -1, 2, 3, 4, 7, 127, 255, 4095, 4096, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 33,
    1 << 40, 1 << 48, (1 << 53) + 1, (1 << 62) - 1, 1 << 62, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
    -2, -4, -11, -(1 << 31), -(1 << 62), -(1 << 63), 10**6, 10**9, 10**12, 0x4010AE42, 0xAE80, 0xC018AEC0, 0xAEC7,
)  # fmt: skip
"""Edges of types and ranges, units of time, and some KVM ioctls."""
TEXTS = (
    "", "x", "\0", "\x1b[31m", "é", "\U0001f600", "\u202e", "<script>", "=1+1", "a" * 600, "absent", "absent: why",
    "source", "destination", "unknown", "completed", "failed", "qmp.STOP", "qmp.MIGRATION.completed", "qmp.downtime_ms",
    "ch.downtime_ms", "ch.event.paused", "127.0.0.1:4444", "[::1]:4444", ":", "1.2.3.4:99999", "tcp_sendmsg",
    "migrated",
)  # fmt: skip
TOKENS = (
    b"\0", b"\xff", b"\r\n", b"\r\n\r\n", b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"NaN", b"1e999", b"-1",
    b"9" * 30,
    b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"GET ", b"HTTP/1.1 ", b"ms", b"Tgid:\t",
    b"(", b") ", b"\n", b"!!int ", b"*a", b"&a ", b"<<: ", b"\xf0\x9f", b"%00", b"../",
)  # fmt: skip


def mutated(data: bytes, random: Random, most: int = 1 << 16) -> bytes:
    """Some changes to bytes."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 5, 8))):
        at = random.randrange(len(out) + 1)
        match random.randrange(8):
            case 0 if out:
                out[at % len(out)] ^= 1 << random.randrange(8)
            case 1 if out:
                out[at % len(out)] = random.randrange(256)
            case 2:
                out[at:at] = random.choice(TOKENS)
            case 3:
                del out[at : at + random.choice((1, 2, 4, 16, 256))]
            case 4:
                part = out[at : at + random.choice((1, 4, 16, 64))]
                out[at:at] = part * random.choice((1, 2, 10))
            case 5:
                out[at:at] = random.randbytes(random.choice((1, 2, 4, 8)))
            case 6:
                out[at : at + 4] = struct.pack("<I", random.choice(INTEGERS) & 0xFFFFFFFF)
            case _:
                out[at:at] = str(random.choice(INTEGERS)).encode()
    return bytes(out[:most])


def block(kind: int, content: bytes) -> bytes:
    """A block with a valid checksum."""
    return FRAME.pack(len(content), zlib.crc32(content, zlib.crc32(bytes((kind,)))), kind) + content


Parts = tuple[dict[str, Any], list[Any]]
"""The header and the events of a recording, as decoded msgpack."""


@functools.lru_cache(256)
def parts_of(data: bytes) -> bytes | None:
    """A recording's header and events as one msgpack array, None if it is not a whole recording."""
    try:
        at, header, events = len(MAGIC), None, []
        while at < len(data):
            length, _, kind = FRAME.unpack_from(data, at)
            at += FRAME.size
            content = data[at : at + length]
            at += length
            if kind & 0x80:
                content = zlib.decompressobj().decompress(content, 1 << 20)
            if kind & 0x7F == 1:
                header = msgspec.msgpack.decode(content)
            else:
                events += msgspec.msgpack.decode(content)
        if not isinstance(header, dict) or not all(isinstance(event, list) for event in events):
            return None
        return msgspec.msgpack.encode([header, events])
    except (struct.error, zlib.error, msgspec.MsgspecError, ValueError, TypeError, RecursionError, UnicodeDecodeError):
        return None


def written(header: Any, events: list[Any]) -> bytes:
    """A recording with one uncompressed block."""
    return MAGIC + block(1, _encoded(header)) + block(2, _encoded(events))


def _encoded(value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except OverflowError:  # a sum of two edges
        return msgspec.msgpack.encode(_within(value))


def _within(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _within(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_within(item) for item in value]
    return max(-(1 << 63), min(value, (1 << 64) - 1)) if isinstance(value, int) else value


def recording(data: bytes, random: Random, others: list[bytes]) -> bytes:
    """A recording with mutated events; sometimes with mutated bytes under valid checksums, or mutated anywhere."""
    whole = parts_of(data)
    if whole is None or random.random() < 0.03:
        return mutated(data, random)
    header, events = msgspec.msgpack.decode(whole)
    for _ in range(random.choice((1, 1, 2, 3, 5, 10, 30))):
        _change(header, events, random, others)
    if random.random() < 0.05:
        content = mutated(_encoded(events), random)
        return MAGIC + block(1, _encoded(header)) + block(2, content)
    return written(header, events)


def _change(header: dict[str, Any], events: list[Any], random: Random, others: list[bytes]) -> None:
    chance = random.randrange(16)
    if chance == 0 or not events:
        _change_value(header, random.choice(list(header) or ["host"]), random)
        return
    at = random.randrange(len(events))
    event = events[at]
    match chance:
        case 1:
            del events[at : at + random.choice((1, 1, 4, 16))]
        case 2:
            events[at:at] = [list(e) for e in events[at : at + random.choice((1, 2, 8))]]
        case 3:
            other = parts_of(random.choice(others))
            theirs = msgspec.msgpack.decode(other)[1] if other else []
            begin = random.randrange(len(theirs) + 1)
            events[at:at] = theirs[begin : begin + random.choice((1, 4, 16))]
        case 4:
            tag, by = event[0], random.choice((-1, 1)) * random.choice((1, 1000, 10**6, 10**9, 10**12))
            for one in events:
                if one and one[0] == tag:
                    one[1:3] = [v + by if isinstance(v, int) and v > 1 << 20 else v for v in one[1:3]]
        case 5:
            other_event = random.choice(events)
            if len(event) > 1 and len(other_event) > 1:
                event[random.randrange(1, len(event))] = other_event[random.randrange(1, len(other_event))]
        case 6:
            events[at], events[-1 - at] = events[-1 - at], events[at]
        case 7 if len(event) > 2:
            event[1], event[2] = event[2], event[1]
        case _ if event:
            _change_value(event, random.randrange(len(event)), random)


def _change_value(holder: Any, key: Any, random: Random) -> None:
    value = holder.get(key) if isinstance(holder, dict) else holder[key]
    match value:
        case bool():
            holder[key] = not value
        case int() if random.random() < 0.5:
            holder[key] = value + random.choice((-1, 1)) * random.choice((1, 2, 100, 10**4, 10**6, 10**8))
        case str():
            holder[key] = random.choice(TEXTS)
        case list() if value:
            _change_value(value, random.randrange(len(value)), random)
        case dict() if value:
            _change_value(value, random.choice(list(value)), random)
        case _:
            holder[key] = (
                random.choice(INTEGERS) if random.random() < 0.9 else random.choice((None, "x", [], {}, True, 1.5))
            )
