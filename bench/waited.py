# SPDX-License-Identifier: Apache-2.0
"""How long the threads of two VMs could run and had no CPU, by the kernel's own account: no probe of ours has a part.

In: pids by role. Out: a JSON file with what was read every 5 ms from /proc/PID/task/TID/schedstat, whose second number
is the time in run queues in ns (Documentation/scheduler/sched-stats.rst); and the sums within a span of time.

`python -m bench.waited ROLE=PID...` reads until the end of its standard input. It has a real-time priority, since it
must read where others wait.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

APART_S = 0.005
Reading = tuple[int, int, dict[str, dict[str, int]]]
"""CLOCK_MONOTONIC before and after, ns; and ns by role and thread."""


def delays(pid: int) -> dict[str, int]:
    """Time in run queues so far, ns, by thread. A wait counts when it ends."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            found[path.parent.name] = int(path.read_text().split()[1])
    return found


@contextlib.contextmanager
def watching(path: Path, pids: dict[str, int]) -> Iterator[None]:
    """Writes the readings of this time into the file."""
    command = [sys.executable, "-m", "bench.waited", *(f"{role}={pid}" for role, pid in pids.items())]
    with path.open("w") as file, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file) as process:
        try:
            yield
        finally:
            process.communicate()  # the end of its input ends it


def within(path: Path, begin_ns: int, end_ns: int) -> dict[str, int]:
    """By role, what the thread that waited longest waited at least in that time, ns. Only whole steps inside count.

    A thread can end in that time, as QEMU's migration thread does.
    """
    inside = [r for r in json.loads(path.read_text()) if begin_ns <= r[0] and r[1] <= end_ns]
    found: dict[str, int] = {}
    for _, _, roles in inside:
        for role, threads in roles.items():
            first = inside[0][2][role]
            longest = max((ns - first.get(tid, 0) for tid, ns in threads.items()), default=0)
            found[role] = max(found.get(role, 0), longest)
    return found


def main() -> None:
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    pids = {role: int(pid) for role, _, pid in (word.partition("=") for word in sys.argv[1:])}
    readings: list[Reading] = []
    while not select.select([sys.stdin], [], [], APART_S)[0]:
        before = time.monotonic_ns()
        found = {role: delays(pid) for role, pid in pids.items()}
        readings.append((before, time.monotonic_ns(), found))
    json.dump(readings, sys.stdout)


if __name__ == "__main__":
    main()
