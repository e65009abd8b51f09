# SPDX-License-Identifier: Apache-2.0
"""Whether this process may load BPF programs: asked before LLVM is started in vain.

In: /proc. Out: the capabilities held, or a PreflightError that says how to get them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ebpf_mig.errors import PreflightError

_BITS = {"CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
"""include/uapi/linux/capability.h; tracing programs need BPF and PERFMON (Linux 5.8), or SYS_ADMIN."""


def capabilities() -> set[str]:
    """Those of the relevant capabilities that are effective."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    effective = int(line.split()[1], 16)
    return {name for name, bit in _BITS.items() if effective >> bit & 1}


def require_privilege() -> None:
    """PreflightError with a command line that works, if this process may not load tracing programs."""
    held = capabilities()
    if "CAP_SYS_ADMIN" in held or {"CAP_BPF", "CAP_PERFMON"} <= held:
        return
    again = f"sudo env PATH=$PATH {Path(sys.argv[0]).resolve()} {' '.join(sys.argv[1:])}".rstrip()
    raise PreflightError(f"uid {os.geteuid()} may not load BPF programs", f"run as root: {again}")
