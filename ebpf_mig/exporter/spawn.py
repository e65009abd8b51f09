# SPDX-License-Identifier: Apache-2.0
"""Starts the processes that the exporter is made of: fresh ones, which inherit only what they are given.

In: a module and its arguments. Out: the running process. `give_back` keeps each of them small.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Collection

import msgspec

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
    """`python -m MODULE ARGUMENTS`, with our import path, in `/`, with the environment it may need."""
    environment = {name: value for name, value in os.environ.items() if name in _PASSED or name.startswith("OTEL_")}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        pass_fds=tuple(fds),
        stdin=subprocess.DEVNULL,
        env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        cwd="/",
    )


def give_back() -> None:
    """Gives memory back that a migration's events or a start took, which glibc keeps otherwise. Never fails."""
    with contextlib.suppress(AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
