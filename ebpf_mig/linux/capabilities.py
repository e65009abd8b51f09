# SPDX-License-Identifier: Apache-2.0
"""Whether this process may load BPF programs: asked before LLVM is started in vain.

In: /proc, and one call that does nothing. Out: the capabilities held, or a PreflightError that says how to get them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import bpf

_BITS = {"CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
"""include/uapi/linux/capability.h; tracing programs need BPF and PERFMON (Linux 5.8), or SYS_ADMIN."""


def capabilities() -> set[str]:
    """Those of the relevant capabilities that are effective."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    effective = int(line.split()[1], 16)
    return {name for name, bit in _BITS.items() if effective >> bit & 1}


def seccomp_forbids() -> bool:
    """Whether a seccomp filter keeps bpf(2) from us: where the kernel is asked, a command that none has is EINVAL."""
    number = bpf.SYS_BPF.get(os.uname().machine)
    if number is None or "Seccomp:\t2" not in Path("/proc/self/status").read_text():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(number, 0x7FFFFFFF, ctypes.create_string_buffer(4), 4)
    return ctypes.get_errno() in (errno.EPERM, errno.ENOSYS)


def require_privilege() -> None:
    """PreflightError with a command line that works, if this process may not load tracing programs."""
    held = capabilities()
    if "CAP_SYS_ADMIN" not in held and not {"CAP_BPF", "CAP_PERFMON"} <= held:
        again = f"sudo env PATH=$PATH {Path(sys.argv[0]).resolve()} {' '.join(sys.argv[1:])}".rstrip()
        raise PreflightError(f"uid {os.geteuid()} may not load BPF programs", f"run as root: {again}")
    if seccomp_forbids():
        raise PreflightError(
            "a seccomp filter forbids bpf(2)",
            "start the container with seccomp=unconfined, or a profile that allows bpf and perf_event_open",
        )
