# SPDX-License-Identifier: Apache-2.0
"""What control groups withhold: the time for which CPU quotas throttled the threads of a process, and memory.

In: the lines of its threads' /proc/PID/task/TID/cgroup. Out: nanoseconds since the creation of the groups, and bytes.
Each thread can have its own group (libvirt makes groups for vCPUs and the emulator), and a quota applies to all groups
below it, so all of them count. `cpu.stat` has `throttled_time` in ns (version 1) or `throttled_usec` (version 2):
kernel/sched/core.c, `cpu_cfs_stat_show` and `cpu_extra_stat_show`, Linux 6.12. The time of a group increases when its
threads may run again. Memory limits: `memory.limit_in_bytes` (mm/memcontrol-v1.c) or `memory.max` (mm/memcontrol.c),
Linux 6.12.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_VERSION_1 = ("cpu", "cpu,cpuacct", "cpuacct,cpu")


class Quota:
    """The control groups that the threads of a process are in or were in. `held_ns` can be called repeatedly."""

    def __init__(self, lines: Collection[str], root: Path = _ROOT) -> None:
        """`lines`: from `procfs.control_groups`."""
        self._root = root
        self._known = self._files(lines)
        self._held: dict[Path, int] = {}

    def include(self, lines: Collection[str]) -> None:
        """Also counts the groups in these lines, with all that they have counted so far.

        When a thread was moved is not known. So the sum may jump: more than a wait can explain, never less.
        """
        self._known |= self._files(lines)

    def held_ns(self) -> int | None:
        """The throttled time of all groups together, in ns; None if no group reports it."""
        for file in self._known:
            if (held := _throttled_ns(file)) is not None:
                self._held[file] = held
        return sum(self._held.values()) if self._held else None

    def _files(self, lines: Collection[str]) -> set[Path]:
        return {file for path in _groups(lines, "cpu") for file in _statistics(path, self._root)}


def memory_limit(lines: Collection[str], root: Path = _ROOT) -> int | None:
    """The lowest memory limit of these groups and of those above them, in bytes; None if none is known.

    Without a limit, version 1 has a number that is larger than any memory.
    """
    limits: list[int] = []
    for controllers, path in _groups(lines, "memory"):
        tops, name = ([root / "memory"], "memory.limit_in_bytes") if controllers else (_unified(root), "memory.max")
        limits += [int(said) for file in _with_parents(tops, path, name) if (said := _text(file).strip()).isdigit()]
    return min(limits, default=None)


def _groups(lines: Collection[str], controller: str) -> set[tuple[str, str]]:
    """(controllers, path) of the groups to which a controller can apply. Version 2 lists no controllers."""
    found: set[tuple[str, str]] = set()
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers or controller in controllers.split(","):
            found.add((controllers, path))
    return found


def _text(path: Path) -> str:
    """The first 4 KiB of a file; empty if it cannot be read. Path.read_text takes 2.6 times as long."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, 4096).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(fd)


def _statistics(group: tuple[str, str], root: Path) -> list[Path]:
    """The `cpu.stat` files of a group and of its parents."""
    controllers, path = group
    return _with_parents([root / name for name in _VERSION_1] if controllers else _unified(root), path, "cpu.stat")


def _unified(root: Path) -> list[Path]:
    """Where version 2 can be mounted."""
    return [root, root / "unified"]


def _with_parents(tops: Iterable[Path], path: str, name: str) -> list[Path]:
    """The files of this name of a group and of its parents, in the first hierarchy that has it."""
    top = next((top for top in tops if (top / path.lstrip("/") / name).is_file()), None)
    if top is None:
        return []
    here = top / path.lstrip("/")
    return [directory / name for directory in (here, *here.parents) if directory.is_relative_to(top)]


def _throttled_ns(file: Path) -> int | None:
    for line in _text(file).splitlines():
        name, _, value = line.partition(" ")
        if name in ("throttled_time", "throttled_usec") and value.isdigit():
            return int(value) * (1000 if name == "throttled_usec" else 1)
    return None
