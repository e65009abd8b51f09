# SPDX-License-Identifier: Apache-2.0
"""The exporter under the seccomp profile that the DaemonSet names: it measures, and forbidden calls are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TRACING, requires
from tests.integration.exporters import children, exporter, fetch, is_ready, migrate, report, until, value
from tests.integration.migrations import LASTING

PROFILE = Path(__file__).parents[2] / "deploy" / "kubernetes" / "seccomp.json"
CONFINED = [sys.executable, os.fspath(Path(__file__).with_name("seccomp.py")), os.fspath(PROFILE)]

pytestmark = requires("root", "libseccomp")


@pytest.mark.long
@requires(*TRACING)
def test_the_exporter_counts_a_migration_and_starts_its_processes_again(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    with exporter(state, "--keep", "1", before=CONFINED) as (process, port):
        pid = process.pid
        status = Path(f"/proc/{pid}/status").read_text()
        assert "Seccomp:\t2\n" in status
        migrate(LASTING)
        until(lambda: value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 1, 15)
        (recording,) = state.iterdir()
        blackout = report(recording).blackout_ns
        assert blackout is not None and value(port, "ebpf_mig_blackout_seconds_sum") == blackout / 1e9
        for name in ("watch_process", "serve"):
            os.kill(before := children(pid)[name], signal.SIGKILL)
            until(lambda name=name, before=before: children(pid).get(name, before) != before and is_ready(port), 20)
        migrate(LASTING)
        until(lambda: value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 2, 15)
        until(lambda: len(list(state.iterdir())) == 1, 5)
        assert recording not in state.iterdir(), "the older recording is deleted"
        assert value(port, "ebpf_mig_errors_total") == 0
        assert "migrations" in fetch(f"http://127.0.0.1:{port}/metrics")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


_TRY = """
import ctypes, errno, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def code(what):
    try:
        return what()
    except OSError as error:
        return errno.errorcode[error.errno]
def call(number, *arguments):
    return 0 if libc.syscall(number, *arguments) >= 0 else errno.errorcode[ctypes.get_errno()]
"""
_NUMBERS = {"ptrace": 101, "unshare": 272, "mount": 165, "init_module": 175, "clone3": 435, "process_vm_writev": 311}
"""Of x86-64: arch/x86/entry/syscalls/syscall_64.tbl."""


@requires("x86-64")
@pytest.mark.parametrize(
    ("attempt", "answer"),
    [
        *((f"call({number}, 0, 0, 0, 0, 0)", "EPERM") for name, number in _NUMBERS.items() if name != "clone3"),
        (f"call({_NUMBERS['clone3']}, 0, 0)", "ENOSYS"),
        ("call(56, 0x10000000, 0, 0, 0, 0)", "EPERM"),
        ("code(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))", "EPERM"),
        ("code(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))", "EPERM"),
        ("code(lambda: os.mknod('/tmp/never', 0o600))", "EPERM"),
        ("code(lambda: socket.socket(socket.AF_INET6).close())", "None"),
    ],
)
def test_what_the_profile_forbids(attempt: str, answer: str) -> None:
    """The answers are those of the kernel; 56 is clone, with CLONE_NEWUSER."""
    command = [*CONFINED, sys.executable, "-c", f"{_TRY}print({attempt})"]
    assert subprocess.check_output(command, text=True).strip() == answer
