# SPDX-License-Identifier: Apache-2.0
"""perf_event_open(2): probes on kernel functions, tracepoints, and a sampling clock on one thread.

In: the name of a function or tracepoint, or a thread id, and a loaded BPF program. Out: perf events that run the
program. Closing them, or the end of this process, removes everything. bcc's own kprobes would leave entries in tracefs
if the process is killed.
Layout: include/uapi/linux/perf_event.h (`struct perf_event_attr`), Linux 5.10 and later.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path

from ebpf_mig.linux import bpf
from ebpf_mig.linux.bpf import KRETPROBE

SYS_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}

_ENABLE, _DISABLE, _PERIOD, _SET_BPF = 0x2400, 0x2401, 0x40082404, 0x40042408
_ATTR_BYTES = 112
_DISABLED, _EXCLUDE_USER = 1, 1 << 4
_CLOEXEC = 8
_SOFTWARE, _CPU_CLOCK = 1, 0
_TRACEPOINT = 2
_TRACEFS = (Path("/sys/kernel/tracing/events"), Path("/sys/kernel/debug/tracing/events"))
_KPROBE_PMU = Path("/sys/bus/event_source/devices/kprobe")

_libc = ctypes.CDLL(None, use_errno=True)


def _open(*parts: tuple[int, str, int], thread: int = -1, cpu: int = -1) -> int:
    """Opens an event from the (offset, format, value) of its attributes. OSError if the kernel refuses it."""
    attr = ctypes.create_string_buffer(_ATTR_BYTES)
    for offset, form, value in ((4, "I", _ATTR_BYTES), *parts):
        struct.pack_into("=" + form, attr, offset, value)
    number = SYS_PERF_EVENT_OPEN.get(os.uname().machine)
    if number is None:
        raise OSError("perf_event_open has no known number on this machine")
    fd = int(_libc.syscall(number, attr, thread, cpu, -1, _CLOEXEC))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def is_forbidden() -> bool:
    """Whether perf_event_open(2) is blocked (by a seccomp filter, say). The kernel returns EINVAL for unknown flags."""
    number = SYS_PERF_EVENT_OPEN.get(os.uname().machine)
    if number is None or _libc.syscall(number, None, 0, -1, -1, ctypes.c_long(-1)) >= 0:
        return False
    return ctypes.get_errno() in (errno.EPERM, errno.ENOSYS)


class KprobeEvent:
    """A kprobe or kretprobe on a function, as a perf event: it ends with its descriptor or with this process.

    `attach` and `detach` alternate. The probe exists while the event is open; without a program it does nothing.
    """

    def __init__(self, function: str, how: str, fd: int = -1) -> None:
        """`fd`: an event that another process opened. OSError if there is no such function or it cannot be probed."""
        self.function, self.how = function, how
        self._handed = fd >= 0
        self.fd = fd
        self.open()
        self._link = -1
        self._kept = False

    def open(self) -> int:
        """The descriptor of the event. Opens it again if `detach` had to close it."""
        if self.fd < 0:
            self.fd = self._open()
        return self.fd

    def _open(self) -> int:
        kind = int((_KPROBE_PMU / "type").read_text())
        bit = int((_KPROBE_PMU / "format/retprobe").read_text().strip().partition(":")[2] or 0)
        name = ctypes.create_string_buffer(self.function.encode())
        config = 1 << bit if self.how == KRETPROBE else 0
        return _open((0, "I", kind), (8, "Q", config), (40, "Q", _DISABLED), (56, "Q", ctypes.addressof(name)), cpu=0)

    def attach(self, program: int) -> None:
        """Starts to run `program` at the probe, through a link if the kernel has them (Linux 5.15)."""
        self.open()
        if self._kept:
            return
        try:
            self._link = bpf.link_perf_event(program, self.fd)
        except OSError:
            self._set(program)
            self._kept = True
        fcntl.ioctl(self.fd, _ENABLE, 0)

    def _set(self, program: int) -> None:
        """Attaches without a link. An event that was received in attached state keeps its program."""
        try:
            fcntl.ioctl(self.fd, _SET_BPF, program)
        except FileExistsError:
            if not self._handed:
                raise

    def detach(self) -> None:
        """Stops the program. Without links this takes closing the event, so a received event continues to run it."""
        with contextlib.suppress(OSError):
            fcntl.ioctl(self.fd, _DISABLE, 0)
        if self._link >= 0:
            os.close(self._link)
            self._link = -1
        elif not self._handed:
            self.close()
            self._kept = False

    def close(self) -> None:
        """Removes the probe; idempotent."""
        for fd in (self._link, self.fd):
            if fd >= 0:
                os.close(fd)
        self._link = self.fd = -1


def has_trace_event(name: str) -> bool:
    """Whether `attach_trace_event` may work: tracefs shows the event, and perf_event_open(2) is not blocked."""
    return _trace_event(name) >= 0 and not is_forbidden()


def _trace_event(name: str) -> int:
    """The number of an event of tracefs, -1 if it cannot be read."""
    for events in _TRACEFS:
        with contextlib.suppress(OSError):
            return int((events / name / "id").read_text())
    return -1


def attach_trace_event(program: int, name: str) -> int:
    """Runs `program` at a tracepoint such as `raw_syscalls/sys_enter` until the result is closed; OSError if refused.

    The program runs on every CPU, and the event need not be enabled (perf_trace_run_bpf_submit, kernel/events/core.c).
    While it is open, the tracepoint fires; the link keeps it open. Needs links (Linux 5.15).
    """
    event = _open((0, "I", _TRACEPOINT), (8, "Q", _trace_event(name)), (40, "Q", _DISABLED), cpu=0)
    try:
        return bpf.link_perf_event(program, event)
    finally:
        os.close(event)


class ThreadClock:
    """A CPU clock event on one thread that runs a BPF program. OSError if the kernel refuses it."""

    def __init__(self, tid: int, program_fd: int, period_ns: int) -> None:
        software, flags = (0, "I", _SOFTWARE), (40, "Q", _DISABLED | _EXCLUDE_USER)
        self.fd = _open(software, (8, "Q", _CPU_CLOCK), (16, "Q", period_ns), flags, thread=tid)
        try:
            fcntl.ioctl(self.fd, _SET_BPF, program_fd)
        except OSError:
            os.close(self.fd)
            raise

    def pace(self, period_ns: int) -> None:
        """Sets the sampling period in ns of the thread's CPU time; 0: no samples."""
        if not period_ns:
            fcntl.ioctl(self.fd, _DISABLE, 0)
            return
        fcntl.ioctl(self.fd, _PERIOD, struct.pack("=Q", period_ns))
        fcntl.ioctl(self.fd, _ENABLE, 0)

    def close(self) -> None:
        os.close(self.fd)
