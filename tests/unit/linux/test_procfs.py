# SPDX-License-Identifier: Apache-2.0
"""Reads of /proc: names of any bytes, processes that vanish, and no reads elsewhere."""

from __future__ import annotations

import ast
import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import ebpf_mig
from ebpf_mig.exporter import discovery
from ebpf_mig.linux import descriptors, procfs
from ebpf_mig.linux.kallsyms import UNKNOWN, Symbols
from ebpf_mig.text import printable
from ebpf_mig.vmm.processes import name_in
from tests.companion import Companion
from tests.conftest import requires

PACKAGE = Path(ebpf_mig.__file__).parent
NOBODY = 65534
_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)

NAMES = [
    b"caf\xc3",
    b"\xff\xfe\xfd",
    b"\x1b[2J) R 0 0",
    b"a\nb",
    b") Z 1 (",
    b"\xed\xa0\x80",
    "vCPU é1234567".encode()[:15],
    b"",
]
"""Cut within a character, no UTF-8 at all, terminal escapes, what looks like the rest of `stat`, a lone surrogate."""


@pytest.fixture(params=NAMES, ids=repr)
def named(request: pytest.FixtureRequest) -> Iterator[tuple[int, bytes]]:
    """A thread of ours with such a name."""
    name: bytes = request.param
    tids, ready, over = [], threading.Event(), threading.Event()

    def live() -> None:
        _libc.prctl(_PR_SET_NAME, name, 0, 0, 0)
        tids.append(threading.get_native_id())
        ready.set()
        over.wait()

    thread = threading.Thread(target=live)
    thread.start()
    ready.wait()
    try:
        yield tids[0], name
    finally:
        over.set()
        thread.join()


def test_a_thread_may_have_any_name(named: tuple[int, bytes]) -> None:
    tid, name = named
    pid = os.getpid()
    found = procfs.comm(pid, tid)
    assert found == name.decode("utf-8", "replace").strip()
    assert printable(found).isprintable()
    assert printable(found).encode("utf-8").decode("utf-8") == printable(found), "it can be written"
    assert procfs.process_of(tid) == pid
    assert procfs.numbers(pid, tid)[0] in "SRD", "the name does not shift what follows it"
    assert procfs.cpu_ticks(pid, tid) >= 0
    assert procfs.in_kvm_run(pid, tid) is None
    assert tid in procfs.threads_of(pid)


def test_a_command_line_may_be_any_bytes() -> None:
    program = "import sys; print(flush=True); sys.stdin.read()"
    arguments = [sys.executable.encode(), b"-c", program.encode(), b"-name", b"guest=\xff\x1b[31m\xc3", b"x" * 100_000]
    with Companion(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()  # before that it may not have its arguments yet
        found = procfs.command_line(child.pid)
        assert name_in(found) == "\ufffd\x1b[31m\ufffd"
        assert sum(map(len, found)) < 1 << 17
        child.stdin.close()


def test_what_is_gone_is_gone_in_one_way() -> None:
    with Companion([sys.executable, "-c", "pass"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        zombie = child.pid
        assert procfs.exists(zombie)
        assert not procfs.is_alive(zombie)
        assert list(descriptors.links(zombie)) == []
        assert procfs.command_line(zombie) == [""]
    for gone in (zombie, 1 << 22, -5, 0):
        with pytest.raises(ProcessLookupError):
            procfs.fields(gone)
        with pytest.raises(ProcessLookupError):
            procfs.names(gone, "task")
        with pytest.raises(ProcessLookupError):
            procfs.link(gone, "fd", 0)
        assert not procfs.exists(gone)
        assert procfs.threads_of(gone) == [] == procfs.command_line(gone) == list(descriptors.links(gone))
        assert procfs.comm(gone) == procfs.comm(gone, gone) == ""
        assert procfs.start_time(gone) is None
        assert procfs.resident_bytes(gone) == procfs.cpu_ticks(gone, gone) == 0
        assert not descriptors.holds_kvm(gone)
        assert discovery.vm_of(gone) is None


def test_a_file_of_a_process_that_ended_after_it_was_opened() -> None:
    """The kernel returns ESRCH then, and ENOENT during a walk of `task`."""
    with Companion(["sleep", "60"]) as child:
        opened = os.open(procfs.path(child.pid, "stat"), os.O_RDONLY)
        child.kill()
    with pytest.raises(ProcessLookupError), procfs._translated():
        os.read(opened, 10)
    os.close(opened)


@requires("root")
def test_what_is_refused_is_no_end() -> None:
    """User nobody reads files of a process of root."""
    script = f"""
import os
from ebpf_mig.linux import descriptors, procfs
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
for file in ("syscall", "fd"):
    try:
        procfs.names(1, file) if file == "fd" else procfs.read(1, file)
    except PermissionError:
        print("refused")
print(procfs.is_alive(1), descriptors.holds_kvm(1), procfs.in_kvm_run(1, 1), bool(procfs.comm(1)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=PACKAGE.parent
    )
    assert done.stdout == "refused\nrefused\nTrue False None True\n", done.stderr


def test_processes_that_come_and_go_while_discovery_looks() -> None:
    """2,000 processes as short as possible. With direct reads, about one in forty ended the exporter."""
    script = "for i in range(2000):\n p = os.fork()\n if not p: os._exit(0)\n os.waitpid(p, 0)"
    with Companion([sys.executable, "-c", f"import os\n{script}"]) as child:
        looks = 0
        while child.poll() is None:
            for pid in range(child.pid + 1, child.pid + 2001, 50):
                discovery.vm_of(pid)
            for pid in procfs.processes():
                discovery.vm_of(pid)
                for tid in procfs.threads_of(pid):
                    procfs.in_kvm_run(pid, tid)
            looks += 1
        assert child.returncode == 0
    assert looks


def test_symbols_of_any_bytes() -> None:
    lines = [b"ffff0000 T good\n", b"ffff1000 t \xff\xfe\t[m\xff]\n", b"\n", b"x\n", b"ffff2000 d data\n"]
    symbols = Symbols(lines)
    assert symbols.name(0xFFFF0010) == "good"
    assert symbols.name(0xFFFF1010) == "\ufffd\ufffd"
    assert symbols.name(1) == UNKNOWN


def _reads_of_proc(path: Path) -> Iterator[str]:
    """Strings that begin with /proc and are not docstrings."""
    tree = ast.parse(path.read_text())
    tids = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in tids and isinstance(node.value, (str, bytes)):
            words = node.value.encode() if isinstance(node.value, str) else node.value
            if words.startswith(b"/proc"):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}"


def test_nobody_else_reads_proc() -> None:
    """Direct reads trust names that another user chose, and that the process stays alive."""
    own = PACKAGE / "linux" / "procfs.py"
    assert list(_reads_of_proc(own)), "the search finds what it looks for"
    found = [place for path in sorted(PACKAGE.rglob("*.py")) if path != own for place in _reads_of_proc(path)]
    assert found == [], "use ebpf_mig.linux.procfs"
