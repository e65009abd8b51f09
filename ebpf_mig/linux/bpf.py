# SPDX-License-Identifier: Apache-2.0
"""bpf(2) calls that not every version of bcc makes: programs on kernel functions.

In: instructions that bcc compiled, the name of a function. Out: file descriptors; closing them detaches and unloads
everything.
bcc before 0.31 does not support fentry on functions of modules.
Layouts: include/uapi/linux/bpf.h (`union bpf_attr`), Linux 5.10 and later.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import struct

FENTRY, FEXIT, KPROBE, KRETPROBE, ITERATOR = "fentry", "fexit", "kprobe", "kretprobe", "iterator"

SYS_BPF = {"x86_64": 321, "aarch64": 280}

_PROG_LOAD, _OBJ_INFO, _RAW_TRACEPOINT_OPEN, _BTF_GET_FD, _BTF_NEXT = 5, 15, 17, 19, 23
_LINK_CREATE, _ENABLE_STATS, _ITER_CREATE = 28, 32, 33
_NO_COMMAND = 0x7FFFFFFF
_TYPE_KPROBE, _TYPE_TRACING = 2, 26
_ATTACH = {FENTRY: 24, FEXIT: 25, ITERATOR: 28}
_ATTACH_PERF_EVENT = 41
_LOG_BYTES = 1 << 16
_PROGRAM_INFO = 216
"""The size of `struct bpf_prog_info` up to and including `recursion_misses`."""

_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    number = SYS_BPF.get(os.uname().machine)
    if number is None:
        raise OSError("bpf(2) has no known number on this machine")
    result = int(_libc.syscall(number, command, attributes, len(attributes)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _attributes(*parts: tuple[int, str, int]) -> ctypes.Array[ctypes.c_char]:
    """A `union bpf_attr` of 128 bytes from (offset, format, value); later bytes are not used."""
    buffer = ctypes.create_string_buffer(128)
    for offset, form, value in parts:
        struct.pack_into("=" + form, buffer, offset, value)
    return buffer


def load(code: bytes, how: str, btf_id: int = 0, btf_fd: int = 0) -> int:
    """Loads instructions for one way of attaching; returns the descriptor. OSError with the verifier's last words.

    `btf_id` identifies the function for fentry and fexit, in vmlinux's BTF or in the BTF of `btf_fd`; for an iterator,
    the function `bpf_iter_...` of what it walks over.
    """
    with contextlib.suppress(ValueError, OSError):  # before Linux 5.11, programs count as locked memory
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    instructions, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(_LOG_BYTES)
    kind = _TYPE_TRACING if how in _ATTACH else _TYPE_KPROBE
    parts = [
        (0, "I", kind), (4, "I", len(code) // 8), (8, "Q", ctypes.addressof(instructions)),
        (16, "Q", ctypes.addressof(licence)), (68, "I", _ATTACH.get(how, 0)), (108, "I", btf_id), (112, "I", btf_fd),
    ]  # fmt: skip
    try:
        return _bpf(_PROG_LOAD, _attributes(*parts))
    except OSError as error:
        with contextlib.suppress(OSError):
            log_buffer = [(24, "I", 1), (28, "I", _LOG_BYTES), (32, "Q", ctypes.addressof(log))]
            return _bpf(_PROG_LOAD, _attributes(*parts, *log_buffer))
        lines = [line for line in log.value.decode(errors="replace").splitlines() if line.strip()]
        detail = next((line for line in reversed(lines) if not line.startswith("processed ")), error.strerror)
        raise OSError(error.errno, detail) from error


def attach_tracing(program: int, tracepoint: str = "") -> int:
    """Attaches a program to a raw tracepoint, or an fentry or fexit program to the function it was loaded for.

    Closing the result detaches the program. OSError if the kernel has no such tracepoint.
    """
    name = ctypes.create_string_buffer(tracepoint.encode())
    return _bpf(
        _RAW_TRACEPOINT_OPEN, _attributes((0, "Q", ctypes.addressof(name) if tracepoint else 0), (8, "I", program))
    )


def link_perf_event(program: int, event: int) -> int:
    """Runs `program` at a perf event until the result is closed (Linux 5.15); OSError before that."""
    return _bpf(_LINK_CREATE, _attributes((0, "I", program), (4, "I", event), (8, "I", _ATTACH_PERF_EVENT)))


def iterate(program: int) -> None:
    """Runs an iterator program once for each object of its kind, and drops what it prints (Linux 5.8)."""
    link = _bpf(_LINK_CREATE, _attributes((0, "I", program), (8, "I", _ATTACH[ITERATOR])))
    try:
        walk = _bpf(_ITER_CREATE, _attributes((0, "I", link)))
        try:
            while os.read(walk, 4096):
                pass
        finally:
            os.close(walk)
    finally:
        os.close(link)


def is_forbidden() -> bool:
    """Whether bpf(2) is blocked (by a seccomp filter, say). The kernel returns EINVAL for an unknown command."""
    try:
        _bpf(_NO_COMMAND, _attributes())
    except OSError as error:
        return error.errno in (errno.EPERM, errno.ENOSYS)
    return False


def count_run_time() -> int:
    """A descriptor that makes the kernel count BPF run time while it is open (BPF_ENABLE_STATS, Linux 5.8).

    OSError without CAP_SYS_ADMIN.
    """
    return _bpf(_ENABLE_STATS, _attributes())


def run_time(program: int) -> tuple[int, int, int]:
    """(run time in ns, runs, recursion misses) of a program: `struct bpf_prog_info`, from offset 192 on.

    The first two are counted while `count_run_time` is in force. Recursion misses are 0 before Linux 5.12. A third of
    the time of reading /proc/self/fdinfo, which has the same figures.
    """
    info = ctypes.create_string_buffer(_PROGRAM_INFO)
    _bpf(_OBJ_INFO, _attributes((0, "I", program), (4, "I", len(info)), (8, "Q", ctypes.addressof(info))))
    run_time_ns, runs, misses = struct.unpack_from("=QQQ", info, _PROGRAM_INFO - 24)
    return run_time_ns, runs, misses


def module_btf(name: str) -> int:
    """A descriptor of a module's BTF; -1 if there is none or CAP_SYS_ADMIN is missing."""
    number = 0
    while True:
        try:
            buffer = _attributes((0, "I", number))
            _bpf(_BTF_NEXT, buffer)
            number = struct.unpack_from("=I", buffer, 4)[0]
            fd = _bpf(_BTF_GET_FD, _attributes((0, "I", number)))
        except OSError:
            return -1
        if _name_of(fd) == name:
            return fd
        os.close(fd)


def _name_of(fd: int) -> str:
    """The name of the module of a BTF descriptor: `struct bpf_btf_info`, name at offset 16, its length at 24."""
    text, info = ctypes.create_string_buffer(64), ctypes.create_string_buffer(32)
    struct.pack_into("=QI", info, 16, ctypes.addressof(text), len(text))
    try:
        _bpf(_OBJ_INFO, _attributes((0, "I", fd), (4, "I", len(info)), (8, "Q", ctypes.addressof(info))))
    except OSError:
        return ""
    return text.value.decode(errors="replace")
