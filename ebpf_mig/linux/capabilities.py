# SPDX-License-Identifier: Apache-2.0
"""Capabilities of this process: which it holds, whether they suffice for tracing, and dropping them permanently.

In: /proc, and the names to keep. Out: the capabilities held; a PreflightError with a remedy if some are missing, before
LLVM is started; the calling process without all other capabilities (capabilities(7), prctl(2)). A process cannot be
made to misuse a capability that it does not have.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import bpf, procfs
from ebpf_mig.linux.limits import require_room
from ebpf_mig.linux.namespaces import require_host_pids, require_host_users

NUMBERS = {
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_SYSLOG": 34,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
"""include/uapi/linux/capability.h: the relevant ones. Tracing needs BPF and PERFMON (Linux 5.8), or SYS_ADMIN."""
_IDENTITY = {"CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8}
"""Needed to give up identity and privilege."""
ENGINE = ("CAP_BPF", "CAP_PERFMON", "CAP_SYS_PTRACE", "CAP_SYSLOG", "CAP_DAC_READ_SEARCH")
"""Needed by `watch` while it runs: to arm, to read /proc of other users, to name kernel functions."""
LOADER = ("CAP_BPF", "CAP_PERFMON", "CAP_SYS_ADMIN", "CAP_SYS_RESOURCE")
"""Needed for loading. The last two are used only if held: old kernels need them, and so does the check that each
program fires.
"""

SUPERVISOR = (*LOADER, *ENGINE, "CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
"""Needed by the exporter's supervisor: what its processes need, or give up."""

NOBODY = 65534

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


def capabilities() -> set[str]:
    """The relevant capabilities that are effective."""
    effective = _held("CapEff")
    return {name for name, number in NUMBERS.items() if effective >> number & 1}


def has_seccomp_filter() -> bool:
    """Whether a seccomp filter is in force."""
    return procfs.fields("self").get("Seccomp") == "2"


def require_tracing() -> None:
    """PreflightError if tracing cannot work. Call it before anything is started."""
    from ebpf_mig.linux.memory import require_memory  # with pathlib, which the exporter's small processes do not load

    require_host_pids()
    require_privilege()
    require_room()
    require_memory()


def require_privilege() -> None:
    """PreflightError with what helps, if this process may not load tracing programs."""
    require_host_users()
    require_capabilities()
    require_bpf_call()


def require_capabilities() -> None:
    """PreflightError with a command line that works, if this process lacks a capability that tracing needs."""
    held = capabilities()
    if "CAP_SYS_ADMIN" not in held and not {"CAP_BPF", "CAP_PERFMON"} <= held:
        again = f"sudo env PATH=$PATH {os.path.realpath(sys.argv[0])} {' '.join(sys.argv[1:])}".rstrip()
        raise PreflightError(f"uid {os.geteuid()} may not load BPF programs", f"run as root: {again}")


def require_bpf_call() -> None:
    """PreflightError if a seccomp filter blocks bpf(2). The process must have the capabilities."""
    if has_seccomp_filter() and bpf.is_forbidden():
        raise PreflightError(
            "a seccomp filter forbids bpf(2)",
            "start the container with seccomp=unconfined, or a profile that allows bpf and perf_event_open",
        )


def keep_only(names: Iterable[str], *, pass_on: bool = False) -> None:
    """Keeps only these of the held capabilities, in every set, and blocks gaining others. OSError if refused.

    `pass_on`: programs that this process executes get what it keeps. Root's get it anyway.
    """
    numbers = NUMBERS | _IDENTITY
    wanted = sum(1 << numbers[name] for name in set(names))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if not pass_on:
        _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for number in range(64):
        if not wanted >> number & 1:
            _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)  # fails after the last capability, or without CAP_SETPCAP
    held = permitted() & wanted
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    inherited = _held("CapInh") & held if pass_on else 0
    low, high, mask = held & 0xFFFFFFFF, held >> 32, 0xFFFFFFFF
    data = (ctypes.c_uint32 * 6)(low, low, inherited & mask, high, high, inherited >> 32)
    if _libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset refused")


def become_nobody() -> None:
    """Drops every capability, and root's user id if the process has it. Modules can still be imported."""
    hidden = os.geteuid() == 0 and _open_hidden_places()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        for number in range(64):
            _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if hidden:  # /proc/self/fd is readable again
        _prctl(_PR_SET_DUMPABLE, 1)
    keep_only(())


def _open_hidden_places() -> bool:
    """Keeps import directories usable that only root can reach (a clone under /root), through open descriptors."""
    packages = [module for module in list(sys.modules.values()) if isinstance(getattr(module, "__path__", 0), list)]
    lists = [sys.path, *(package.__path__ for package in packages)]
    places = {place for places in lists for place in places}
    now = {
        place: procfs.path("self", "fd", os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        for place in sorted(places)
        if os.path.isdir(place) and not _all_may_enter(place)  # noqa: PTH112
    }
    for places_of in lists:
        places_of[:] = [now.get(place, place) for place in places_of]
    return bool(now)


def _all_may_enter(place: str) -> bool:
    while place != "/":
        if not os.stat(place).st_mode & 1:  # noqa: PTH116
            return False
        place = os.path.dirname(place)  # noqa: PTH120
    return True


def die_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when `parent` ends, for any reason."""
    _prctl(_PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:
        os._exit(1)


def permitted() -> int:
    """The permitted capabilities of this process as a bit set."""
    return _held("CapPrm")


def _held(kind: str) -> int:
    return int(procfs.fields("self")[kind], 16)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option} refused")
