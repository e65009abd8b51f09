# SPDX-License-Identifier: Apache-2.0
"""All reads of /proc. Its contents are chosen by other processes and can disappear at any time.

In: pids and thread ids. Out: bytes, text (malformed bytes replaced), or a fact. The functions of the first half raise
`ProcessLookupError` if the process, the thread or the file is gone, for every errno of the kernel and also during a
walk; and `PermissionError` if access is denied. The functions of the second half never raise: their docstrings give the
value that they return instead. Both raise PreflightError if there is no descriptor left to read with: a process
that cannot be looked at must not pass for one that is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from ebpf_mig.linux import kvm
from ebpf_mig.linux.limits import require_descriptor

_GONE = {errno.ENOENT, errno.ESRCH, errno.ENOTDIR, errno.ENXIO}
"""ENOENT: the directory is gone; ESRCH: the task, once the file was open; ENXIO: its network namespace."""
_REFUSED = {errno.EPERM, errno.EACCES}
FILE_MOST_BYTES = 1 << 20
"""Bytes read of one file. Command lines can be longer, but only their beginning is needed."""
_PF_EXITING = 0x4
"""include/linux/sched.h: getting shut down."""
_PF_USER_WORKER = 0x4000
"""include/linux/sched.h, Linux 6.4: a thread of the process that never runs in user space."""


def path(*parts: int | str) -> str:
    """A path below /proc, for files that are opened elsewhere or passed to a command on another host."""
    return "/".join(("/proc", *map(str, parts)))


def read(*parts: int | str, limit: int = FILE_MOST_BYTES) -> bytes:
    """The first `limit` bytes of a file below /proc. Raises the errors of the module docstring."""
    with _translated():
        fd = os.open(path(*parts), os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = bytearray()
            while len(data) < limit and (more := os.read(fd, limit - len(data))):
                data += more
            return bytes(data)
        finally:
            os.close(fd)


def text(*parts: int | str, limit: int = FILE_MOST_BYTES) -> str:
    """As `read`, decoded; invalid UTF-8 is replaced."""
    return decoded(read(*parts, limit=limit))


def names(*parts: int | str) -> list[str]:
    """The entries of a directory below /proc; raises as `read`."""
    with _translated():
        return os.listdir(path(*parts))  # noqa: PTH208


def link(*parts: int | str) -> str:
    """The target of a link below /proc; raises as `read`."""
    with _translated():
        return decoded(os.readlink(os.fsencode(path(*parts))))  # noqa: PTH115


def inode(*parts: int | str) -> int:
    """The inode number of the target of a path below /proc; raises as `read`."""
    return status(*parts).st_ino


def status(*parts: int | str) -> os.stat_result:
    """What stat(2) says of the target of a path below /proc; raises as `read`."""
    with _translated():
        return os.stat(path(*parts))  # noqa: PTH116


def lines(*parts: int | str) -> Iterator[bytes]:
    """Lines of a file of any length, such as kallsyms; raises as `read`, also during the walk."""
    with _translated(), open(path(*parts), "rb") as file:  # noqa: PTH123
        yield from file


def decoded(data: bytes) -> str:
    """Decodes untrusted text and replaces malformed bytes. The kernel can cut a name within a character."""
    return data.decode("utf-8", "replace")


def host_name() -> str:
    """The name of this host. Treat it as untrusted text."""
    return decoded(os.fsencode(os.uname().nodename))


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Replaces the exceptions with one value if something is gone and another if access is denied."""
    try:
        yield
    except OSError as error:
        if error.errno in _GONE:
            raise ProcessLookupError(errno.ESRCH, "it is gone", error.filename) from error
        if error.errno in _REFUSED:
            raise PermissionError(error.errno, error.strerror, error.filename) from error
        require_descriptor(error)
        raise


def fields(pid: int | str, tid: int | None = None) -> dict[str, str]:
    """The fields of the `status` file of a process or thread, by name; raises as `read`."""
    where = (pid, "status") if tid is None else (pid, "task", tid, "status")
    rows = (line.partition(":") for line in text(*where).splitlines())
    return {name: value.strip() for name, _, value in rows}


def process_of(tid: int) -> int:
    """The process (tgid) that a thread belongs to; raises as `read`."""
    tgid = fields(tid).get("Tgid", "")
    if not re.fullmatch(r"\d{1,10}", tgid, re.ASCII):
        raise ProcessLookupError(errno.ESRCH, "its status names no process", path(tid, "status"))
    return int(tgid)


def numbers(pid: int, tid: int | None = None) -> list[str]:
    """The fields of `stat` after the name: the state, then numbers (proc(5), from field 3 on); raises as `read`."""
    where = (pid, "stat") if tid is None else (pid, "task", tid, "stat")
    found = text(*where).rpartition(")")[2].split()
    if len(found) < 20:
        raise ProcessLookupError(errno.ESRCH, "it is gone", path(*where))
    return found


