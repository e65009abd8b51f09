# SPDX-License-Identifier: Apache-2.0
"""The lab's page fault handler: serves the memory of a restored Firecracker VM from a file, one page at a fault.

In: the path of a UNIX socket to listen at, and a file. Out: nothing; it ends with the VMM. Run as a program of its own
with only the standard library, since a handler is another process than the VMM. Protocol: docs/snapshotting/
handling-page-faults-on-snapshot-resume.md (v1.13 to v1.16). It has no balloon device to care for.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import select
import socket
import struct
import sys
from collections.abc import Sequence

UFFDIO_COPY = 0xC028AA03
"""include/uapi/linux/userfaultfd.h, with a struct of 40 bytes."""
EVENT_PAGEFAULT = 0x12
_UFFD_MESSAGE_BYTES = 32
_MAPPINGS_BYTES = 1 << 16

Region = tuple[int, int, int, int]
"""Address in the VMM, bytes, offset in the file, page size."""


def regions_of(text: bytes) -> list[Region]:
    """The regions in Firecracker's message."""
    keys = ("base_host_virt_addr", "size", "offset")
    return [
        (*(int(region[key]) for key in keys), int(region.get("page_size", 4096)))  # type: ignore[misc]
        for region in json.loads(text)
    ]


def place(regions: Sequence[Region], address: int) -> tuple[int, int, int]:
    """(page's address, offset in the file, bytes) for a fault; ValueError if it is in no region."""
    for base, length, offset, page in regions:
        if base <= address < base + length:
            begin = address & ~(page - 1)
            return begin, offset + begin - base, page
    raise ValueError(f"fault at {address:#x}, outside of the guest's memory")


def serve(listener: socket.socket, path: str) -> None:
    """Serves one VMM until it ends."""
    peer, _ = listener.accept()
    text, descriptors, _, _ = socket.recv_fds(peer, _MAPPINGS_BYTES, 1)
    uffd, regions = descriptors[0], regions_of(text)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:  # noqa: PTH123
        source = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        waiter = select.poll()
        waiter.register(uffd, select.POLLIN)
        waiter.register(peer, 0)  # POLLHUP: the VMM has ended
        while all(fd == uffd for fd, _ in waiter.poll()):
            _serve_faults(uffd, regions, source)


def _serve_faults(uffd: int, regions: Sequence[Region], source: int) -> None:
    try:
        data = os.read(uffd, 16 * _UFFD_MESSAGE_BYTES)
    except BlockingIOError:
        return
    for at in range(0, len(data), _UFFD_MESSAGE_BYTES):
        event, address = struct.unpack_from("=B15xQ", data, at)
        if event != EVENT_PAGEFAULT:
            continue
        page, offset, length = place(regions, address)
        request = struct.pack("=QQQQq", page, source + offset, length, 0, 0)
        try:
            fcntl.ioctl(uffd, UFFDIO_COPY, request)
        except OSError as error:
            if error.errno != errno.EEXIST:  # another vCPU's fault on the same page was served before
                raise


def main(arguments: Sequence[str]) -> None:
    """`uffd_handler.py SOCKET FILE`. The file may come into being after the start."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(arguments[0])
        listener.listen()
        serve(listener, arguments[1])


if __name__ == "__main__":
    main(sys.argv[1:])
