# SPDX-License-Identifier: Apache-2.0
"""All reads of /proc. What lies there was chosen by others, and is gone the next moment.

In: pids and thread ids. Out: bytes, text (malformed bytes replaced), or a fact. The functions of the first half raise
`ProcessLookupError` where the process, the thread or the file is gone, whatever the kernel says of it and also amid a
walk, and `PermissionError` where we may not look. The facts below them never raise: each says what it answers instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from ebpf_mig.linux import kvm

_GONE = {errno.ENOENT, errno.ESRCH, errno.ENOTDIR, errno.ENXIO}
"""ENOENT: the directory is gone; ESRCH: the task, once the file was open; ENXIO: its network namespace."""
_REFUSED = {errno.EPERM, errno.EACCES}
FILE_MOST_BYTES = 1 << 20
"""Of one file; command lines can be longer, and nothing that is read of them lies so far behind."""
_PF_EXITING = 0x4
"""include/linux/sched.h: getting shut down."""
_PF_USER_WORKER = 0x4000
"""include/linux/sched.h, Linux 6.4: a thread of the process that never runs in user space."""
_VM, _VCPU = "anon_inode:kvm-vm", "anon_inode:kvm-vcpu:"
"""Link texts: kvm_dev_ioctl_create_vm and create_vcpu_fd in virt/kvm/kvm_main.c."""


def path(*parts: int | str) -> str:
    """A path below /proc, for what is opened, or named to a command on another host, and not read here."""
    return "/".join(("/proc", *map(str, parts)))


def read(*parts: int | str, limit: int = FILE_MOST_BYTES) -> bytes:
    """The first `limit` bytes of a file below /proc. ProcessLookupError, PermissionError: see above."""
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
    """As `read`, decoded; what is no UTF-8 is replaced."""
    return decoded(read(*parts, limit=limit))


def names(*parts: int | str) -> list[str]:
    """The entries of a directory below /proc; raises as `read`."""
    with _translated():
        return os.listdir(path(*parts))  # noqa: PTH208


def link(*parts: int | str) -> str:
    """Where a link below /proc points to; raises as `read`."""
    with _translated():
        return decoded(os.readlink(os.fsencode(path(*parts))))  # noqa: PTH115


def inode(*parts: int | str) -> int:
    """The inode number of what a path below /proc leads to; raises as `read`."""
    with _translated():
        return os.stat(path(*parts)).st_ino  # noqa: PTH116


def lines(*parts: int | str) -> Iterator[bytes]:
    """Lines of a file of any length, such as kallsyms; raises as `read`, also amid the walk."""
    with _translated(), open(path(*parts), "rb") as file:  # noqa: PTH123
        yield from file


def decoded(data: bytes) -> str:
    """Text that others chose, malformed bytes replaced: the kernel cuts names also within a character."""
    return data.decode("utf-8", "replace")


def host_name() -> str:
    """This host's name, which whoever may set it chose."""
    return decoded(os.fsencode(os.uname().nodename))


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """One answer where something is gone, another where it is refused."""
    try:
        yield
    except OSError as error:
        if error.errno in _GONE:
            raise ProcessLookupError(errno.ESRCH, "it is gone", error.filename) from error
        if error.errno in _REFUSED:
            raise PermissionError(error.errno, error.strerror, error.filename) from error
        raise


def fields(pid: int | str, tid: int | None = None) -> dict[str, str]:
    """The lines of a process's or thread's `status` by their names; raises as `read`."""
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
    """What follows the name in `stat`: the state first, then numbers (proc(5), from field 3 on); raises as `read`."""
    where = (pid, "stat") if tid is None else (pid, "task", tid, "stat")
    found = text(*where).rpartition(")")[2].split()
    if len(found) < 20:
        raise ProcessLookupError(errno.ESRCH, "it is gone", path(*where))
    return found


def exists(pid: int, tid: int | None = None) -> bool:
    """Whether there is such a process, or such a thread in it. A zombie is there."""
    return os.path.exists(path(pid) if tid is None else path(pid, "task", tid))  # noqa: PTH110


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    return start_time(pid) is not None


def is_ending(pid: int) -> bool:
    """Whether a process is gone, a zombie, or about to be one: its first thread has begun to exit."""
    try:
        found = numbers(pid)
        return found[0] in "ZX" or bool(int(found[6]) & _PF_EXITING)
    except OSError:
        return True


