# SPDX-License-Identifier: Apache-2.0
"""The commands as a user runs them: good runs, nonsense, interruptions; exit codes, streams, and no leftovers."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ebpf_mig.linux.bpf import SYS_BPF
from ebpf_mig.recording.events import RECURSION_MISSES
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import LAB, TRACING, requires
from tests.integration.migrations import QUICK

DEMO = ["demo", "--memory", "128MiB", "--working-set", "2MiB", "--dirty-rate", "20000"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ebpf_mig", *arguments]


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=directory, capture_output=True, text=True, timeout=280, check=False)


def one_line(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Exactly one line on stderr with these words, nothing on stdout, no traceback."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith(("Usage:", "Try "))]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def lab_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private directory for the lab's files, with a short name because UNIX socket paths are limited."""
    with tempfile.TemporaryDirectory(prefix="em") as name:
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


def vms_of(directory: Path) -> list[int]:
    """Pids of the lab's VMs whose files are in `directory`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{directory}/ebpf-mig-lab-".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def no_vm_left(directory: Path) -> None:
    """Waits a moment for the kernel to kill them."""
    deadline = time.monotonic() + 5
    while vms_of(directory) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not vms_of(directory)


def nothing_left(directory: Path) -> None:
    """No lab VM and no lab directory."""
    no_vm_left(directory)
    assert not list(directory.iterdir())


@pytest.mark.everywhere("demo")
@requires(*LAB)
def test_demo_json_is_alone_on_stdout(
    tmp_path: Path, lab_directory: Path, record_property: Callable[[str, object], None]
) -> None:
    for _ in range(3):
        result = run(tmp_path, *DEMO, "-o", "demo.rec", "--force", "--format", "json")
        nothing_left(lab_directory)
        assert result.returncode == 0, result.stderr
        breakdown = json.loads(result.stdout)
        # On an emulated CPU our programs are slow. While one is preempted, the kernel skips its runs of other threads.
        if RECURSION_MISSES not in breakdown["completeness"]["lost"]:
            break
    record_property("attach", json.dumps(breakdown["completeness"]["attach"]))
    assert breakdown["schema"] == "ebpf-mig/breakdown/1"
    assert sum(phase["duration_ns"] for phase in breakdown["phases"]) == breakdown["window_ns"]
    assert breakdown["completeness"]["verdict"] == "complete"
    assert "ebpf-mig report demo.rec" in result.stderr
    again = run(tmp_path, "report", "demo.rec", "--format", "json")
    assert again.stdout == result.stdout, "the same recording gives the same report, byte for byte"


@requires(*TRACING)
def test_demo_text_is_one_screen(tmp_path: Path) -> None:
    result = run(tmp_path, *DEMO)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert re.match(r"Downtime [0-9.]+ ms .*complete: no event lost$", lines[0])
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert "dirty log    last fetch " in result.stdout and "  because  " in result.stdout
    assert len(list(tmp_path.glob("ebpf-mig-demo-*.rec"))) == 1


@requires(*TRACING)
def test_two_demos_at_once(tmp_path: Path, lab_directory: Path) -> None:
    both = [
        subprocess.Popen(command(*DEMO, "-o", f"{n}.rec", "--format", "json"), cwd=tmp_path, stdout=subprocess.PIPE)
        for n in "ab"
    ]
    answers = [json.loads(process.communicate(timeout=170)[0]) for process in both]
    nothing_left(lab_directory)
    pids = {answer["migration"][side]["pid"] for answer in answers for side in ("source", "destination")}
    assert len(pids) == 4
    assert all(answer["completeness"]["verdict"] == "complete" for answer in answers)


def catches(pid: int, signum: int) -> bool:
    """Whether the process handles the signal. Before it has set a handler, the signal just kills it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> signum - 1 & 1)


