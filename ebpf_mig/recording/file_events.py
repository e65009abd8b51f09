# SPDX-License-Identifier: Apache-2.0
"""The part of the event model on files: calls that take time in a snapshot or a restore, but move no bytes themselves.

In: nothing. Out: `Call`, and what it can be. What is read and written are `Transfer`s, as on sockets.
"""

from __future__ import annotations

from enum import IntEnum

from ebpf_mig.recording.fields import Bits64, Count, Event, Inode, Instant, MaybeDuration, Pid, Returned


class FileCall(IntEnum):
    """A system call; the numbers are our own, and those of bpf/file_calls.h."""

    FSYNC = 1
    FDATASYNC = 2
    SYNC_FILE_RANGE = 3
    MSYNC = 4
    MINCORE = 5
    MMAP = 6
    """Of a file, and of at least 64 KiB."""
    IO_URING_ENTER = 7


SYNCS = frozenset({FileCall.FSYNC, FileCall.FDATASYNC, FileCall.SYNC_FILE_RANGE, FileCall.MSYNC})
"""The calls that wait until data is on the disk."""


class Call(Event, frozen=True, tag=27):
    """A `FileCall` of a thread while no vCPU of its process ran. One that io_uring or io_submit(2) was asked for has
    no thread (`tid` 0), and lasts until it is done.
    """

    begin_ns: Instant
    end_ns: Instant
    pid: Pid
    tid: Pid
    call: Count
    """A `FileCall`."""
    file: Inode = 0
    """The file, as `Transfer.socket`; 0: unknown, or the call names none."""
    bytes: Bits64 = 0
    """How much the call is about: a length; of sync_file_range the offset, of io_uring_enter what was submitted."""
    ret: Returned = 0
    """What it returned; 0 for an address."""
    off_cpu_ns: MaybeDuration = -1
    """Time off the CPU in the call; -1 unknown."""
