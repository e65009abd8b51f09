# SPDX-License-Identifier: Apache-2.0
"""Starts the processes that the exporter is made of: fresh ones, which inherit only what they are given.

In: a module and its arguments. Out: the running process. `give_back` keeps each of them small.
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
    """What the process that listens is told on its command line, as JSON."""

    listener: int
    pipe: int
    parent: int
    vm_label: str
    web_config: str
    otlp: str


def start(module: str, *arguments: str, fds: Collection[int]) -> subprocess.Popen[bytes]:
    """`python -Pm MODULE ARGUMENTS`, importing from where we did, in `/`, with the environment it may need."""
    wanted = (*_PASSED, "PYTHONPATH")
    return subprocess.Popen(
        [sys.executable, "-Pm", module, *arguments],
        pass_fds=tuple(fds),
        stdin=subprocess.DEVNULL,
        env={name: v for name, v in python_environment().items() if name in wanted or name.startswith("OTEL_")},
        cwd="/",
    )


def give_back() -> None:
    """Gives memory back that a migration's events or a start took, which glibc keeps otherwise. Never fails."""
    with contextlib.suppress(AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