def interrupt(
    directory: Path, arguments: Sequence[str], signum: int, after_s: float, recording: str = ""
) -> tuple[int, str]:
    """Sends the signal `after_s` after Python has started, or after the recording was created."""
    process = subprocess.Popen(command(*arguments), cwd=directory, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not catches(process.pid, signal.SIGINT) and time.monotonic() < deadline:
        time.sleep(0.002)
    while recording and not (directory / recording).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(after_s)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


SLOW = [*DEMO, "--working-set", "32MiB", "--bandwidth", "2MiB/s", "--downtime-limit", "1ms"]


@requires(*TRACING)
@pytest.mark.parametrize("after_s", [0.2, 1.0, 4.0])
def test_ctrl_c_leaves_nothing(tmp_path: Path, lab_directory: Path, after_s: float) -> None:
    for _ in range(4):
        code, stderr = interrupt(tmp_path, SLOW, signal.SIGINT, after_s)
        nothing_left(lab_directory)
        if code != -signal.SIGINT or "ebpf_mig" in stderr:
            break
        after_s *= 2  # the machine is so busy that Python itself had not run a line of ours yet
    assert code == 130
    assert "Traceback" not in stderr


@requires(*TRACING)
def test_sigterm_ends_like_ctrl_c_and_keeps_the_recording(tmp_path: Path, lab_directory: Path) -> None:
    code, stderr = interrupt(tmp_path, [*SLOW, "-o", "cut.rec"], signal.SIGTERM, 2, "cut.rec")
    nothing_left(lab_directory)
    assert code == 143, stderr
    report = json.loads(run(tmp_path, "report", "cut.rec", "--format", "json").stdout)
    assert report["migration"]["result"] == "cancelled"
    assert report["blackout_ns"] is None


@requires(*TRACING)
def test_killed_outright_nothing_survives(tmp_path: Path, lab_directory: Path) -> None:
    """SIGKILL: VMs die with us, the recording can be read, and the next run removes the directory."""
    code, _ = interrupt(tmp_path, [*SLOW, "-o", "cut.rec"], signal.SIGKILL, 2, "cut.rec")
    assert code == -signal.SIGKILL
    no_vm_left(lab_directory)
    result = run(tmp_path, "report", "cut.rec", "--format", "json")
    assert json.loads(result.stdout)["completeness"]["verdict"] == "incomplete"
    assert list(lab_directory.iterdir()), "the directory stays until the next run"
    assert run(tmp_path, *DEMO, "-o", "next.rec").returncode == 0
    nothing_left(lab_directory)


@pytest.mark.everywhere("migrate")
@pytest.mark.times
@requires(*LAB)
def test_migrate_and_record_side_by_side(tmp_path: Path) -> None:
    """The user's own VMs: one process migrates, another only records. Both report the same blackout."""
    with QemuPair(QUICK) as pair:
        pids = [str(pair.source.pid), str(pair.destination.pid)]
        watching = subprocess.Popen(
            command("record", "--pid", pids[0], "--pid", pids[1], "-o", "seen.rec"),
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert watching.stderr is not None
        assert "tracing" in watching.stderr.readline()
        ends = ["--source", pair.source.qmp, "--destination", pair.destination.qmp, "--uri", pair.uri]
        result = run(tmp_path, "migrate", "qemu", *ends, "-o", "driven.rec", "--format", "json")
        assert result.returncode == 0, result.stderr
        assert watching.wait(20) == 0
    driven = json.loads(result.stdout)
    seen = json.loads(run(tmp_path, "report", "seen.rec", "--format", "json").stdout)
    assert seen["migration"]["result"] == "completed" and seen["migration"]["vmm"] == "qemu"
    assert [v["vcpu"] for v in seen["vcpus"]] == [0]
    assert abs(seen["blackout_ns"] - driven["blackout_ns"]) < 200_000


@pytest.mark.everywhere("record")
@requires(*LAB)
def test_record_ends_with_its_command(tmp_path: Path) -> None:
    with QemuPair(QUICK) as pair:
        result = run(tmp_path, "record", "--pid", str(pair.source.pid), "-o", "idle.rec", "--", "true")
    assert result.returncode == 0, result.stderr
    report = run(tmp_path, "report", "idle.rec")
    assert report.returncode == 0 and "Downtime not measured" in report.stdout


@requires(*TRACING)
def test_a_migration_that_is_refused(tmp_path: Path) -> None:
    """The port is in use: QEMU refuses, and the error quotes it."""
    with QemuPair(QUICK) as pair, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        uri = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
        ends = ["--source", pair.source.qmp, "--destination", pair.destination.qmp, "--uri", uri]
        one_line(run(tmp_path, "migrate", "qemu", *ends), 4, "migrate-incoming", "in use")


@requires(*TRACING)
def test_a_uri_that_leads_to_no_other_qemu_is_refused(tmp_path: Path) -> None:
    with QemuPair(QUICK) as pair:
        ends = ["--source", pair.source.qmp, "--destination", pair.destination.qmp]
        for uri in ("exec:cat > /dev/null", "fd:7", "file:state", "nonsense"):
            one_line(run(tmp_path, "migrate", "qemu", *ends, "--uri", uri), 2, uri, "--uri")


@contextlib.contextmanager
def fake_monitor(path: Path, answer: bytes) -> Iterator[str]:
    """A UNIX socket that sends something other than QMP to each client."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    client.sendall(answer)
                    client.close()

        threading.Thread(target=serve, daemon=True).start()
        yield str(path)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff" * 200_000, b'{"QMP": 1}\n'])
def test_not_a_qmp_socket(tmp_path: Path, answer: bytes) -> None:
    with fake_monitor(tmp_path / "sock", answer) as path:
        result = run(tmp_path, "migrate", "qemu", "--source", path, "--destination", "x", "--uri", "tcp:127.0.0.1:1")
    one_line(result, 4, path, "-qmp unix:PATH")


def test_no_qmp_socket(tmp_path: Path) -> None:
    ends = ["--source", "/nonexistent/a", "--destination", "/nonexistent/b", "--uri", "tcp:127.0.0.1:1"]
    one_line(run(tmp_path, "migrate", "qemu", *ends), 4, "/nonexistent/a", "No such file")


@requires("root", "bcc", "kernel BTF")
@pytest.mark.parametrize("pid", ["4194305", "0", "-5"])
def test_wrong_pid(tmp_path: Path, pid: str) -> None:
    one_line(run(tmp_path, "record", "--pid", pid), 2, pid)


def test_no_such_vmm(tmp_path: Path) -> None:
    one_line(run(tmp_path, "demo", "--vmm-binary", "/nonexistent/qemu"), 3, "apt-get install qemu-system-x86")


def test_an_existing_recording_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "old.rec").write_text("precious")
    one_line(run(tmp_path, "demo", "-o", "old.rec"), 2, "--force")
    assert (tmp_path / "old.rec").read_text() == "precious"


@requires(*TRACING)
def test_full_disk(tmp_path: Path, lab_directory: Path) -> None:
    one_line(run(tmp_path, *DEMO, "-o", "/dev/full", "--force"), 2, "No space left")
    nothing_left(lab_directory)


def test_no_memory_for_the_working_set(tmp_path: Path) -> None:
    one_line(run(tmp_path, "demo", "--memory", "16MiB"), 2, "--memory")


@requires("root")
def test_without_privilege(tmp_path: Path) -> None:
    """Root without capabilities may not load BPF programs either. The error shows the command that works."""
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    result = subprocess.run(
        [*drop, *command("record", "--pid", "1")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    one_line(result, 3, "may not load BPF programs", "sudo")


FILTERED = """
import ctypes, os, struct, sys
number, code = map(int, sys.argv[1:3])
load, same, allow, refuse = (0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x50000 | code)
program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in (load, same, refuse, allow)))
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert prctl(22, 2, struct.pack("@HP", 4, ctypes.addressof(program)), 0, 0) == 0, "PR_SET_SECCOMP"
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""
"""Runs Python in a seccomp filter where one system call fails with the given errno (linux/filter.h,
linux/seccomp.h).
"""


