# SPDX-License-Identifier: Apache-2.0
"""Many migrations in a row, as fast as the truth machine can: none is missed, and the exporter does not grow.

EBPF_MIG_MIGRATIONS sets their number; 1000 take a minute and a half. `-rP` shows the resources before and after.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import TRACING, requires
from tests.integration.exporters import OURS, children, exporter, running, until, value

pytestmark = requires(*TRACING)

NUMBER = int(os.environ.get("EBPF_MIG_MIGRATIONS", "60"))
WARM = max(20, NUMBER // 10)
GROWTH_KB = 4096
"""Allowed growth per process between the first and the last migrations, whatever their number."""


def held(pid: int) -> tuple[int, int, int]:
    """Resources of a process: (resident kB, descriptors, threads)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(status["VmRSS"].split()[0]), fds, int(status["Threads"])


def swarm(number: int) -> None:
    command = [sys.executable, "-m", "tests.integration.swarm", str(number), "--name", f"{OURS}many"]
    with running(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        out, _ = process.communicate("go\n")
        assert out.split("\n")[-2] == f"done {number}"


def late(port: int) -> float:
    """Number of hints handled later than such a migration takes. By this count the exporter may have missed that many.

    It is 0 if the CPUs are free.
    """
    name = "ebpf_mig_trigger_delay_seconds"
    return value(port, f"{name}_count") - value(port, f"{name}_bucket", le="0.025")


@pytest.mark.long
@pytest.mark.timeout(60 + 2 * NUMBER)
def test_many_migrations_in_a_row(tmp_path: Path) -> None:
    with exporter(tmp_path / "state", "--keep", "10") as (process, port):
        pids = {"supervisor": process.pid, **children(process.pid)}

        def settled() -> dict[str, tuple[int, int, int]]:
            until(lambda: value(port, "ebpf_mig_vms") == 0, 60)
            until(lambda: value(port, "ebpf_mig_armed") == 0)
            time.sleep(12)  # the analysing child has exited
            return {name: held(pid) for name, pid in pids.items()}

        swarm(WARM)
        before = settled()
        begin = time.monotonic()
        swarm(NUMBER)
        rate = NUMBER / (time.monotonic() - begin)
        after = settled()
        seen = value(port, "ebpf_mig_migrations_total", role="both", result="completed")
        print(f"{seen:.0f} of {WARM} + {NUMBER} seen, {late(port):.0f} late, {rate:.1f} a second")  # noqa: T201
        for name in pids:
            print(f"{name} (kB, descriptors, threads): {before[name]} -> {after[name]}")  # noqa: T201
        assert WARM + NUMBER - late(port) <= seen <= WARM + NUMBER
        assert value(port, "ebpf_mig_errors_total") == 0 and value(port, "ebpf_mig_events_lost_total") == 0
        assert value(port, "ebpf_mig_recordings") == 10
        for name, (resident, fds, threads) in after.items():
            assert resident - before[name][0] < GROWTH_KB, f"{name} grew: {before[name]} -> {after[name]}"
            assert (fds, threads) == before[name][1:], name
