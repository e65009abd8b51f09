# SPDX-License-Identifier: Apache-2.0
"""What other people's BPF programs cost, as the kernel counts it: the witness of a witness.

In: nothing. Out: programs by number, with run time and runs, which the kernel adds up while a `BpfStatistics` is open.
bpf(2) commands 11, 13 and 15: BPF_PROG_GET_NEXT_ID, BPF_PROG_GET_FD_BY_ID, BPF_OBJ_GET_INFO_BY_FD, and
`struct bpf_prog_info`, whose name is at offset 64 (include/uapi/linux/bpf.h, Linux 4.15).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from dataclasses import dataclass

from ebpf_mig.probes.hooks import run_statistics
from ebpf_mig.probes.kernelcalls import _attributes, _bpf

_NEXT_ID, _FD_BY_ID, _INFO = 11, 13, 15
_NAME_AT, _NAME_BYTES = 64, 16


@dataclass(frozen=True)
class Counted:
    """A loaded program: its name, cut off by the kernel at 15 characters, and what it ran so far."""

    name: str
    ns: int
    runs: int

    @property
    def ns_a_run(self) -> float:
        """0 if it never ran."""
        return self.ns / self.runs if self.runs else 0


def counted() -> dict[int, Counted]:
    """All programs that are loaded now, by number."""
    found, last = dict[int, Counted](), 0
    with contextlib.suppress(FileNotFoundError):
        while True:
            asked = _attributes((0, "I", last))
            _bpf(_NEXT_ID, asked)
            (last,) = struct.unpack_from("=I", asked, 4)
            with contextlib.suppress(OSError):  # gone meanwhile
                fd = _bpf(_FD_BY_ID, _attributes((0, "I", last)))
                found[last] = Counted(_name(fd), *run_statistics(fd))
                os.close(fd)
    return found


def _name(fd: int) -> str:
    info = ctypes.create_string_buffer(_NAME_AT + _NAME_BYTES)
    _bpf(_INFO, _attributes((0, "I", fd), (4, "I", len(info)), (8, "Q", ctypes.addressof(info))))
    return info.raw[_NAME_AT:].partition(b"\0")[0].decode()