@requires("root", "bcc")
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS], ids=["EPERM", "ENOSYS"])
@pytest.mark.parametrize("words", [("record", "--pid", "1"), ("exporter", "--web.listen-address", "127.0.0.1:0")])
def test_where_a_containers_seccomp_profile_forbids_it(tmp_path: Path, code: int, words: tuple[str, ...]) -> None:
    more = ("--state-directory", "state") if words[0] == "exporter" else ()
    filtered = [sys.executable, "-c", FILTERED, str(SYS_BPF[platform.machine()]), str(code)]
    result = subprocess.run(
        [*filtered, *command(*words, *more)[1:]],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    one_line(result, 3, "a seccomp filter forbids bpf(2)", "seccomp=unconfined")


@requires("root", "private mount namespaces", "qemu-system-x86_64")
def test_without_kvm(tmp_path: Path) -> None:
    """/dev/kvm exists but is not KVM, as in a container with another device there."""
    hide = 'mount --bind /dev/null /dev/kvm && exec "$@"'
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", hide, "sh", *command("demo")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    one_line(result, 3, "KVM cannot be used", "nested virtualisation")


@requires("root", "bcc", "kernel BTF")
def test_a_pid_that_is_gone(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    one_line(run(tmp_path, "record", "--pid", str(ended.pid)), 2, f"no process has pid {ended.pid}")


def with_module(directory: Path, text: str) -> dict[str, str]:
    """An environment in which `import bcc` finds this text: outside the current directory, which is not searched."""
    modules = directory / "modules"
    modules.mkdir()
    (modules / "bcc.py").write_text(text)
    return dict(os.environ, PYTHONPATH=os.pathsep.join([str(modules), *sys.path]))


@requires(*TRACING)
def test_without_bcc(tmp_path: Path) -> None:
    """A Python without the distribution's packages."""
    environment = with_module(tmp_path, "raise ImportError('no bcc for this test')\n")
    with QemuPair(QUICK) as pair:
        result = subprocess.run(
            command("record", "--pid", str(pair.source.pid)),
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False, env=environment,
        )  # fmt: skip
    one_line(result, 3, "apt-get install python3-bpfcc")


def test_a_report_needs_neither_root_nor_bcc(tmp_path: Path) -> None:
    environment = with_module(tmp_path, "raise SystemExit('bcc was imported')\n")
    data = next(Path("tests/data").resolve().glob("*.rec"))
    result = subprocess.run(
        command("report", str(data)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert "dirty log    last fetch " in result.stdout
