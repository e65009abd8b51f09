# SPDX-License-Identifier: Apache-2.0
"""The time that CPU quotas held a process's threads back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_mig.linux import procfs
from ebpf_mig.linux.cgroup import Quota, memory_limit


def tree(tmp_path: Path, groups: list[str], files: dict[str, str]) -> Quota:
    """Lines of /proc/PID/task/TID/cgroup, and files below the root of the control groups."""
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    return Quota(groups, tmp_path / "root")


def test_version_2_counts_the_groups_above_once(tmp_path: Path) -> None:
    quota = tree(
        tmp_path,
        ["0::/vm/emulator", "0::/vm/vcpu0", "0::/vm/vcpu0"],
        {
            "cpu.stat": "usage_usec 1\n",
            "vm/cpu.stat": "nr_throttled 1\nthrottled_usec 100\n",
            "vm/emulator/cpu.stat": "throttled_usec 0\n",
            "vm/vcpu0/cpu.stat": "throttled_usec 7\n",
        },
    )
    assert quota.held_ns() == 107_000


def test_groups_that_a_thread_moves_to_count_with_all_that_they_have(tmp_path: Path) -> None:
    files = {"a/cpu.stat": "throttled_usec 100\n", "b/cpu.stat": "throttled_usec 900\n"}
    quota = tree(tmp_path, ["0::/a"], files)
    assert quota.held_ns() == 100_000
    quota.include(["0::/b"])
    assert quota.held_ns() == 1_000_000, "a throttling right after the move must not be missed"
    (tmp_path / "root/b/cpu.stat").write_text("throttled_usec 950\n")
    (tmp_path / "root/a/cpu.stat").unlink()
    quota.include(["0::/b", "0::/a"])
    assert quota.held_ns() == 1_050_000, "what a group had counted is kept when the group is removed"


def test_version_1_is_in_nanoseconds(tmp_path: Path) -> None:
    quota = tree(
        tmp_path,
        ["9:name=systemd:/", "3:cpuset:/a", "1:cpu,cpuacct:/a", "0::/"],
        {"cpu,cpuacct/a/cpu.stat": "nr_periods 0\nthrottled_time 5\n", "cpuset/a/cpu.stat": "throttled_time 9\n"},
    )
    assert quota.held_ns() == 5


@pytest.mark.parametrize("text", ["", "nonsense", "0::/gone", "1:cpu:/\xff", "0::/../../above", "0::/\0"])
def test_nothing_to_be_had(tmp_path: Path, text: str) -> None:
    assert tree(tmp_path, [text], {"x/cpu.stat": "throttled_usec many\n"}).held_ns() is None


@contextlib.contextmanager
def limited() -> Iterator[Path]:
    """A group with 5 of each 100 ms; skips where none can be made."""
    for top, quota in (("/sys/fs/cgroup/cpu", True), ("/sys/fs/cgroup", False)):
        group = Path(top) / f"ebpf-mig-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if quota:
                (group / "cpu.cfs_quota_us").write_text("5000")
            else:
                (group / "cpu.max").write_text("5000 100000")
            yield group
            return
        except OSError:
            continue
        finally:
            with contextlib.suppress(OSError):
                group.rmdir()
    pytest.skip("no control group with a CPU quota can be made")


def test_a_real_quota() -> None:
    """On a busy machine, the process may wait for its first CPU, and is held later."""
    with limited() as group, subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            (group / "cgroup.procs").write_text(str(busy.pid))
            quota = Quota(procfs.control_groups(busy.pid))
            before = quota.held_ns()
            deadline = time.monotonic() + 20
            while (after := quota.held_ns() or 0) < 200_000_000 and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            busy.kill()
            busy.wait()
    assert before is not None and after - before >= 200_000_000


@pytest.mark.parametrize(
    ("lines", "files", "limit"),
    [
        (["0::/a/b"], {"a/memory.max": "200\n", "a/b/memory.max": "max\n", "memory.max": "max\n"}, 200),
        (["0::/a/b"], {"a/memory.max": "max\n", "a/b/memory.max": "max\n"}, None),
        (["0::/"], {"memory.max": "77\n"}, 77),
        (["0::/", "9:memory:/a"], {"memory/a/memory.limit_in_bytes": "5\n", "memory/memory.limit_in_bytes": "7\n"}, 5),
        (["9:cpu,memory:/a"], {"memory/a/memory.limit_in_bytes": "\n"}, None),
        (["9:cpu:/a", "nonsense", ""], {"memory/a/memory.limit_in_bytes": "5\n", "a/memory.max": "-1"}, None),
    ],
)
def test_the_lowest_memory_limit(tmp_path: Path, lines: list[str], files: dict[str, str], limit: int | None) -> None:
    tree(tmp_path, [], files)
    assert memory_limit(lines, tmp_path / "root") == limit
