# SPDX-License-Identifier: Apache-2.0
"""What the kernel still holds: BPF programs by id, and who holds them. Asked of libbpf and /proc, not of our code.

In: nothing. Out: sets of ids, and pids.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path

_libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
_PR_SET_CHILD_SUBREAPER = 36
"""prctl(2)"""


def adopt() -> None:
    """From now on, processes below this one stay below it when their own parents end."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def programs() -> set[int]:
    """Ids of all BPF programs that are loaded."""
    found: set[int] = set()
    number = ctypes.c_uint32(0)
    while _libbpf.bpf_prog_get_next_id(number, ctypes.byref(number)) == 0:
        found.add(number.value)
    if ctypes.get_errno() not in (0, errno.ENOENT):
        raise OSError(ctypes.get_errno(), "bpf_prog_get_next_id")
    return found


def held_by(pid: int) -> set[int]:
    """Ids of the programs of which this process has a descriptor. Empty if it is gone."""
    found: set[int] = set()
    try:
        infos = list(Path(f"/proc/{pid}/fdinfo").iterdir())
    except OSError:
        return found
    for info in infos:
        try:
            lines = info.read_text().splitlines()
        except OSError:
            continue
        found |= {int(line.split()[1]) for line in lines if line.startswith("prog_id:")}
    return found


def held_by_others() -> set[int]:
    """Ids of the programs of processes that are not below this one: others may trace on this machine, too."""
    ours = {os.getpid(), *descendants(os.getpid())}
    found: set[int] = set()
    for path in Path("/proc").glob("[0-9]*"):
        if int(path.name) not in ours:
            found |= held_by(int(path.name))
    return found


def descendants(pid: int) -> dict[int, str]:
    """All processes below this one that have not ended, with their command lines."""
    found: dict[int, str] = {}
    for task in _tasks(pid):
        try:
            below = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        except OSError:
            continue
        for child in map(int, below):
            try:
                state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
                words = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if state not in "ZX":
                found[child] = words
                found |= descendants(child)
    return found


def states(pid: int) -> dict[int, str]:
    """What this process and those below it do: state, CPU ticks, where they wait in the kernel, their last argument."""
    found = {}
    for one, words in {pid: "", **descendants(pid)}.items():
        with contextlib.suppress(OSError):
            numbers = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            wait = Path(f"/proc/{one}/wchan").read_text()
            found[one] = f"{numbers[0]} {numbers[11]}+{numbers[12]} {wait} {words[:120]}"
    return found


def _tasks(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")  # noqa: PTH208
    except OSError:
        return []
