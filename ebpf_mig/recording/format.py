# SPDX-License-Identifier: Apache-2.0
"""The format of a recording: magic, frames, blocks and their limits (docs/recording.md).

In: headers and events, or the bytes of a block from an untrusted file. Out: the bytes, or the structs. `file.py` reads
and writes the files.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Collection
from itertools import compress, count
from typing import Any, BinaryIO, NamedTuple, get_args, get_type_hints

import msgspec

from ebpf_mig.recording.events import AnyEvent, Header, OffCpu, Samples, VcpuSleep

MAGIC = b"EBPFMIG1\n"
FORMAT = 1
FRAME = struct.Struct("<IIB")
"""Length of the payload, CRC-32 of kind and payload, kind."""

KIND_HEADER = 1
KIND_EVENTS = 2
COMPRESSED = 0x80
"""Bit of the kind: the payload is a zlib stream."""

MAX_RAW = 4 << 20
"""Bytes of one block's content, decompressed."""
MAX_STORED = MAX_RAW + (64 << 10)
"""Bytes of one block's payload as stored. zlib makes incompressible data larger."""
MAX_BLOCK_EVENTS = 1 << 16
MAX_TEXT = 4096
"""Characters of one string of an event. Longer strings are cut, both when writing and when reading."""
MAX_ITEMS = 256
"""Entries of one dictionary or list of an event."""
MAX_ITEM_TEXT = 512
"""Characters of a key or of a list's string; the kernel's symbol names have at most 511."""

TEXTUAL = frozenset(event for event in get_args(AnyEvent) if not set(get_type_hints(event).values()) <= {int, bool})
"""Events with fields of variable size; `bounded` limits these."""

_VARIABLE = {
    event: tuple(name for name, kind in get_type_hints(event).items() if kind not in (int, bool)) for event in TEXTUAL
}

# RecursionError: arrays nested thousands deep. UnicodeDecodeError: a string that is not UTF-8.
_UNDECODABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
_TAGS = frozenset(event.__struct_config__.tag for event in get_args(AnyEvent))

_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(Header)
_events_decoder = msgspec.msgpack.Decoder(list[AnyEvent])
_event_decoder: msgspec.msgpack.Decoder[AnyEvent] = msgspec.msgpack.Decoder(AnyEvent)
_raws_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])


class DamageError(Exception):
    """The rest of the file cannot be used; the message gives the reason."""


def read_up_to(file: BinaryIO, size: int) -> bytes:
    """Up to `size` bytes; fewer only at the end. Raw streams and pipes return short reads."""
    data = file.read(size)
    while data and len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def check_magic(magic: bytes) -> None:
    """DamageError if a file does not begin with the magic of this format."""
    if not magic:
        raise DamageError("the file is empty")
    if magic != MAGIC:
        if version := re.fullmatch(rb"EBPFMIG(\d)\n", magic):
            newer = version[1].decode()
            raise DamageError(f"made by another ebpf-mig (format {newer}); this one reads format {FORMAT}")
        raise DamageError("not an ebpf-mig recording")


def header_block(header: Header) -> bytes:
    """The magic and the first block."""
    return MAGIC + _frame(KIND_HEADER, _encoder.encode(header))


def events_block(count: int, encoded: bytes | bytearray) -> bytes:
    """A block of `count` events, encoded one after the other by `encode`."""
    content = b"\xdd" + count.to_bytes(4, "big") + encoded
    return _frame(KIND_EVENTS | COMPRESSED, zlib.compress(content, 1))


def encode(event: AnyEvent, buffer: bytearray) -> None:
    """Append `event` to `buffer`, all or nothing."""
    end = len(buffer)
    try:
        _encoder.encode_into(bounded(event) if type(event) in TEXTUAL else event, buffer, end)
    except BaseException:
        del buffer[end:]
        raise


def content_of(kind: int, crc: int, payload: bytes) -> bytes:
    """A block's payload, checked and decompressed: at most MAX_RAW bytes. Raises DamageError."""
    if zlib.crc32(payload, zlib.crc32(bytes((kind,)))) != crc:
        raise DamageError("wrong checksum")
    content = _decompress(payload) if kind & COMPRESSED else payload
    if len(content) > MAX_RAW:
        raise DamageError(f"content over {MAX_RAW} bytes")
    return content


def decode_header(content: bytes) -> Header:
    """The header. Raises DamageError."""
    try:
        header = _header_decoder.decode(content)
    except _UNDECODABLE as error:
        raise DamageError(f"the header cannot be decoded: {error}") from error
    if header.format != FORMAT:
        raise DamageError(f"made by another ebpf-mig (format {header.format}); this one reads format {FORMAT}")
    return header


class Content(NamedTuple):
    """The content of a block of events."""

    events: list[AnyEvent]
    unknown: int = 0
    """Number of events left out because only a newer version knows their kind."""
    damaged: int = 0
    """Number of events left out because a field has a wrong type or is out of range."""
    why: str = ""
    """Reason why the first damaged event was left out."""


