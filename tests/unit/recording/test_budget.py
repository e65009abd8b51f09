# SPDX-License-Identifier: Apache-2.0
"""A small recording does not fill the memory: within 40 times its size and 200 MB it is read, or refused in a line."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize(
    "command", ["report", "report --format html", "report --format perfetto --redact", "diff", "join"]
)
def test_what_unpacks_to_much_is_refused(bombs: list[Path], command: str) -> None:
    for bomb in bombs:
        files = [str(bomb)] + ([str(GOOD)] if command in ("diff", "join") else [])
        line = [sys.executable, "-m", "ebpf_mig", *command.split()[:1], *files, *command.split()[1:]]
        process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 2 and said.count(b"\n") == 1 and b"not read" in said, said
        assert usage.ru_maxrss << 10 < 200e6 + 40 * bomb.stat().st_size
        assert usage.ru_utime < 20
