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

_OPTIONS = "-SPm"
"""Without the module `site`, which would load what this installation's .pth files name: some 0.6 MB in each process."""
_PASSED = ("PATH", "EBPF_MIG_TIER")
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
"""glibc's first value, mallopt(3). Otherwise it raises the threshold at the first large block that is freed. Later ones
then come from the heap and leave holes there: 3 MB in the watch.
"""


def start(module: str, *arguments: str, fds: Collection[int]) -> subprocess.Popen[bytes]:
    """Starts `python MODULE ARGUMENTS` in `/`, with our import path and the environment variables it may need."""
    return subprocess.Popen(
        [sys.executable, _OPTIONS, module, *arguments],
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
    os.execve(sys.executable, [sys.executable, _OPTIONS, module, *arguments], environment)  # noqa: S606 - no shell


def leave(code: int) -> NoReturn:
    """Ends this process with this exit code, even if its last log lines cannot be written."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def _environment() -> dict[str, str]:
    passed = {name: value for name, value in os.environ.items() if name in _PASSED or name.startswith("OTEL_")}
    return passed | _MALLOC | {"PYTHONPATH": os.pathsep.join(_import_path())}


def _import_path() -> list[str]:
    """Where this process imports from, without the current directory."""
    own = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
    try:
        here = os.path.realpath(".")
    except OSError:
        here = ""  # the directory was removed
    ways = [way for way in sys.path if os.path.isabs(way) and (way == own or way != here)]  # noqa: PTH117
    return [*dict.fromkeys([*ways, own])]


def give_back() -> None:
    """Returns freed memory to the kernel, which glibc would keep. Never fails."""
    with contextlib.suppress(AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
