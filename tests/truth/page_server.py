# SPDX-License-Identifier: Apache-2.0
"""Serves a guest's memory page by page, each after a known delay: `python -m tests.truth.page_server KIND FD FILE NS`.

In: `userfaultfd` and such a descriptor, then on stdin one line of JSON with the guest's memory: [[address, bytes], ...]
in the order of the file; or `fuse` and a descriptor of /dev/fuse, which is mounted: the mount has one file, `memory`.
Out: on stdout `ready`; when stdin ends, one line of JSON: when each page was asked for and when it was there (ns of
CLOCK_MONOTONIC). It is a process of its own, since the one that has the guest may hold its interpreter's lock while it
waits for a page. FUSE: include/uapi/linux/fuse.h, protocol 7.31.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import struct
import sys
import threading
import time
from pathlib import Path

from tests.truth.kvm import PAGE
from tests.truth.parts import say

ASKED = ".asked"
"""A file with this at the end of its name is made when the first page is asked for."""
_COPY, _PAGEFAULT, _MESSAGE = 0xC028AA03, 0x12, 32
_IN, _OUT = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _INIT = 1, 2, 3, 14, 15, 26
_ROOT, _MEMORY = 1, 2
_ENOSYS = 38


class Server:
    """Keeps the truth. `delay_ns`: how long each page takes."""

    def __init__(self, path: str, delay_ns: int) -> None:
        self.file, self.delay_ns = os.open(path, os.O_RDONLY), delay_ns
        self._asked = Path(path + ASKED)
        self.size = os.fstat(self.file).st_size
        self.served: list[tuple[int, int]] = []

    def wait(self) -> int:
        """Lets the delay pass. Returns its begin, ns."""
        begin = time.monotonic_ns()
        if not self.served:
            self._asked.touch()
        time.sleep(self.delay_ns / 1e9)
        return begin


def userfaultfd(server: Server, fd: int, regions: list[tuple[int, int]]) -> None:
    """Answers one fault after the other."""
    buffer = ctypes.create_string_buffer(PAGE)
    while True:
        select.select([fd], [], [])
        message = os.read(fd, _MESSAGE)
        event, address = struct.unpack_from("=B15xQ", message)
        assert event == _PAGEFAULT
        begin = server.wait()
        page, offset = address & ~(PAGE - 1), 0
        for base, size in regions:
            if base <= page < base + size:
                offset += page - base
                break
            offset += size
        buffer.raw = os.pread(server.file, PAGE, offset)
        server.served.append((begin, time.monotonic_ns()))  # first: then the guest goes on, and may be done
        fcntl.ioctl(fd, _COPY, struct.pack("=QQQQq", page, ctypes.addressof(buffer), PAGE, 0, 0))


def _attributes(server: Server, node: int) -> bytes:
    mode, size = (0o40555, 0) if node == _ROOT else (0o100444, server.size)
    return struct.pack("<6Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, PAGE, 0)


def fuse(server: Server, fd: int) -> None:
    """Answers one request after the other. Without readahead, each page is a request."""
    day = 86400
    while True:
        request = os.read(fd, 1 << 20)
        _, code, unique, node, *_ = _IN.unpack_from(request)
        error, answer, begin = 0, b"", 0
        if code == _INIT:
            answer = struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, 0, 12, 9, PAGE, 1, 1, 0, 0)
        elif code == _LOOKUP:
            answer = struct.pack("<QQQQII", _MEMORY, 0, day, day, 0, 0) + _attributes(server, _MEMORY)
        elif code == _GETATTR:
            answer = struct.pack("<QII", day, 0, 0) + _attributes(server, node)
        elif code == _OPEN:
            answer = struct.pack("<QII", 1, 0, 0)
        elif code == _READ:
            _, offset, size = struct.unpack_from("<QQI", request, _IN.size)
            begin = server.wait()
            answer = os.pread(server.file, size, offset)
        elif code == _FORGET:
            continue
        else:
            error = -_ENOSYS
        if begin:
            server.served.append((begin, time.monotonic_ns()))
        with contextlib.suppress(FileNotFoundError):  # nobody waits for the answer any more
            os.write(fd, _OUT.pack(_OUT.size + len(answer), error, unique) + answer)


def main(kind: str, fd: int, path: str, delay_ns: int) -> None:
    server = Server(path, delay_ns)
    say("ready")
    regions = json.loads(sys.stdin.readline()) if kind == "userfaultfd" else []
    work = (userfaultfd, (server, fd, regions)) if kind == "userfaultfd" else (fuse, (server, fd))
    threading.Thread(target=work[0], args=work[1], daemon=True).start()  # type: ignore[arg-type]
    sys.stdin.readline()
    server.delay_ns = 0
    say(json.dumps(server.served))
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