def exists(pid: int, tid: int | None = None) -> bool:
    """Whether a process, or a thread in it, exists. A zombie exists."""
    return os.path.exists(path(pid) if tid is None else path(pid, "task", tid))  # noqa: PTH110


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    return start_time(pid) is not None


def is_ending(pid: int) -> bool:
    """Whether a process is gone, a zombie, or about to become one: its first thread has begun to exit."""
    try:
        found = numbers(pid)
        return found[0] in "ZX" or bool(int(found[6]) & _PF_EXITING)
    except OSError:
        return True


def start_time(pid: int) -> int | None:
    """Start time of the process, in ticks since boot; None if it is gone or a zombie."""
    try:
        found = numbers(pid)
        return None if found[0] in "ZX" else int(found[19])
    except (OSError, ValueError):
        return None


def processes() -> list[int]:
    """All visible process ids."""
    try:
        return [int(name) for name in names() if name.isdecimal()]
    except (OSError, ValueError):
        return []


def threads_of(pid: int) -> list[int]:
    """The thread ids of a process; none if it is gone."""
    try:
        return [int(name) for name in names(pid, "task")]
    except (OSError, ValueError):
        return []


def control_groups(pid: int) -> set[str]:
    """The lines of /proc/PID/task/TID/cgroup of all threads, each once; none if it is gone."""
    found: set[str] = set()
    for tid in threads_of(pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            found.update(text(pid, "task", tid, "cgroup").splitlines())
    return found


def comm(pid: int, tid: int | None = None) -> str:
    """The name of a process or a thread; empty if it is gone."""
    try:
        return text(pid, *(() if tid is None else ("task", tid)), "comm").strip()
    except (OSError, ValueError):
        return ""


def program(pid: int) -> str:
    """The name of the file that a process executes; empty if it is gone or access is denied.

    It has ` (deleted)` behind it if the file was replaced since.
    """
    try:
        return link(pid, "exe").rpartition("/")[2]
    except (OSError, ValueError):
        return ""


def command_line(pid: int) -> list[str]:
    """The arguments of a process, from the first 64 KiB of its command line; none if it is gone or a zombie."""
    try:
        return text(pid, "cmdline", limit=1 << 16).split("\0")
    except (OSError, ValueError):
        return []


def cpu_ticks(pid: int, tid: int) -> int:
    """CPU time of a thread in clock ticks; 0 if it is gone."""
    try:
        found = numbers(pid, tid)
        return int(found[11]) + int(found[12])
    except (OSError, ValueError):
        return 0


def page_faults(pid: int, tid: int) -> tuple[int, int] | None:
    """How many minor and major page faults a thread has had (fields 10 and 12 of `stat`); None if it has exited."""
    try:
        found = numbers(pid, tid)
        return int(found[7]), int(found[9])
    except (OSError, ValueError, IndexError):
        return None


def stolen_ns() -> dict[int, int]:
    """Time for which a hypervisor withheld each CPU since boot, in ns, by its number; empty if it cannot be read.

    Source: the eighth figure of the lines `cpuN` of /proc/stat (fs/proc/stat.c, `show_stat`), in clock ticks.
    """
    tick = 10**9 // os.sysconf("SC_CLK_TCK")
    found: dict[int, int] = {}
    try:
        for line in text("stat").splitlines():
            name, *figures = line.split(" ")
            if not name.startswith("cpu"):
                break
            if name != "cpu":
                found[int(name[3:])] = int(figures[7]) * tick
    except (OSError, ValueError, IndexError):
        return {}
    return found


def is_virtual() -> bool:
    """Whether a hypervisor may run below this host. On x86 the CPU says so; elsewhere it is taken for granted."""
    try:
        said = next((line for line in lines("cpuinfo") if line.startswith(b"flags")), None)
    except OSError:
        return True
    return said is None or b"hypervisor" in said.split()


def resident_bytes(pid: int) -> int:
    """Resident memory; 0 if the process is gone."""
    try:
        return int(read(pid, "statm").split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError, ValueError):
        return 0


def may_run_vcpu(pid: int, tid: int) -> bool:
    """Whether a thread is inside KVM_RUN, or on a CPU, where it may be inside KVM_RUN."""
    try:
        return text(pid, "task", tid, "syscall").startswith("running") or in_kvm_run(pid, tid) is not None
    except OSError:
        return False


def in_kvm_run(pid: int, tid: int) -> int | None:
    """The descriptor of the vCPU if a thread sleeps inside KVM_RUN, otherwise None.

    /proc/PID/task/TID/syscall begins with ioctl's number, fd, request. Since Linux 6.13 the threads of a VMM include
    `kvm-nx-lpage-recovery`. It is created inside KVM_RUN of a vCPU and permanently shows the registers of that call;
    the flags in `stat` identify it.
    """
    try:
        call = text(pid, "task", tid, "syscall").split()
        worker = int(numbers(pid, tid)[6]) & _PF_USER_WORKER
        return int(call[1], 16) if len(call) > 2 and call[2] == hex(kvm.RUN) and not worker else None
    except (OSError, ValueError):
        return None
