# SPDX-License-Identifier: Apache-2.0
"""The result that `record` reports for a migration that it does not drive, for each ending. The witness is QMP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair, find_binary
from tests.companion import Companion
from tests.conftest import TRACING, requires
from tests.integration.migrations import QUICK

pytestmark = requires(*TRACING)
BOTH = pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.long)])


class Qmp:
    """A QMP client that shares no code with the product."""

    def __init__(self, path: str) -> None:
        self._events: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        # Not "rw": a write to such a file drops what was read ahead, for instance an event right behind a reply.
        self._file = self._socket.makefile("r")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        request = {"execute": command, "arguments": arguments} if arguments else {"execute": command}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = json.loads(self._file.readline())
            if "return" in answer or "error" in answer:
                return answer.get("return", answer)
            self._events.append(answer)

    def at(self, event: str) -> int:
        """QEMU's time stamp of the last such event, ns of the wall clock."""
        deadline = time.monotonic() + 5
        while True:
            self("query-status")
            stamp = next((e["timestamp"] for e in reversed(self._events) if e["event"] == event), None)
            if stamp is not None:
                return int(stamp["seconds"] * 10**9 + stamp["microseconds"] * 1000)
            assert time.monotonic() < deadline, f"no {event} among {[e['event'] for e in self._events]}"
            time.sleep(0.02)

    def hears(self, event: str) -> None:
        """Waits for the next such event."""
        while (said := json.loads(self._file.readline())).get("event") != event:
            self._events.append(said)
        self._events.append(said)

    def capability(self, *names: str) -> None:
        self("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in names])

    def status(self) -> str:
        return str(self("query-migrate").get("status"))

    def reaches(self, *statuses: str) -> str:
        deadline = time.monotonic() + 30
        while (status := self.status()) not in statuses:
            assert time.monotonic() < deadline, status
            time.sleep(0.02)
        return status

    def runs(self) -> bool:
        return bool(self("query-status")["status"] == "running")


Act = Callable[[QemuPair, Qmp, Qmp], None]
AGREES_NS = 20_000_000
"""QEMU's STOP and RESUME lie this close to what they name, on a machine that is not busy."""


def record(directory: Path, act: Act, *, both: bool = False) -> tuple[Breakdown, str]:
    """(breakdown, why the recording ended) for `act` on a source that is traced alone or with its destination."""
    with QemuPair(QUICK) as pair:
        source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
        pids = ["--pid", str(pair.source.pid), *(["--pid", str(pair.destination.pid)] if both else [])]
        command = [sys.executable, "-m", "ebpf_mig", "record", *pids, "-o", str(directory / "seen.rec")]
        with Companion(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None and "tracing" in process.stderr.readline()
            act(pair, source, destination)
            said = process.communicate(timeout=30)[1]
        assert process.returncode == 0, said
    recording = read_recording(directory / "seen.rec")
    return analyse(recording).breakdown, said.split(": ")[1].split(";")[0] if said.startswith("ebpf-mig") else said


def migrate(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    destination("migrate-incoming", uri=pair.uri)
    source("migrate", uri=pair.uri)


def complete(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    migrate(pair, source, destination)
    assert source.reaches("completed", "failed") == "completed"


def complete_with_return_path(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    source.capability("return-path")
    destination.capability("return-path")
    complete(pair, source, destination)
    until = time.monotonic() + 3
    while time.monotonic() < until:  # polled, as by libvirt and others
        source.status()


@pytest.mark.parametrize("act", [complete, complete_with_return_path])
def test_a_source_alone_completes_by_the_answer_or_by_closing_the_connection(act: Act, tmp_path: Path) -> None:
    seen, reason = record(tmp_path, act)
    assert (seen.migration.mode, seen.migration.result, seen.blackout_ns) == ("precopy", "completed", None)
    assert "handed-over" in reason


def test_a_source_alone_knows_postcopy(tmp_path: Path) -> None:
    """The pages that follow the start take a second. The witness is QEMU, from STOP to RESUME."""
    dark_ns: list[int] = []

    def act(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
        for side in (source, destination):
            side.capability("postcopy-ram")
        source("migrate-set-parameters", **{"max-bandwidth": 1 << 20, "max-postcopy-bandwidth": 1 << 20})
        migrate(pair, source, destination)
        assert source.reaches("active", "failed") == "active"
        source("migrate-start-postcopy")
        assert source.reaches("completed", "failed") == "completed"
        dark_ns.append(destination.at("RESUME") - source.at("STOP"))

    seen, _ = record(tmp_path, act)
    assert (seen.migration.mode, seen.migration.result) == ("postcopy", "completed")
    assert seen.window_ns is not None and seen.window_ns <= dark_ns[0] + AGREES_NS, (seen.window_ns, dark_ns)


def stall(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    """The destination is stopped by SIGSTOP before the switchover, so it does not answer."""
    source.capability("pause-before-switchover", "return-path")
    destination.capability("return-path")
    migrate(pair, source, destination)
    source.reaches("pre-switchover")
    os.kill(pair.destination.pid, signal.SIGSTOP)
    source("migrate-continue", state="pre-switchover")


def stall_and_kill_the_destination(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    stall(pair, source, destination)
    time.sleep(5)
    os.kill(pair.destination.pid, signal.SIGKILL)
    assert source.reaches("failed", "completed") == "failed"
    assert source.runs()


@BOTH
def test_a_destination_that_stalls_for_5_s_is_no_success(both: bool, tmp_path: Path) -> None:
    seen, reason = record(tmp_path, stall_and_kill_the_destination, both=both)
    assert seen.migration.result == "failed", "the source alone sees the connection break"
    assert "logging-ended" in reason and seen.blackout_ns is not None and seen.blackout_ns > 5 * 10**9
    assert next(p.side for p in seen.phases if p.phase == "resume") == "source"
    assert seen.migration.paused_after is False


def stall_and_kill_the_source(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    stall(pair, source, destination)
    time.sleep(1)
    os.kill(pair.source.pid, signal.SIGKILL)


def test_a_source_that_is_killed_while_its_destination_stalls_is_no_success(tmp_path: Path) -> None:
    seen, reason = record(tmp_path, stall_and_kill_the_source)
    assert seen.migration.result == "unknown" and "target-died" in reason


def to_a_file_and_cont(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    source("migrate", uri="exec:cat > /dev/null")
    assert source.reaches("completed", "failed") == "completed"
    time.sleep(0.3)
    source("cont")
    assert source.runs()


def to_a_file(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    source("migrate", uri="exec:cat > /dev/null")
    assert source.reaches("completed", "failed") == "completed"
    time.sleep(0.5)
    source("quit")


@pytest.mark.parametrize("act", [to_a_file_and_cont, to_a_file])
def test_a_state_that_went_to_a_file_was_saved(act: Act, tmp_path: Path) -> None:
    seen, _ = record(tmp_path, act)
    assert seen.migration.result == "saved"
    if act is to_a_file_and_cont:
        assert seen.migration.paused_after is False
        parts = {p.phase: (p.side, p.duration_ns) for p in seen.phases}
        waited, (side, resumed) = parts["management"][1], parts["resume"]
        assert waited > 300 * 10**6, "QEMU was ready, and waited for `cont`: the caller slept for 300 ms"
        assert side == "source" and 0 < resumed < 100 * 10**6
        assert seen.window_ns is not None and parts["unattributed"][1] < 0.02 * seen.window_ns


def paused(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    source("stop")
    time.sleep(0.5)
    complete_with_return_path(pair, source, destination)


def paused_and_set_going_there(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    source("stop")
    time.sleep(0.5)
    complete(pair, source, destination)
    time.sleep(0.5)
    destination("cont")


def paused_and_taken_back(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    source("stop")
    time.sleep(0.5)
    kill_the_destination(pair, source, destination)
    source("cont")
    time.sleep(0.5)


@BOTH
@pytest.mark.parametrize(
    ("act", "result", "after"),
    [
        (paused, "completed", True),
        (paused_and_set_going_there, "completed", False),
        (paused_and_taken_back, "failed", False),
    ],
)
def test_a_paused_guest(act: Act, result: str, after: bool, both: bool, tmp_path: Path) -> None:
    """The user stopped it, not the migration, however long before or after."""
    seen, reason = record(tmp_path, act, both=both)
    assert (seen.window_ns, seen.blackout_ns, seen.throttled) == (None, None, None), reason
    assert seen.migration.paused_before is True
    if both:
        assert (seen.migration.result, seen.migration.paused_after) == (result, after)
    else:
        assert seen.migration.result in (result, "unknown") and seen.migration.paused_after in (after, None)


def snapshot(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    """Stops the guest by itself; the disk that takes the state belongs to no device."""
    path = str(pair.directory / "state")
    for driver, more in (("file", {"filename": path}), ("qcow2", {"file": "file"})):
        job = {"driver": driver, "size": 0 if driver == "file" else 1 << 20, **more}
        source("blockdev-create", **{"job-id": driver, "options": job})
        while not any(one["status"] == "concluded" for one in source("query-jobs")):
            time.sleep(0.01)
        source("job-dismiss", id=driver)
        source("blockdev-add", **{"driver": driver, "node-name": driver, **more})
    source("snapshot-save", **{"job-id": "s", "tag": "s", "vmstate": "qcow2", "devices": ["qcow2"]})
    while not any(one["status"] == "concluded" for one in source("query-jobs")):
        time.sleep(0.01)
    assert "error" not in source("query-jobs")[0] and source.runs()


def test_a_snapshot_has_the_blackout_that_it_causes(tmp_path: Path) -> None:
    seen, _ = record(tmp_path, snapshot)
    assert (seen.migration.result, seen.migration.paused_before) == ("saved", False)
    assert seen.blackout_ns is not None and 0 < seen.blackout_ns < 10**10


def kill_the_destination(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    source("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
    migrate(pair, source, destination)
    time.sleep(0.5)
    os.kill(pair.destination.pid, signal.SIGKILL)
    assert source.reaches("failed", "completed") == "failed"


@BOTH
def test_a_destination_that_dies_before_the_stop(both: bool, tmp_path: Path) -> None:
    seen, _ = record(tmp_path, kill_the_destination, both=both)
    assert (seen.migration.result, seen.window_ns) == ("failed", None)


def kill_the_destination_with_return_path(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    source.capability("return-path")
    destination.capability("return-path")
    kill_the_destination(pair, source, destination)


def cancel(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    source("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
    migrate(pair, source, destination)
    time.sleep(0.5)
    source("migrate_cancel")
    assert source.reaches("cancelled", "failed", "completed") == "cancelled"
    time.sleep(0.5)


def stall_and_cancel(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
    stall(pair, source, destination)
    time.sleep(0.5)
    source("migrate_cancel")
    time.sleep(0.5)
    os.kill(pair.destination.pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("act", "result"),
    [(kill_the_destination_with_return_path, "failed"), (cancel, "unknown"), (stall_and_cancel, "unknown")],
)
def test_a_source_alone_tells_a_broken_connection_from_one_that_it_shut_down(
    act: Act, result: str, tmp_path: Path
) -> None:
    seen, reason = record(tmp_path, act)
    assert seen.migration.result == result, reason


LOUD = 'for s in INT TERM HUP; do trap "echo $s" $s; done; echo ready; while ! test -e end; do sleep 0.1; done; exit 7'


def with_command(directory: Path, pids: Sequence[int], *command: str) -> subprocess.Popen[str]:
    named = [word for pid in pids for word in ("--pid", str(pid))]
    line = [sys.executable, "-m", "ebpf_mig", "record", *named, "-o", "seen.rec", "--force", "--", *command]
    return subprocess.Popen(line, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_command_is_waited_for_and_never_signalled(tmp_path: Path) -> None:
    """The migration has been over for seconds, and COMMAND still runs."""
    with QemuPair(QUICK) as pair:
        process = with_command(tmp_path, [pair.source.pid, pair.destination.pid], "sh", "-c", LOUD)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
        complete(pair, source, destination)
        time.sleep(3)
        assert process.poll() is None
        (tmp_path / "end").touch()
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (7, ""), err
    assert analyse(read_recording(tmp_path / "seen.rec")).breakdown.migration.result == "completed"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interruption_is_passed_on_once(number: signal.Signals, code: int, tmp_path: Path) -> None:
    with QemuPair(QUICK) as pair:
        process = with_command(tmp_path, [pair.source.pid], "sh", "-c", LOUD)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name[3:]}\n"
        time.sleep(0.5)
        assert process.poll() is None, "COMMAND still runs"
        process.send_signal(number)
        assert process.wait(20) == code
        (tmp_path / "end").touch()
        assert process.stdout.read() == "", "the second one only ends the recording"
        assert process.stderr is not None and "left alone" in process.stderr.read()
    assert not read_recording(tmp_path / "seen.rec").truncated


def one_line(*arguments: str, code: int, word: str) -> None:
    command = [sys.executable, "-m", "ebpf_mig", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == code and len(lines) == 1 and word in lines[0], done.stderr


def test_a_process_without_kvm_is_refused_at_once() -> None:
    tcg = [find_binary(None), "-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none", "-S"]
    for command in (["sleep", "60"], tcg):
        with Companion(command) as process:
            try:
                time.sleep(0.5)
                one_line("record", "--pid", str(process.pid), code=2, word="has no KVM VM")
            finally:
                process.kill()


def test_a_paused_guest_is_named_at_once(tmp_path: Path) -> None:
    with QemuPair(QUICK) as pair:
        Qmp(pair.source.qmp)("stop")
        process = with_command(tmp_path, [pair.source.pid], "true")
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 0 and "is paused" in said.splitlines()[0]


@pytest.mark.long
def test_a_vmm_that_cannot_be_cancelled_does_not_keep_us(tmp_path: Path) -> None:
    with QemuPair(QUICK) as pair:
        Qmp(pair.source.qmp)("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
        # The lab's monitor serves one client: ours is gone by now.
        ends = ["--source", pair.source.qmp, "--destination", pair.destination.qmp, "--uri", pair.uri]
        command = [sys.executable, "-m", "ebpf_mig", "migrate", "qemu", *ends, "-o", str(tmp_path / "cut.rec")]
        with Companion(command, stderr=subprocess.PIPE, text=True) as process:
            while not (tmp_path / "cut.rec").exists():
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(1)
            os.kill(pair.source.pid, signal.SIGSTOP)
            process.send_signal(signal.SIGTERM)
            begin = time.monotonic()
            said = process.communicate(timeout=60)[1]
            assert time.monotonic() - begin < 40 and process.returncode == 143
            assert "left alone" in said
        os.kill(pair.source.pid, signal.SIGCONT)
    assert not read_recording(tmp_path / "cut.rec").truncated
