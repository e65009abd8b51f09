# SPDX-License-Identifier: Apache-2.0
"""A directory of another user, with files that a program of root could load by mistake.

In: a directory. Out: files in it that leave a mark when a Python imports them, a shell runs them or a compiler reads
them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

MODULES = (
    "logging", "msgspec", "click", "json", "socket", "typing", "struct", "bcc", "ctypes", "pyroute2", "rich", "qemu",
    "prometheus_client", "sitecustomize", "usercustomize", "ebpf_mig", "runpy", "asyncio", "site",
)  # fmt: skip
HEADERS = ("common.h", "linux/types.h", "linux/bpf.h", "uapi/linux/ptrace.h", "asm/types.h", "bcc/bpf.h", "helpers.h")
PROGRAMS = ("qemu-system-x86_64", "ssh", "ip", "tc", "tail", "wc", "cloud-hypervisor", "mount", "gcc", "cc", "clang")


def plant(directory: Path) -> Path:
    """Fills the directory. Returns the path of a mark, which exists as soon as one of the files was used."""
    mark = directory / "used"
    for name in MODULES:
        (directory / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write('imported {name}\\n')\n")
    for name in HEADERS:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"#error {name} of the current directory was included\n")
    for name in PROGRAMS:
        (directory / name).write_text(f"#!/bin/sh\necho 'ran {name}' >>{mark}\nexit 1\n")
        (directory / name).chmod(0o755)
    return mark


def environment(directory: Path) -> dict[str, str]:
    """An environment with the current directory in PATH, a common mistake, and `directory` as TMPDIR."""
    return os.environ | {"PATH": f":.:{os.environ['PATH']}:", "TMPDIR": str(directory)}


def program() -> str:
    """The installed command; it runs in the Python of this test."""
    return str(Path(sys.executable).parent / "ebpf-mig")
