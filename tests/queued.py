# SPDX-License-Identifier: Apache-2.0
"""Reads and writes that the kernel is asked to do by itself: io_uring and io_submit(2), without any library.

In: requests. Out: their results. The layouts are those of include/uapi/linux/io_uring.h and aio_abi.h.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

READV, WRITEV, FSYNC, READ_FIXED, WRITE_FIXED, TIMEOUT, READ, WRITE, SEND = 1, 2, 3, 4, 5, 11, 22, 23, 26
"""IORING_OP_*."""
FIXED_FILE, LINK, ASYNC = 1, 4, 16
"""IOSQE_*."""
DATASYNC = 1
POLLED = 2
"""IORING_SETUP_SQPOLL: a thread of the kernel takes the requests."""
PREAD, PWRITE, AIO_FSYNC, AIO_FDSYNC, PREADV, PWRITEV = 0, 1, 2, 3, 7, 8
"""IOCB_CMD_*."""
_ENTER_GETEVENTS, _ENTER_SQ_WAKEUP = 1, 2
_REGISTER_BUFFERS, _REGISTER_FILES = 0, 2
_ETIME_SUCCESS = 1 << 5
_CQ_RING, _SQES = 0x8000000, 0x10000000
_SQE = struct.Struct("=BBHiQQIIQHHi16x")
_SETUP, _ENTER, _REGISTER = 425, 426, 427
_IO_SETUP, _IO_SUBMIT, _IO_GETEVENTS = (206, 209, 208) if os.uname().machine == "x86_64" else (0, 2, 4)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


def _call(number: int, *arguments: int | ctypes.Array[ctypes.c_char] | None) -> int:
    found = int(_libc.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


@dataclass
class Request:
    """One request of io_uring."""

    opcode: int
    fd: int
    buffer: ctypes.Array[ctypes.c_char] | None = None
    offset: int = 0
    flags: int = 0
    """IOSQE_*."""
    special: int = 0
    """`rw_flags`, `fsync_flags` and so on."""
    length: int | None = None
    """Of the buffer, if not all of it."""


def vectors(*buffers: ctypes.Array[ctypes.c_char]) -> ctypes.Array[ctypes.c_char]:
    """An array of struct iovec."""
    packed = b"".join(struct.pack("=QQ", ctypes.addressof(one), len(one)) for one in buffers)
    return ctypes.create_string_buffer(packed, len(packed))


def pause(seconds: float) -> Request:
    """What is linked to it begins later."""
    spec = struct.pack("=qq", int(seconds), int(seconds % 1 * 1e9))
    return Request(TIMEOUT, -1, ctypes.create_string_buffer(spec, 16), flags=LINK, special=_ETIME_SUCCESS, length=1)


class Ring:
    """A ring of io_uring."""

    def __init__(self, entries: int = 64, flags: int = 0) -> None:
        parameters = ctypes.create_string_buffer(struct.pack("=5I", 0, 0, flags, 0, 1000), 120)
        self.fd, self._flags = _call(_SETUP, entries, parameters), flags
        words = struct.unpack("=30I", parameters.raw)
        self._sq, self._cq = words[10:20], words[20:30]
        sq_bytes, cq_bytes = self._sq[6] + 4 * words[0], self._cq[5] + 16 * words[1]
        self._sq_ring, self._cq_ring = self._map(sq_bytes, 0), self._map(cq_bytes, _CQ_RING)
        self._sqes = self._map(64 * words[0], _SQES)
        self._kept: list[object] = []

    def _map(self, size: int, offset: int) -> int:
        how = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | mmap.MAP_POPULATE
        at = _libc.mmap(None, ctypes.c_size_t(size), *how, self.fd, ctypes.c_long(offset))
        assert at != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        return int(at)

    def register(self, files: Sequence[int], buffer: ctypes.Array[ctypes.c_char]) -> None:
        """Fixed files, and one fixed buffer."""
        _call(_REGISTER, self.fd, _REGISTER_FILES, ctypes.create_string_buffer(struct.pack(f"={len(files)}i", *files)),
              len(files))  # fmt: skip
        _call(_REGISTER, self.fd, _REGISTER_BUFFERS, vectors(buffer), 1)

    def submit(self, *requests: Request) -> None:
        """Hands requests over, and does not wait."""
        self._kept += requests
        word = ctypes.c_uint32.from_address
        tail, mask = word(self._sq_ring + self._sq[1]), word(self._sq_ring + self._sq[2]).value
        for number, one in enumerate(requests):
            index = (tail.value + number) & mask
            address = ctypes.addressof(one.buffer) if one.buffer is not None else 0
            full = len(one.buffer) if one.buffer is not None else 0
            length = full // 16 if one.opcode in (READV, WRITEV) else full
            packed = _SQE.pack(
                one.opcode, one.flags, 0, one.fd, one.offset, address,
                length if one.length is None else one.length, one.special, number, 0, 0, 0,
            )  # fmt: skip
            ctypes.memmove(self._sqes + 64 * index, packed, 64)
            word(self._sq_ring + self._sq[6] + 4 * index).value = index
        tail.value += len(requests)
        _call(_ENTER, self.fd, len(requests), 0, _ENTER_SQ_WAKEUP if self._flags & POLLED else 0, None, 0)

    def results(self, count: int) -> list[int]:
        """Waits for as many, and returns them in order of submission."""
        word = ctypes.c_uint32.from_address
        head, tail = word(self._cq_ring + self._cq[0]), word(self._cq_ring + self._cq[1])
        while tail.value - head.value < count:
            _call(_ENTER, self.fd, 0, count - (tail.value - head.value), _ENTER_GETEVENTS, None, 0)
        mask, found = word(self._cq_ring + self._cq[2]).value, {}
        for at in range(head.value, head.value + count):
            raw = ctypes.string_at(self._cq_ring + self._cq[5] + 16 * (at & mask), 16)
            number, result, _ = struct.unpack("=QiI", raw)
            found[number] = result
        head.value += count
        return [found[number] for number in sorted(found)]

    def run(self, *requests: Request) -> list[int]:
        """Hands them over and waits for all of them."""
        self.submit(*requests)
        return self.results(len(requests))


def io_submit(requests: Sequence[tuple[int, int, ctypes.Array[ctypes.c_char] | None, int]]) -> list[int]:
    """Runs requests (IOCB_CMD_*, descriptor, buffer, offset) by io_submit(2) in one call, and returns their results."""
    context, count = ctypes.create_string_buffer(8), len(requests)
    _call(_IO_SETUP, count, context)
    blocks = [
        ctypes.create_string_buffer(
            struct.pack("=QIIHhIQQq16x", n, 0, 0, opcode, 0, fd, ctypes.addressof(buffer) if buffer else 0,
                        len(buffer or "") // (16 if opcode in (PREADV, PWRITEV) else 1), offset), 64)
        for n, (opcode, fd, buffer, offset) in enumerate(requests)
    ]  # fmt: skip
    pointers = struct.pack(f"={count}Q", *map(ctypes.addressof, blocks))
    number, events = struct.unpack("=q", context.raw)[0], ctypes.create_string_buffer(32 * count)
    assert _call(_IO_SUBMIT, number, count, ctypes.create_string_buffer(pointers)) == count
    assert _call(_IO_GETEVENTS, number, count, count, events, None) == count
    results = {one[0]: one[2] for one in struct.iter_unpack("=QQqq", events.raw)}
    return [results[n] for n in range(count)]
