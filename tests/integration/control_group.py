# SPDX-License-Identifier: Apache-2.0
"""A control group for tests: quota, freezer, memory limit."""

from __future__ import annotations

import os
from pathlib import Path

from tests.integration.exporters import until


class Group:
    """A control group of version 1 or 2."""

    def __init__(self, controller: str) -> None:
        old = Path("/sys/fs/cgroup", controller)
        self._is_old = old.is_dir()
        self.path = (old if self._is_old else Path("/sys/fs/cgroup")) / f"ebpf-mig-test-{os.getpid()}"

    def __enter__(self) -> Group:
        self.path.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        until(lambda: not (self.path / "cgroup.procs").read_text())
        self.path.rmdir()

    def quota(self, percent: int) -> None:
        if self._is_old:
            (self.path / "cpu.cfs_quota_us").write_text(str(percent * 1000))
        else:
            (self.path / "cpu.max").write_text(f"{percent * 1000} 100000")

    def inside(self) -> tuple[str, ...]:
        """What to put before a command, so that it runs in the group."""
        return "sh", "-c", f'echo $$ > "{self.path}/cgroup.procs"; exec "$@"', "sh"

    def unreclaimable_bytes(self) -> int:
        """The memory in use, without the page cache."""
        figures = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        used, cache = ("memory.usage_in_bytes", "cache") if self._is_old else ("memory.current", "file")
        return int((self.path / used).read_text()) - int(figures[cache])

    def killed(self) -> int:
        """How many processes the kernel has killed for memory."""
        file = self.path / ("memory.oom_control" if self._is_old else "memory.events")
        return int(dict(line.split() for line in file.read_text().splitlines())["oom_kill"])

    def limit_memory(self, limit_bytes: int) -> None:
        (self.path / ("memory.limit_in_bytes" if self._is_old else "memory.max")).write_text(str(limit_bytes))

    def freeze(self, on: bool) -> None:
        if self._is_old:
            (self.path / "freezer.state").write_text("FROZEN" if on else "THAWED")
        else:
            (self.path / "cgroup.freeze").write_text("1" if on else "0")
