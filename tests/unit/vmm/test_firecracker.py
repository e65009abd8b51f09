# SPDX-License-Identifier: Apache-2.0
"""A hand-over between two servers that behave like Firecracker, or refuse, hang, drip, die, or send anything.

What must hold: the guest is never lost and never runs twice. So each failure is checked for whether the source was
asked to resume.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.cli import main
from ebpf_mig.errors import PreflightError, UsageError, VmmError
from ebpf_mig.recording.events import Mark
from ebpf_mig.vmm import adapter, unix_http
from ebpf_mig.vmm.base import Outcome
from ebpf_mig.vmm.firecracker import files, migration
from ebpf_mig.vmm.firecracker.api import Api
from ebpf_mig.vmm.firecracker.lab import ENVIRONMENT, find_binary
from ebpf_mig.vmm.firecracker.log import LogPlace
from ebpf_mig.vmm.firecracker.migration import FcMigration, FcOptions
from tests.companion import Companion
from tests.unit.vmm.test_hostile_peers import WRONG, in_a_line

SERVER = Path(__file__).with_name("firecracker_server.py")
REFUSED = {"status": 400, "body": {"fault_message": "Cannot do that\nnow"}}
Misbehaviour = dict[str, dict[str, Any]]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix_http, "QUICK_S", 1)
    monkeypatch.setattr(migration, "RESUME_S", 0.5)
    monkeypatch.setattr(migration, "PATIENCE_S", 0.3)
    monkeypatch.setattr(migration, "DEATH_S", 0.5)


class Served:
    """A server process; `calls()` are those that it has received."""

    def __init__(self, path: Path, state: str, misbehave: Misbehaviour) -> None:
        self.path = str(path)
        command = [
            sys.executable,
            "-I",
            "-S",
            str(SERVER),
            self.path,
            json.dumps({"state": state, "misbehave": misbehave}),
        ]
        self.log = path.with_suffix(".calls")
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out)
        until = time.monotonic() + 10
        while "ready" not in self.log.read_text():
            assert time.monotonic() < until and self.process.poll() is None
            time.sleep(0.005)

    def calls(self) -> list[str]:
        return [line.split()[0] for line in self.log.read_text().splitlines()[1:]]

    def body(self, name: str) -> dict[str, Any]:
        line = next(line for line in self.log.read_text().splitlines() if line.startswith(name))
        return dict(json.loads(line.partition(" ")[2]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Pair:
    """Two servers and a directory."""

    source: Served
    destination: Served
    options: FcOptions

    def connect(self) -> FcMigration:
        return FcMigration(self.source.path, self.destination.path, self.options)

    def run(self, timeout_s: float = 20) -> Outcome:
        with contextlib.closing(self.connect()) as one:
            one.prepare()
            return one.run(timeout_s)

    def resumed(self) -> bool:
        """Whether the source got its guest back."""
        return "resume" in self.source.calls()


@contextlib.contextmanager
def pair(
    directory: Path, source: Misbehaviour | None = None, destination: Misbehaviour | None = None
) -> Iterator[Pair]:
    ends = [Served(directory / "a", "Running", source or {}), Served(directory / "b", "Not started", destination or {})]
    (directory / "snapshot").mkdir()
    try:
        yield Pair(ends[0], ends[1], FcOptions(str(directory / "snapshot"), after_ns=0))
    finally:
        for end in ends:
            end.close()


def test_a_hand_over(tmp_path: Path) -> None:
    with pair(tmp_path) as two:
        two.options = replace(two.options, after_ns=300_000_000)
        begin = time.monotonic()
        outcome = two.run()
        assert time.monotonic() - begin >= 0.3, "the restored guest is traced on"
        assert (outcome.result, outcome.error) == ("completed", "")
        assert two.source.calls()[-2:] == ["pause", "create"], "the source stays paused"
        assert two.destination.calls()[-2:] == ["load", "instance"]
        state, memory = (str(tmp_path / "snapshot" / name) for name in ("vm.state", "vm.memory"))
        assert two.source.body("create") == {"snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory}
        backend = {"backend_type": "File", "backend_path": memory}
        assert two.destination.body("load") == {"snapshot_path": state, "mem_backend": backend, "resume_vm": True}
        marks = [m for m in outcome.marks if isinstance(m, Mark)]
        assert [m.name for m in marks] == [
            "session.trigger", "firecracker.API.pause.begin", "firecracker.API.pause.end",
            "firecracker.API.create.begin", "firecracker.API.create.end", "firecracker.API.load.begin",
            "firecracker.API.load.end", "firecracker.MIGRATION.completed",
        ]  # fmt: skip
        assert [m.at_ns for m in marks] == sorted(m.at_ns for m in marks)
        source, destination = two.source.process.pid, two.destination.process.pid
        assert [m.pid for m in marks] == [source] * 5 + [destination] * 2 + [source]


def test_a_diff_through_a_page_fault_handler(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"\0" * (1 << 20))
    with pair(tmp_path) as two:
        uffd = os.path.relpath(two.destination.path)  # any socket that is there
        two.options = replace(two.options, diff=str(base), uffd=uffd, track_dirty_pages=True)
        assert two.run().result == "completed"
        create, load = two.source.body("create"), two.destination.body("load")
        assert (create["snapshot_type"], create["mem_file_path"]) == ("Diff", str(base))
        assert load["mem_backend"] == {"backend_type": "Uffd", "backend_path": str(Path(uffd).absolute())}
        assert load["track_dirty_pages"] is True


def test_the_field_of_an_old_version(tmp_path: Path) -> None:
    old = {"body": {"app_name": "Firecracker", "state": "Not started", "vmm_version": "1.12.1"}, "status": 200}
    with pair(tmp_path, destination={"instance": old}) as two:
        two.options = replace(two.options, track_dirty_pages=True)
        two.run()
        assert two.destination.body("load")["enable_diff_snapshots"] is True


@pytest.mark.parametrize("call", ["pause", "create"])
def test_a_refusal_by_the_source_gives_it_its_guest_back(tmp_path: Path, call: str) -> None:
    with pair(tmp_path, {call: REFUSED}) as two:
        outcome = two.run()
        assert outcome.result == "failed"
        assert "Cannot do that" in outcome.error and "the guest runs on the source again" in outcome.error
        assert two.resumed() and "load" not in two.destination.calls()


def test_a_refusal_by_the_destination_gives_the_source_its_guest_back(tmp_path: Path) -> None:
    with pair(tmp_path, destination={"load": REFUSED}) as two:
        outcome = two.run()
        assert (outcome.result, two.resumed()) == ("failed", True)
        assert "the destination refuses snapshot/load: Cannot do that" in outcome.error


def test_a_destination_that_dies_while_it_loads_gives_the_source_its_guest_back(tmp_path: Path) -> None:
    with pair(tmp_path, destination={"load": {"die": 0}}) as two:
        outcome = two.run()
        assert (outcome.result, two.resumed()) == ("failed", True)
        assert "closed the connection" in outcome.error and "runs on the source again" in outcome.error


@pytest.mark.parametrize(
    ("wrong", "result", "back"),
    [
        ({"raw": "", "state": "Running"}, "completed", False),
        ({"raw": "", "state": "Paused"}, "unknown", False),
        ({"raw": "", "state": "Not started"}, "failed", True),
        ({"delay_s": 30}, "unknown", False),
        ({"drip": "HTTP/1.1 2"}, "unknown", False),
        ({"status": 204, "state": "Paused"}, "unknown", False),
        ({"status": 200, "body": "hello", "state": "Paused"}, "unknown", False),
        ({"status": 200, "body": "", "state": "Not started"}, "failed", True),
    ],
    ids=json.dumps,
)
def test_a_load_without_a_clear_answer(tmp_path: Path, wrong: dict[str, Any], result: str, back: bool) -> None:
    """The guest may run on the destination, so only a destination that says it has none gives it back."""
    with pair(tmp_path, destination={"load": wrong}) as two:
        begin = time.monotonic()
        outcome = two.run(1)
        assert (outcome.result, two.resumed()) == (result, back), outcome.error
        assert time.monotonic() - begin < 8
        assert ("the source stays paused" in outcome.error) is (result == "unknown")


@pytest.mark.parametrize("call", ["pause", "create"])
def test_a_call_that_is_late_but_ends_gives_the_guest_back(tmp_path: Path, call: str) -> None:
    with pair(tmp_path, {call: {"delay_s": 0.6}}) as two:
        outcome = two.run(0.5)
        assert (outcome.result, two.resumed()) == ("failed", True)
        assert "not done in time; the guest runs on the source again" in outcome.error
        assert "load" not in two.destination.calls()


def test_a_create_without_end(tmp_path: Path) -> None:
    with pair(tmp_path, {"create": {"delay_s": 30}}) as two:
        begin = time.monotonic()
        outcome = two.run(0.2)
        assert time.monotonic() - begin < 5
        assert outcome.result == "unknown" and "may be paused on the source" in outcome.error
        assert "load" not in two.destination.calls()


@pytest.mark.parametrize(("moment", "result"), [("create", "cancelled"), ("load", "completed")])
def test_an_interruption(tmp_path: Path, moment: str, result: str) -> None:
    """Before the load, the source gets its guest back. The load itself is not left half done."""
    slow = {moment: {"delay_s": 0.4}}
    migration.PATIENCE_S = 5
    with pair(tmp_path, slow, slow) as two, contextlib.closing(two.connect()) as one:
        one.prepare()
        threading.Timer(0.2, one.cancel).start()
        outcome = one.run(20)
        assert (outcome.result, two.resumed()) == (result, result == "cancelled"), outcome.error


def test_an_interruption_before_the_pause(tmp_path: Path) -> None:
    with pair(tmp_path) as two, contextlib.closing(two.connect()) as one:
        one.prepare()
        one.cancel()
        assert one.run(5).result == "cancelled"
        assert "pause" not in two.source.calls()


@pytest.mark.parametrize("later_s", [0, 0.4])
def test_a_source_that_dies_takes_its_guest_with_it(tmp_path: Path, later_s: float) -> None:
    """Also if its sockets are closed while it still ends."""
    with pair(tmp_path, {"create": {"die": later_s}}) as two:
        outcome = two.run()
        assert outcome.result == "failed" and "the source has ended, and its guest with it" in outcome.error
        assert "load" not in two.destination.calls()


def test_a_source_that_does_not_resume_is_said(tmp_path: Path) -> None:
    with pair(tmp_path, {"resume": REFUSED}, {"load": REFUSED}) as two:
        outcome = two.run()
        assert outcome.result == "failed" and "the guest may be paused on the source" in outcome.error


@pytest.mark.parametrize(
    ("source", "destination", "words"),
    [
        ("Paused", "Not started", "no running VM .state Paused"),
        ("Not started", "Not started", "no running VM .state Not started"),
        ("Running", "Running", "has a VM already"),
        ("Running", "Paused", "has a VM already"),
    ],
)
def test_ends_in_the_wrong_state_are_left_alone(tmp_path: Path, source: str, destination: str, words: str) -> None:
    def being(state: str) -> Misbehaviour:
        return {"instance": {"status": 200, "body": {"app_name": "Firecracker", "state": state, "vmm_version": "1"}}}

    with pair(tmp_path, being(source), being(destination)) as two:
        with pytest.raises(VmmError, match=words):
            two.run()
        assert set(two.source.calls()) <= {"instance", "machine-config"}


def test_files_are_looked_at_before_the_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(two: Pair, words: str, **changes: str | None) -> None:
        two.options = replace(two.options, **changes)  # type: ignore[arg-type]
        with pytest.raises(VmmError, match=words):
            two.run()
        assert "pause" not in two.source.calls()

    with pair(tmp_path) as two:
        directory = two.options.directory
        refused(two, "sees no directory", directory=str(tmp_path / "none"))
        for name in ("vm.state", "vm.memory"):
            Path(directory, name).touch()
            refused(two, f"{name} exists already", directory=directory)
            Path(directory, name).unlink()
        refused(two, "sees no file", diff=str(tmp_path / "base"))
        (tmp_path / "base").write_bytes(b"short")
        refused(two, "has 5 bytes, the guest has 1048576 bytes", diff=str(tmp_path / "base"))
        refused(two, "the destination finds nothing at", diff=None, uffd=str(tmp_path / "none"))
        refused(two, "the destination finds no socket at /etc/passwd", uffd="/etc/passwd")
        monkeypatch.setattr(files, "_STATE_ROOM_BYTES", 1 << 60)
        two.options = replace(two.options, diff=None)
        refused(two, "free, the guest has 1.0 MiB of memory")


@contextlib.contextmanager
def jailed(directory: Path) -> Iterator[int]:
    """The pid of a process with that root directory."""
    code = "import os, sys; os.chroot(sys.argv[1]); os.write(1, b'x'); sys.stdin.read()"
    with Companion(
        [sys.executable, "-I", "-S", "-c", code, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.read(1) == b"x"
        yield process.pid
        process.stdin.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root")
def test_a_jail_of_another_root_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "jail" / "snapshot").mkdir(parents=True)
    with jailed(tmp_path / "jail") as inside, jailed(Path("/")) as outside:
        own = files.SnapshotFiles.of("/snapshot", None)
        own.check(inside, inside, 1)
        with pytest.raises(VmmError, match="the destination does not see the source's directory /snapshot"):
            own.check(inside, outside, 1)
        with pytest.raises(VmmError, match="the source sees no directory /snapshot"):
            own.check(outside, inside, 1)


@contextlib.contextmanager
def one_end(path: Path, misbehave: Misbehaviour) -> Iterator[Api]:
    served = Served(path, "Running", misbehave)
    try:
        yield Api(served.path, "source")
    finally:
        served.close()


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize("shape", [lambda x: x, lambda x: {"app_name": "Firecracker", "state": x, "vmm_version": x}])
def test_answers_of_any_type(tmp_path: Path, shape: Callable[[Any], Any], wrong: Any) -> None:
    body = {"status": 200, "body": " " + json.dumps(shape(wrong))}
    with one_end(tmp_path / "s", dict.fromkeys(("instance", "machine-config", "pause"), body)) as api:
        for call in (api.instance, api.memory_bytes, lambda: api.pause(1)):
            in_a_line(call)
            with pytest.raises(VmmError):
                call()


@pytest.mark.parametrize(
    "wrong",
    [{"raw": ""}, {"raw": "garbage\r\n\r\n"}, {"raw": "HTTP/1.1 200 X\r\nContent-Length: " + "9" * 5000 + "\r\n\r\n"},
     {"status": 400, "body": "x" * 50_000}, {"drip": "H"},
     {"drip": "HTTP/1.1 200 OK\r\nX: 1\r\n"}, {"status": 500, "body": "[" * 5000}, {"status": 400, "body": ""},
     {"status": 400, "body": [1]}, {"status": 302}],
    ids=lambda wrong: json.dumps(wrong)[:50],
)  # fmt: skip
def test_answers_of_any_bytes(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with one_end(tmp_path / "s", dict.fromkeys(("instance", "pause"), wrong)) as api:
        for call in (api.instance, lambda: api.pause(1)):
            with pytest.raises(VmmError) as caught:
                call()
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


def test_the_user_sees_one_line_and_exit_code_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["migrate", "firecracker", "--source", str(tmp_path / "a"), "--destination", "/b", "--snapshot-dir", "/d"]
    assert main(command) == 4
    said = capsys.readouterr().err.strip().splitlines()
    assert "No such file or directory" in said[0]


def test_one_vmm_twice(tmp_path: Path) -> None:
    with pair(tmp_path) as two, pytest.raises(VmmError, match="the same Firecracker"):
        FcMigration(two.source.path, two.source.path, two.options)


@pytest.mark.parametrize("more", [["--backend", "uffd"], ["--uffd-socket", "/u"], ["--source-host", "far"]])
def test_options_that_do_not_fit(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["migrate", "firecracker", "--source", "/a", "--destination", "/b", "--snapshot-dir", "/d"]
    assert main([*command, *more]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ["--local"],
        ["--two-hosts"],
        ["--dirty-ring", "1024"],
        ["--multifd", "2"],
        ["--downtime-limit", "1s"],
        ["--bandwidth", "1Gbit"],
    ],
)
def test_a_demo_that_firecracker_cannot_do(
    more: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebpf_mig.commands.demo.require_tracing", lambda: None)
    assert main(["demo", "--vmm", "firecracker", *more]) == 2
    assert "Firecracker" in capsys.readouterr().err


def test_its_own_times(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("'pause vm' API request took 1 us.\n")
    place = LogPlace.now(str(log))
    with log.open("a") as file:
        file.write(
            "2026-11-29T11:24:36.511566505 [anonymous-instance:main] 'pause vm' VMM action took 60 us.\n"
            "2026-11-29T11:24:36.511578348 [anonymous-instance:fc_api] 'pause vm' API request took 124 us.\n"
            "2026-11-29T11:24:36.936488074 [x:main] 'create diff snapshot' VMM action took 424497 us.\n"
            "'launch rocket' API request took 5 us.\n'load snapshot' API request took "
            + "9" * 30
            + " us.\n\0\xff'resume vm' API request took 7 us."
        )
    assert place.figures() == {"vmm_pause_vm": 60, "pause_vm": 124, "vmm_diff_create_snapshot": 424497, "resume_vm": 7}
    assert LogPlace.now(str(tmp_path / "none")).figures() == {}


def test_no_binary_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "/nonexistent/from-environment")
    with pytest.raises(PreflightError, match="no /nonexistent/from-environment found") as caught:
        find_binary(None)
    assert ENVIRONMENT in str(caught.value.remedy)
    check = next(iter(adapter("firecracker").checks()))
    assert (check.name, check.state) == ("Firecracker", "warn")


def test_no_lab_on_another_host() -> None:
    with pytest.raises(UsageError, match="cannot be on another host"):
        adapter("firecracker").far_end("source", {})
