# SPDX-License-Identifier: Apache-2.0
"""A small recording does not fill the memory: within 40 times its size and 200 MB it is read, or refused with one
line.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ebpf_mig.recording.events import Header, Kick, OffCpu, Target
from ebpf_mig.recording.file import RecordingWriter

ROOT = Path(__file__).parents[3]
GOOD = ROOT / "tests/data/hosts/source.rec"


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two million equal events, and stacks of many functions."""
    place = tmp_path_factory.mktemp("bombs")
    header = Header(targets=[Target(pid=1, role="source")])
    with RecordingWriter(place / "kicks.rec", header) as writer:
        writer.write_many([Kick(1, 1, 1, 1, 1)] * 2_000_000)
    with RecordingWriter(place / "stacks.rec", header) as writer:
        writer.write_many([OffCpu(1, 2, 1, 1, ("a",) * 256)] * 50_000)
    return sorted(place.iterdir())


MEASURED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(status, used.ru_maxrss << 10, used.ru_utime)
"""
"""A small process in between: a child's ru_maxrss includes what its parent held at the fork."""


@pytest.mark.parametrize(
    "command", ["report", "report --format html", "report --format perfetto --redact", "diff", "join"]
)
def test_what_unpacks_to_much_is_refused(bombs: list[Path], command: str) -> None:
    for bomb in bombs:
        files = [str(bomb)] + ([str(GOOD)] if command in ("diff", "join") else [])
        line = [sys.executable, "-m", "ebpf_mig", *command.split()[:1], *files, *command.split()[1:]]
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *line],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        status, peak, seconds = map(float, done.stdout.splitlines()[-1].split())
        assert status == 2 and done.stderr.count(b"\n") == 1 and b"not read" in done.stderr, done.stderr
        assert peak < 200e6 + 40 * bomb.stat().st_size
        assert seconds < 20