def start_time(pid: int) -> int | None:
    """When the process began, in ticks since boot; None if it is gone or a zombie."""
    try:
        found = numbers(pid)
        return None if found[0] in "ZX" else int(found[19])
    except (OSError, ValueError):
        return None


def processes() -> list[int]:
    """All process ids that can be seen."""
    try:
        return [int(name) for name in names() if name.isdecimal()]
    except (OSError, ValueError):
        return []


def threads_of(pid: int) -> list[int]:
    """The thread ids of a process, none if it is gone."""
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
    """The name of a process or of a thread, empty if it is gone."""
    try:
        return text(pid, *(() if tid is None else ("task", tid)), "comm").strip()
    except (OSError, ValueError):
        return ""


def command_line(pid: int) -> list[str]:
    """Its arguments, as far as they lie in the first 64 KiB; none if it is gone or a zombie."""
    try:
        return text(pid, "cmdline", limit=1 << 16).split("\0")
    except (OSError, ValueError):
        return []


def cpu_ticks(pid: int, tid: int) -> int:
    """CPU time of a thread in clock ticks, 0 if it is gone."""
    try:
        found = numbers(pid, tid)
        return int(found[11]) + int(found[12])
    except (OSError, ValueError):
        return 0


def resident_bytes(pid: int) -> int:
    """Resident memory, 0 if the process is gone."""
    try:
        return int(read(pid, "statm").split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError, ValueError):
        return 0


def descriptors(pid: int) -> Iterator[tuple[int, str]]:
    """(number, what it leads to) of each open descriptor; none if the process is gone or may not be looked at."""
    try:
        found = names(pid, "fd")
    except (OSError, ValueError):
        return
    for name in found:
        with contextlib.suppress(OSError, ValueError):
            yield int(name), link(pid, "fd", name)


def socket_descriptor(pid: int, inode: int) -> int | None:
    """The descriptor by which a process has a socket open; None if it has closed it, -1 if that cannot be seen."""
    try:
        found = names(pid, "fd")
        for name in found:
            with contextlib.suppress(ProcessLookupError):
                if link(pid, "fd", name) == f"socket:[{inode}]":
                    return int(name)
    except OSError:
        return -1
    return None


def bytes_written(pid: int) -> int | None:
    """Bytes that a process has passed to write(2) and its like (`wchar` of /proc/PID/io): to files, to pipes, and to
    sockets other than by sendmsg. None if that cannot be read."""
    try:
        rows = dict(row.split(": ", 1) for row in text(pid, "io").splitlines() if ": " in row)
        return int(rows["wchar"])
    except (OSError, KeyError, ValueError):
        return None


def holds_vm(pid: int) -> bool:
    """Whether the process has a KVM machine open; False where we may not look."""
    return any(target == _VM for _, target in descriptors(pid))


def holds_kvm(pid: int) -> bool:
    """Whether it has a KVM machine or /dev/kvm open: a VMM that waits for its VM has the latter."""
    return any(target in (_VM, "/dev/kvm") for _, target in descriptors(pid))


def vcpus_of(pid: int) -> dict[int, int]:
    """The number that KVM knows a vCPU by (on x86 its APIC id), by descriptor."""
    pairs = ((fd, target.removeprefix(_VCPU)) for fd, target in descriptors(pid) if target.startswith(_VCPU))
    return {fd: int(number) for fd, number in pairs if number.isdecimal()}


def may_run_vcpu(pid: int, tid: int) -> bool:
    """Whether a thread is inside KVM_RUN, or on a CPU and so cannot be seen to be outside."""
    try:
        return text(pid, "task", tid, "syscall").startswith("running") or in_kvm_run(pid, tid) is not None
    except OSError:
        return False


def in_kvm_run(pid: int, tid: int) -> int | None:
    """The vCPU's descriptor if a thread sleeps inside KVM_RUN, else None.

    /proc/PID/task/TID/syscall begins with ioctl's number, fd, request.
    Since Linux 6.13 a VM's `kvm-nx-lpage-recovery` is among its threads, born inside a vCPU's KVM_RUN and showing its
    registers for ever; the flags in `stat` give it away.
    """
    try:
        call = text(pid, "task", tid, "syscall").split()
        worker = int(numbers(pid, tid)[6]) & _PF_USER_WORKER
        return int(call[1], 16) if len(call) > 2 and call[2] == hex(kvm.RUN) and not worker else None
    except (OSError, ValueError):
        return None