def decode_events(content: bytes) -> Content:
    """The events of a block. Raises DamageError if it is no list of events."""
    if _array_length(content) > MAX_BLOCK_EVENTS:
        raise DamageError(f"more than {MAX_BLOCK_EVENTS} events")
    try:
        try:
            found = Content(_events_decoder.decode(content))
        except msgspec.ValidationError:
            found = _decode_known(content)
    except _UNDECODABLE as error:
        raise DamageError(str(error)) from error
    events = found.events
    stacks: dict[tuple[str, ...], tuple[str, ...]] = {}
    for at in compress(count(), map(TEXTUAL.__contains__, map(type, events))):
        event = events[at]
        if isinstance(event, (OffCpu, Samples, VcpuSleep)):
            _with_shared_stack(event, stacks)
        else:
            events[at] = bounded(event)
    return found


def _with_shared_stack(event: OffCpu | Samples | VcpuSleep, stacks: dict[tuple[str, ...], tuple[str, ...]]) -> None:
    """Gives the event the stack within the limits. Equal stacks are one object: a block has a few, many times."""
    shared = stacks.get(event.stack)
    if shared is None:
        shared = stacks[event.stack] = bounded(event).stack  # type: ignore[union-attr]
    msgspec.structs.force_setattr(event, "stack", shared)


def bounded(event: AnyEvent) -> AnyEvent:
    """`event` with its strings, lists and dictionaries cut to the limits, and its strings encodable as UTF-8."""
    fields = _VARIABLE[type(event)]
    for name in fields:
        if not _fits(getattr(event, name)):
            break
    else:
        return event
    changes: dict[str, Any] = {}
    for name in fields:
        value = getattr(event, name)
        if isinstance(value, str):
            changes[name] = _text(value, MAX_TEXT)
        elif isinstance(value, dict):
            changes[name] = {_text(key, MAX_ITEM_TEXT): value[key] for key in list(value)[:MAX_ITEMS]}
        elif isinstance(value, tuple):
            changes[name] = tuple(
                _text(item, MAX_ITEM_TEXT) if isinstance(item, str) else item for item in value[:MAX_ITEMS]
            )
    return msgspec.structs.replace(event, **changes)


def _fits(value: object) -> bool:
    """Whether an event is certainly within the limits. Nearly all are; `bounded` checks the others in detail."""
    if isinstance(value, str):
        return len(value) <= MAX_TEXT and value.isascii()
    if isinstance(value, tuple):
        return not value or (len(value) <= MAX_ITEMS and (isinstance(value[0], int) or _fit_together(value)))
    if isinstance(value, dict):
        return len(value) <= MAX_ITEMS and _fit_together(value)
    return True


def _fit_together(texts: Collection[str]) -> bool:
    """Checks the joined text, which is faster than checking each item. Long recordings contain many stacks."""
    together = "".join(texts)
    return together.isascii() and (len(together) <= MAX_ITEM_TEXT or max(map(len, texts)) <= MAX_ITEM_TEXT)


def _text(text: str, limit: int) -> str:
    return text[:limit].encode("utf-8", "replace").decode("utf-8")


def _frame(kind: int, payload: bytes) -> bytes:
    return FRAME.pack(len(payload), zlib.crc32(payload, zlib.crc32(bytes((kind,)))), kind) + payload


def _decompress(payload: bytes) -> bytes:
    """Stops just after MAX_RAW bytes, so that a small block cannot fill the memory."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(payload, MAX_RAW + 1)
    except zlib.error as error:
        raise DamageError(str(error)) from error
    if len(content) <= MAX_RAW and (not stream.eof or stream.unused_data):
        raise DamageError("not one whole zlib stream")
    return content


def _array_length(content: bytes) -> int:
    """The length that a msgpack array claims; 0 if `content` is not an array (the decoder reports that)."""
    match content[:1]:
        case b"\xdc":
            return int.from_bytes(content[1:3], "big")
        case b"\xdd":
            return int.from_bytes(content[1:5], "big")
        case _:
            return 0


def _decode_known(content: bytes) -> Content:
    """Decodes events one by one, without those that are damaged or have an unknown tag."""
    events: list[AnyEvent] = []
    unknown = damaged = 0
    why = ""
    for raw in _raws_decoder.decode(content):
        try:
            events.append(_event_decoder.decode(raw))
        except _UNDECODABLE as error:
            if _tag(raw) in _TAGS:
                damaged += 1
                why = why or str(error)
            else:
                unknown += 1
    return Content(events, unknown, damaged, why)


def _tag(raw: msgspec.Raw) -> int:
    """The event's tag; ValidationError if it has none."""
    fields = _raws_decoder.decode(raw)
    return msgspec.msgpack.decode(fields[0] if fields else b"\xc0", type=int)
