# SPDX-License-Identifier: Apache-2.0
"""Starts the exporter's processes. They are new Pythons, and inherit only what they are given.

In: a module and its arguments. Out: the running process. `give_back` keeps their memory small.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from collections.abc import Collection

import msgspec

from ebpf_mig.linux.process import python_environment

_PASSED = ("PATH", "EBPF_MIG_TIER")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the listener, passed on its command line as JSON."""

    listener: int
    pipe: int
    parent: int
    vm_label: str
    vmms: tuple[str, ...]
    web_config: str
    otlp: str
    log_format: str = "none"


def start(module: str, *arguments: str, fds: Collection[int]) -> subprocess.Popen[bytes]:
    """Starts `python -Pm MODULE ARGUMENTS` in `/`, with our import path and the environment variables it may need."""
    wanted = (*_PASSED, "PYTHONPATH")
    return subprocess.Popen(
        [sys.executable, "-Pm", module, *arguments],
        pass_fds=tuple(fds),
        stdin=subprocess.DEVNULL,
        env={name: v for name, v in python_environment().items() if name in wanted or name.startswith("OTEL_")},
        cwd="/",
    )


def give_back() -> None:
    """Returns freed memory to the kernel, which glibc would keep. Never fails."""
    with contextlib.suppress(AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
