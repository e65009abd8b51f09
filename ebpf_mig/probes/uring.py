# SPDX-License-Identifier: Apache-2.0
"""Where the tracepoints of io_uring have their arguments (include/trace/events/io_uring.h): each kernel has others.

In: the running kernel's BTF. Out: an `Arguments`, or None if they do not say which request has completed. The programs
are in `bpf/uring.bpf.c`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebpf_mig.linux import btf
from ebpf_mig.probes.hook_points import IO_URING

_OPCODE, _FILE, _FLAGS = ("io_kiocb", "opcode"), ("io_kiocb", "file"), ("io_sync", "flags")
_NAMES = frozenset(name for name, _ in IO_URING.all_hooks)
_REQUEST = {
    (True, True, False, False, False, False, False): 1,
    (True, False): 0,
    (True,): 0,
}
"""The request that is submitted, by which arguments are pointers: Linux 5.18 (ctx, req, user_data, opcode, flags and
two flags), 6.1 (req, force_nonblock), 6.12 (req). Linux 5.10 passes no request: ctx, opcode, user_data and two flags.
"""
_RESULT = {
    (True, True, False, False, False): 3,
    (True, True, False, False, False, False, False): 3,
    (True, True, True): 2,
}
"""The same for the result of a request: Linux 5.18 (ctx, req, user_data, res, cflags), 6.1 and 6.12 (two more), 6.18
(ctx, req, cqe). Linux 5.10 passes no request: ctx, user_data, res.
"""
_IN_CQE = 2


@dataclass(frozen=True)
class Arguments:
    """Positions of arguments."""

    submitted: int
    """The request, of the tracepoint that shows its submission. The other one has it second."""
    result: int
    """Its result, or where that is, of the one that shows its completion."""

    @property
    def in_cqe(self) -> bool:
        """Whether the result is in a `struct io_uring_cqe`."""
        return self.result == _IN_CQE


def arguments(path: str = btf.VMLINUX) -> Arguments | None:
    """Where the arguments are; None if the kernel has no such tracepoints, or passes no request, or unknown ones."""
    submitted = (btf.tracepoint_arguments(path, name) for name, _ in IO_URING.one_of)
    request = next((_REQUEST[found] for found in submitted if found in _REQUEST), None)
    result = _RESULT.get(btf.tracepoint_arguments(path, IO_URING.hooks[0][0]))
    return None if request is None or result is None else Arguments(request, result)


def usable(tracepoints: set[str], path: str = btf.VMLINUX) -> set[str]:
    """The same tracepoints without those of io_uring if their arguments are of no use."""
    return tracepoints - _NAMES if tracepoints & _NAMES and arguments(path) is None else tracepoints


def defines(none: int, path: str = btf.VMLINUX) -> dict[str, int]:
    """Macros for `bpf/uring.bpf.c`. `none` stands for the offset of a member that the kernel does not have."""
    at = arguments(path) or Arguments(0, 0)
    offsets = btf.offsets(path, [_OPCODE, _FILE, _FLAGS])
    opcode, file, flags = offsets[_OPCODE], offsets[_FILE], offsets[_FLAGS]
    return {
        "URING_SUBMITTED": at.submitted,
        "URING_RESULT": at.result,
        "URING_RESULT_IN_CQE": int(at.in_cqe),
        "OFF_request_opcode": opcode or 0,
        "OFF_request_file": file or 0,
        # What is special to a kind of request begins with its file, as `struct io_sync` does (io_uring/sync.c).
        "OFF_request_fsync": none if file is None or flags is None else file + flags,
    }
