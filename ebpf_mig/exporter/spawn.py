# SPDX-License-Identifier: Apache-2.0
"""Starts the exporter's processes. They are new Pythons, and inherit only what they are given.

In: a module and its arguments. Out: the running process, or this process as that one. `give_back` keeps their memory
small.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Collection
from typing import NoReturn

from ebpf_mig.linux.process import python_environment

_PASSED = ("PATH", "EBPF_MIG_TIER", "PYTHONPATH")


def start(module: str, *arguments: str, fds: Collection[int]) -> subprocess.Popen[bytes]:
    """Starts `python -Pm MODULE ARGUMENTS` in `/`, with our import path and the environment variables it may need."""
    return subprocess.Popen(
        [sys.executable, "-Pm", module, *arguments],
        pass_fds=tuple(fds),
        stdin=subprocess.DEVNULL,
        env=_environment(),
        cwd="/",
    )


def become(module: str, *arguments: str, fds: Collection[int]) -> NoReturn:
    """Turns this process into what `start` would start. It keeps its id and blocked signals."""
    for fd in fds:
        os.set_inheritable(fd, True)
    environment = _environment()
    os.chdir("/")
    os.execve(sys.executable, [sys.executable, "-Pm", module, *arguments], environment)  # noqa: S606 - no shell


def leave(code: int) -> NoReturn:
    """Ends this process with this exit code, even if its last log lines cannot be written."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def _environment() -> dict[str, str]:
    return {name: v for name, v in python_environment().items() if name in _PASSED or name.startswith("OTEL_")}


def give_back() -> None:
    """Returns freed memory to the kernel, which glibc would keep. Never fails."""
    with contextlib.suppress(AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
