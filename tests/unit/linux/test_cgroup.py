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

from ebpf_mig.linux.cgroup import Quota


def tree(tmp_path: Path, groups: dict[int, str], files: dict[str, str]) -> Quota:
    """Thread ids with their /proc/.../cgroup, and files below the root of the control groups."""
    for tid, text in groups.items():
        task = tmp_path / "proc/7/task" / str(tid)
        task.mkdir(parents=True)
        (task / "cgroup").write_text(text)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    return Quota(7, tmp_path / "proc", tmp_path / "root")


def test_version_2_counts_the_groups_above_once(tmp_path: Path) -> None:
    quota = tree(
        tmp_path,
        {7: "0::/vm/emulator\n", 8: "0::/vm/vcpu0\n", 9: "0::/vm/vcpu0\n"},
        {
            "cpu.stat": "usage_usec 1\n",
            "vm/cpu.stat": "nr_throttled 1\nthrottled_usec 100\n",
            "vm/emulator/cpu.stat": "throttled_usec 0\n",
            "vm/vcpu0/cpu.stat": "throttled_usec 7\n",
        },
    )
    assert quota.held_ns() == 107_000


def test_version_1_is_in_nanoseconds(tmp_path: Path) -> None:
    quota = tree(
        tmp_path,
        {7: "9:name=systemd:/\n3:cpuset:/a\n1:cpu,cpuacct:/a\n0::/\n"},
        {"cpu,cpuacct/a/cpu.stat": "nr_periods 0\nthrottled_time 5\n", "cpuset/a/cpu.stat": "throttled_time 9\n"},
    )
    assert quota.held_ns() == 5


@pytest.mark.parametrize("text", ["", "nonsense", "0::/gone\n", "1:cpu:/\xff\n", "0::/../../above\n"])
def test_nothing_to_be_had(tmp_path: Path, text: str) -> None:
    assert tree(tmp_path, {7: text}, {"x/cpu.stat": "throttled_usec many\n"}).held_ns() is None


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
    with limited() as group, subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            (group / "cgroup.procs").write_text(str(busy.pid))
            quota = Quota(busy.pid)
            before = quota.held_ns()
            time.sleep(0.6)
            after = quota.held_ns()
        finally:
            busy.kill()
            busy.wait()
    assert before is not None and after is not None
    assert after - before > 200_000_000
