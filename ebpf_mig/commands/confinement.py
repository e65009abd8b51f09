# SPDX-License-Identifier: Apache-2.0
"""Checks of what can confine a process that has all capabilities: user namespaces, seccomp, AppArmor, lockdown.

In: nothing. Out: one `Check` for each, which says what is in force and whether it is in the way. Where that can be
tried, it is tried.
Facts: kernel/bpf/syscall.c (`bpf_capable` asks the initial user namespace), security/lockdown/lockdown.c (reading
kernel memory is refused from `confidentiality` on), Linux 6.12.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import bpf, descriptors, perf, procfs
from ebpf_mig.linux.capabilities import (
    capabilities,
    has_seccomp_filter,
    require_bpf_call,
    require_capabilities,
    require_privilege,
)
from ebpf_mig.linux.check import MISSING, OK, WARN, Check
from ebpf_mig.linux.namespaces import has_host_users, require_host_users

SECURITYFS = "/sys/kernel/security"
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
_RETURN_0 = bytes.fromhex("b700000000000000 9500000000000000")
"""The shortest BPF program: r0 = 0; exit."""
_PROFILE = "deploy/kubernetes/seccomp.json"


def user_namespace() -> Check:
    """Whether root here is the host's root."""
    try:
        require_host_users()
    except PreflightError as error:
        return Check("user namespace", MISSING, str(error), error.remedy or "", required=True)
    return Check("user namespace", OK, "the host's", required=True)


def seccomp() -> Check:
    """Whether a filter is in force, and blocks bpf(2) or perf_event_open(2)."""
    if not has_seccomp_filter():
        return Check("seccomp", OK, "no filter", required=True)
    try:
        require_capabilities()
        known = has_host_users()
    except PreflightError:
        known = False
    if not known:  # the kernel itself refuses the same calls
        return Check("seccomp", OK, "a filter; what it forbids cannot be tried without privilege", required=True)
    try:
        require_bpf_call()
    except PreflightError as error:
        return Check("seccomp", MISSING, str(error), error.remedy or "", required=True)
    if perf.is_forbidden():
        fact = "a filter forbids perf_event_open(2): no kprobes, and no samples of long fetches"
        return Check("seccomp", WARN, fact, f"a profile that allows it, as {_PROFILE}", required=True)
    return Check("seccomp", OK, "a filter, which allows bpf(2) and perf_event_open(2)", required=True)


def lockdown() -> Check:
    """The kernel's lockdown mode."""
    try:
        text = Path(SECURITYFS, "lockdown").read_text(errors="replace")
    except PermissionError:
        return Check("lockdown", OK, f"not known: {SECURITYFS} may not be read; confidentiality would make probes fail")
    except OSError:
        if os.path.ismount(SECURITYFS):
            return Check("lockdown", OK, "none: this kernel has no lockdown")
        return Check("lockdown", OK, f"not known: {SECURITYFS} is not mounted; confidentiality would make probes fail")
    mode = text.partition("[")[2].partition("]")[0] or "none"
    if mode == "confidentiality":
        fact = "confidentiality: BPF may not read kernel memory"
        return Check("lockdown", MISSING, fact, "boot with lockdown=integrity", required=True)
    return Check("lockdown", OK, f"{mode}: BPF may read kernel memory" if mode != "none" else mode)


def apparmor() -> Check:
    """The AppArmor profile of this process. A profile that enforces can refuse CAP_BPF, and reading other processes."""
    try:
        if _APPARMOR.read_text(errors="replace").strip() != "Y":
            return Check("AppArmor", OK, "not in force on this machine")
        said = procfs.text("self", "attr", "current").strip("\0\n")
    except OSError:
        return Check("AppArmor", OK, "not in force on this machine")
    if said == "unconfined":
        return Check("AppArmor", OK, said)
    if not said.endswith(" (enforce)"):
        return Check("AppArmor", OK, f"{said}: nothing is refused")
    if refused := _refused():
        fact = f"{said} refuses {refused}"
        remedy = "start the container with --security-opt apparmor=unconfined (appArmorProfile: Unconfined)"
        return Check("AppArmor", WARN, fact, remedy)
    return Check("AppArmor", OK, f"{said}, which refuses nothing that was tried")


def _refused() -> str:
    """What a profile refuses: BPF to a process that has the capabilities, or reading another process's descriptors."""
    found = []
    with contextlib.suppress(PreflightError, OSError):
        require_privilege()  # else it is refused anyway
        try:
            os.close(bpf.load(_RETURN_0, bpf.KPROBE))
        except PermissionError:
            found.append("BPF programs")
    if "CAP_SYS_PTRACE" in capabilities() and not descriptors.may_read(1):
        found.append("to read the descriptors of other processes, by which VMs are found")
    return " and ".join(found)
