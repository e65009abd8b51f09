# SPDX-License-Identifier: Apache-2.0
"""Reads and writes recordings: the events traced on one host, written block by block, read as untrusted input.

In: a header and events (`events.py`). Out: the same, from a file, a pipe or bytes, as far as they are intact.
docs/recording.md describes the format. A file that is cut off or damaged after its header is not an error: everything
before the damage is returned, and `truncated` and `reason` describe the damage.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec

from ebpf_mig.errors import RecordingError
from ebpf_mig.files import open_new
from ebpf_mig.recording.budget import Budget, check_content
from ebpf_mig.recording.events import AnyEvent, Ending, Header
from ebpf_mig.recording.format import (
    COMPRESSED,
    FRAME,
    KIND_EVENTS,
    KIND_HEADER,
    MAGIC,
    MAX_RAW,
    MAX_STORED,
    DamageError,
    check_magic,
    content_of,
    decode_events,
    decode_header,
    encode,
    events_block,
    header_block,
    read_up_to,
)
from ebpf_mig.text import printable

MAX_EVENTS = 16_000_000
"""Events that `read_recording` holds in memory. Iterating has no such limit."""

_BLOCK_EVENTS = 4096
_BLOCK_BYTES = 1 << 20


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """A whole recording in memory."""

    header: Header
    events: list[AnyEvent]
    truncated: bool = False
    """Whether the file is cut off, damaged or without an `Ending`: later events are missing."""
    reason: str = ""
    """The reason for `truncated`; empty otherwise."""
    unknown: int = 0
    """Number of skipped events and blocks, of kinds that only a newer version knows."""


class RecordingWriter:
    """Writes a recording to a new file, or to an open binary stream such as `sys.stdout.buffer`.

    Events written by `flush()`, or because a block was full, survive a kill. Not thread-safe. Raises UsageError if the
    file exists and `force` is not given, RecordingError if writing fails; then the file still holds every complete
    block, and `events_kept` is the number of their events.
    """

    def __init__(self, target: str | Path | BinaryIO, header: Header, force: bool = False) -> None:
        block = header_block(header)
        if len(block) > MAX_RAW:
            raise RecordingError(f"the header has {len(block)} bytes, more than {MAX_RAW}")
        self.events_kept = 0
        self._own = isinstance(target, (str, Path))
        self._name = printable(str(target)) if self._own else "the output stream"
        self._buffer = bytearray()
        self._count = 0
        self._offset = 0
        self._broken: RecordingError | None = None
        self._closed = False
        if isinstance(target, (str, Path)):
            self._file: io.RawIOBase | BinaryIO = io.FileIO(open_new(target, force=force), "wb")
        else:
            self._file = target
        self._seekable = self._own and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        try:
            self._put(block)
        except BaseException:
            self._close_file()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except RecordingError:
            if error is None:
                raise

    def write(self, event: AnyEvent) -> None:
        """Add one event. It is written to the file with its block."""
        if self._broken:
            raise self._broken
        encode(event, self._buffer)
        self._count += 1
        if self._count >= _BLOCK_EVENTS or len(self._buffer) >= _BLOCK_BYTES:
            self.flush()

    def write_many(self, events: Iterable[AnyEvent]) -> None:
        """Add events in order."""
        for event in events:
            self.write(event)

    def flush(self) -> None:
        """Write the current block. All events so far then survive a kill."""
        if self._broken:
            raise self._broken
        if not self._count:
            return
        self._put(events_block(self._count, self._buffer))
        self.events_kept += self._count
        self._buffer.clear()
        self._count = 0

    def close(self) -> None:
        """Flush, and close the file if we opened it. Idempotent. Does not repeat an error that was already raised."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self._broken:
                self.flush()
        finally:
            self._close_file()

    def _put(self, data: bytes) -> None:
        """Write all of `data`, or remove the written part again, so that the next block can be found."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
            self._file.flush()
        except BaseException as error:
            self._take_back(len(rest) != len(data))
            if not isinstance(error, OSError):
                raise
            kept = f"{self.events_kept} events in whole blocks are kept"
            self._broken = RecordingError(
                f"cannot write {self._name}: {error.strerror or error}; {kept}",
                "free space or choose another --output" if self._own else None,
            )
            raise self._broken from error
        self._offset += len(data)

    def _take_back(self, torn: bool) -> None:
        if self._seekable:
            os.ftruncate(self._file.fileno(), self._offset)
            os.lseek(self._file.fileno(), self._offset, os.SEEK_SET)
        elif torn:
            self._broken = RecordingError(f"{self._name} was cut off inside a block")

    def _close_file(self) -> None:
        if self._own:
            self._file.close()


class RecordingReader:
    """Reads a recording block by block in constant memory: the header at once, the events by iteration.

    After the iteration, `truncated`, `reason` and `unknown` have the same meaning as in `Recording`. Takes a path, the
    bytes themselves or an open binary stream (a pipe is fine). Raises RecordingError if the magic or the header is bad.
    """

    def __init__(self, source: str | Path | bytes | BinaryIO) -> None:
        self.truncated = False
        self.reason = ""
        self.unknown = 0
        self._block = 0
        self._damage = ""
        """Reason why the first invalid event was left out."""
        self._damaged = 0
        self.stored = 0
        """Bytes of the file read so far."""
        self._content = 0
        self._own = isinstance(source, (str, Path, bytes))
        self.name = printable(str(source)) if isinstance(source, (str, Path)) else "the recording"
        self._file = self._open(source)
        try:
            self.header = self._read_header()
        except (DamageError, OSError) as error:
            self.close()
            why = error.strerror if isinstance(error, OSError) else error
            raise RecordingError(f"{self.name}: {why}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[AnyEvent]:
        for block in self.blocks():
            yield from block

    def blocks(self) -> Iterator[list[AnyEvent]]:
        """The events, one block at a time. Faster than iterating over single events."""
        ended = False
        try:
            while frame := self._read_frame():
                events = self._decode(*frame)
                ended = ended or Ending in map(type, events)
                yield events
        except DamageError as damage:
            self.cut(str(damage))
        except OSError as error:
            self.cut(f"block {self._block} cannot be read: {error.strerror}")
        else:
            if not ended:
                self.cut("it has no ending: tracing was killed or is still going on")
        if self._damaged:
            more = f"; events left out: {self._damaged}"
            self.cut("; ".join(filter(None, (self._damage + more, self.reason))))

    def close(self) -> None:
        """Close the file if we opened it."""
        if self._own:
            self._file.close()

    def _open(self, source: str | Path | bytes | BinaryIO) -> BinaryIO:
        if isinstance(source, bytes):
            return io.BytesIO(source)
        if not isinstance(source, (str, Path)):
            return source
        try:
            return Path(source).open("rb")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise RecordingError(f"cannot read {self.name}: {why}") from error

    def cut(self, reason: str) -> None:
        """Notes that later events are missing."""
        self.truncated = True
        self.reason = reason

    def _read_header(self) -> Header:
        check_magic(read_up_to(self._file, len(MAGIC)))
        frame = self._read_frame()
        if frame is None:
            raise DamageError("the file ends before its header")
        if frame[0] != KIND_HEADER:
            raise DamageError("the first block is not a header")
        return decode_header(frame[1])

    def _read_frame(self) -> tuple[int, bytes] | None:
        """The kind and content of the next block; None at the regular end of the file."""
        head = read_up_to(self._file, FRAME.size)
        if not head:
            return None
        where = self._next_block()
        length, crc, kind = FRAME.unpack(head) if len(head) == FRAME.size else (1, 0, 0)
        if length > MAX_STORED:
            raise DamageError(f"{where} is damaged: {length} bytes, more than {MAX_STORED}")
        payload = read_up_to(self._file, length)
        if len(payload) < length:
            raise DamageError(f"the file ends inside {where}")
        try:
            content = content_of(kind, crc, payload)
        except DamageError as damage:
            raise DamageError(f"{where} is damaged: {damage}") from damage
        self.stored += FRAME.size + length
        self._content += len(content)
        check_content(self.name, self._content, self.stored)
        return kind & ~COMPRESSED, content

    def _next_block(self) -> str:
        """Counts the next block and returns its name for messages."""
        self._block += 1
        return f"block {self._block - 1}" if self._block > 1 else "its header"

    def _decode(self, kind: int, content: bytes) -> list[AnyEvent]:
        """The events of a block. Blocks of a kind that only a newer version knows have none."""
        if kind != KIND_EVENTS:
            self.unknown += 1
            return []
        where = f"block {self._block - 1} is damaged"
        try:
            found = decode_events(content)
        except DamageError as damage:
            raise DamageError(f"{where}: {damage}") from damage
        self.unknown += found.unknown
        if found.damaged:
            self._damage = self._damage or f"{where}: {found.why}"
            self._damaged += found.damaged
        return found.events


def read_recording(
    source: str | Path | bytes | BinaryIO, *, within_budget: bool = False, with_axis: bool = False
) -> Recording:
    """Reads a whole recording. RecordingError if it is none or its header is bad.

    `within_budget`: also a RecordingError if a report would take more memory than the size of the file justifies;
    `with_axis` as for `Budget`.
    """
    events: list[AnyEvent] = []
    with RecordingReader(source) as reader:
        budget = Budget(reader.name, with_axis=with_axis) if within_budget else None
        for block in reader.blocks():
            if too_many(reader, len(events) + len(block)):
                break
            if budget is not None:
                budget.spend(block, reader.stored)
            events += block
        return Recording(
            header=reader.header,
            events=events,
            truncated=reader.truncated,
            reason=reader.reason,
            unknown=reader.unknown,
        )


def too_many(reader: RecordingReader, count: int) -> bool:
    """Whether a reader gave more events than are held in memory. Then it notes that later ones are missing."""
    if count > MAX_EVENTS:
        reader.cut(f"it holds more than {MAX_EVENTS} events")
    return count > MAX_EVENTS


def iter_events(source: str | Path | bytes | BinaryIO) -> Iterator[AnyEvent]:
    """The events one by one, in constant memory. Use `RecordingReader` to find out whether some are missing."""
    with RecordingReader(source) as reader:
        yield from reader


def default_name(what: str, when: datetime | None = None) -> str:
    """The default file name of a recording: `ebpf-mig-<what>-<utc>.rec`."""
    stamp = (when or datetime.now(UTC)).astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    return f"ebpf-mig-{re.sub(r'[^A-Za-z0-9._-]+', '_', what)[:64] or 'vm'}-{stamp}.rec"
