# SPDX-License-Identifier: Apache-2.0
"""What other people's BPF programs cost, as the kernel counts it: the witness of a witness.

In: program numbers. Out: ns of run time, which the kernel adds up while anybody holds a `BpfStatistics`.
bpf(2) commands 11 and 13: BPF_PROG_GET_NEXT_ID, BPF_PROG_GET_FD_BY_ID (include/uapi/linux/bpf.h, Linux 4.13).
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable

from ebpf_mig.probes.hooks import run_statistics
from ebpf_mig.probes.kernelcalls import _attributes, _bpf

_NEXT_ID, _FD_BY_ID = 11, 13


def loaded() -> set[int]:
    """The numbers of all programs that are loaded now."""
    found, last = set[int](), 0
    with contextlib.suppress(FileNotFoundError):
        while True:
            asked = _attributes((0, "I", last))
            _bpf(_NEXT_ID, asked)
            (last,) = struct.unpack_from("=I", asked, 4)
            found.add(last)
    return found


def run_time_ns(numbers: Iterable[int]) -> int:
    """How long they ran, all together; those that are gone count nothing."""
    total = 0
    for number in numbers:
        with contextlib.suppress(OSError):
            fd = _bpf(_FD_BY_ID, _attributes((0, "I", number)))
            total += run_statistics(fd)[0]
            os.close(fd)
    return total
