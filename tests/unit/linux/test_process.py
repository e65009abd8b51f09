# SPDX-License-Identifier: Apache-2.0
"""Children that cannot outlive us, and directories that do not pile up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import process
from ebpf_mig.linux.process import private_directory, spawn, stop

PARENT = """
import sys, time
from ebpf_mig.linux.process import private_directory, spawn
with private_directory() as path, open(path / "log", "wb") as log:
    child = spawn(["sleep", "100"], log, log)
    (path / "file").write_text("x")
    print(child.pid, path, flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def _own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def is_gone(pid: int, patience_s: float = 10) -> bool:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # dead; whoever adopted it has not reaped it yet
        except OSError:
            return True
        time.sleep(0.02)
    return False


def started_parent() -> tuple[subprocess.Popen[str], int, Path]:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, path = parent.stdout.readline().split()
    parent.stdout.close()
    return parent, int(pid), Path(path)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_child_dies_with_us(signum: signal.Signals) -> None:
    parent, child, path = started_parent()
    assert not is_gone(child, 0.1) and (path / "file").exists()
    parent.send_signal(signum)
    parent.wait(10)
    assert is_gone(child)
    with private_directory():
        assert not path.exists(), "the next run removes what a killed one left"


def test_a_directory_in_use_is_left_alone() -> None:
    parent, child, path = started_parent()
    with private_directory() as own:
        assert (path / "file").exists() and own != path
        assert own.stat().st_mode & 0o777 == 0o700
    assert not own.exists() and (path / "file").exists()
    parent.kill()
    parent.wait()
    assert is_gone(child)


def test_directories_made_at_once_do_not_sweep_each_other() -> None:
    lost: list[Path] = []

    def use() -> None:
        for _ in range(100):
            with private_directory() as path:
                try:
                    (path / "file").write_text("x")
                except OSError:
                    lost.append(path)

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not lost


def test_a_link_in_the_sweeps_way(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (tmp_path / "ebpf-mig-lab-link").symlink_to(precious)
    (tmp_path / "ebpf-mig-lab-file").write_text("x")
    with private_directory():
        assert (precious / "file").exists()


def test_a_parent_that_died_early_is_noticed() -> None:
    """The signal would never come: the launcher must not start the program."""
    launcher = [sys.executable, "-I", "-S", "-c", process._LAUNCH, "1", "/bin/echo", "started"]
    done = subprocess.run(launcher, capture_output=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (125, b"")


def test_ctrl_c_of_our_terminal_does_not_reach_the_child(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        child = spawn(["sleep", "100"], log, log)
        try:
            assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
        finally:
            stop(child)
    assert child.returncode == -signal.SIGKILL
    stop(child)


def test_no_such_program(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, pytest.raises(PreflightError, match="no such program"):
        spawn(["/nonexistent/qemu"], log, log)


def test_no_place_for_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no-such-directory")
    with pytest.raises(PreflightError, match="No such file") as caught, private_directory():
        pass
    assert "TMPDIR" in str(caught.value.remedy)


def test_a_long_tmpdir_leaves_room_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A UNIX socket's path has 107 bytes at most: the lab's lie elsewhere then."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with private_directory() as place, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "destination.events.sock"))
        assert place.parent == Path("/tmp")
