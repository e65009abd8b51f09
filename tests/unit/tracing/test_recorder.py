# SPDX-License-Identifier: Apache-2.0
"""A recorder on another host, for every way the recording command can behave: real processes, no second host."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ebpf_mig.errors import UsageError
from ebpf_mig.recording.events import Target
from ebpf_mig.tracing.recorder import Recorder, RemoteError
from ebpf_mig.tracing.session import require_alive
from ebpf_mig.tracing.ssh import Remote, RemoteHost


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def until_gone(pid: int, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def grandchild(note: Path) -> int:
    deadline = time.monotonic() + 10
    while not note.exists() or not note.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(note.read_text())


@pytest.mark.parametrize("leader", ["wait", "exit 3", "exec sleep 1000"])
def test_what_the_command_began_ends_with_it(leader: str, tmp_path: Path) -> None:
    """A grandchild that ignores everything but SIGKILL and holds all pipes open, with its parent alive or gone."""
    note = tmp_path / "pid"
    script = f"trap '' HUP INT TERM; sleep 1000 & echo $! > {note}; {leader}"
    recorder = Recorder("the test's", ["sh", "-c", script])
    pid = grandchild(note)
    assert alive(pid)
    if leader == "exit 3":
        deadline = time.monotonic() + 5
        while recorder.status is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert recorder.status == 3
    begin = time.monotonic()
    recorder.close()
    assert until_gone(pid) and time.monotonic() - begin < 20


def test_a_question_there_leaves_nothing_here(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    started = time.monotonic()
    remote = Remote(
        RemoteHost("there", f"timeout 1 sh -c 'sleep 1000 >/dev/null & echo $! > {note}; echo said' --"),
        "source",
        "/none",
    )
    assert remote._run(["true"]) == "said\n"
    assert until_gone(grandchild(note)) and time.monotonic() - started < 15


def test_a_recorder_that_talks_without_end_is_refused() -> None:
    for script in (
        "while :; do echo nonsense; done",
        "cat /dev/zero",
        "printf 'EBPFMIG1\\n\\377\\377\\377\\377aaaaaaaaa'; sleep 1000",
    ):
        recorder = Recorder("the test's", ["sh", "-c", script])
        try:
            with pytest.raises(RemoteError):
                recorder.armed(20)
        finally:
            recorder.close()


def test_we_do_not_record_ourselves() -> None:
    with pytest.raises(UsageError, match="itself"):
        require_alive([Target(pid=os.getpid(), role="unknown")])
    require_alive([Target(pid=os.getppid(), role="unknown"), Target(pid=1, role="unknown")])
