# SPDX-License-Identifier: Apache-2.0
"""The QMP adapter against monitors that are absent, busy, hostile or broken: one clear error each, and no hang."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.errors import VmmError
from ebpf_mig.linux import kvm, procfs
from ebpf_mig.recording.events import Mark
from ebpf_mig.vmm.base import Outcome, mark
from ebpf_mig.vmm.qemu import endpoint, monitor
from ebpf_mig.vmm.qemu import migration as adapter
from ebpf_mig.vmm.qemu.adapter import ADAPTER
from ebpf_mig.vmm.qemu.migration import QemuMigration, QemuOptions
from tests.conftest import requires
from tests.unit.vmm.qmp_server import GREETING, Connection, Reply, Talk, qemu, refusal, replies, serve


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that a user sees are short here."""
    monkeypatch.setattr(monitor, "GREETING_S", 0.5)
    monkeypatch.setattr(monitor, "COMMAND_S", 0.5)
    monkeypatch.setattr(adapter, "_CANCEL_S", 0.5)
    monkeypatch.setattr(adapter, "DESTINATION_S", 0.5)
    monkeypatch.setattr(adapter, "_CONTRADICTION_S", 0.5)


@pytest.fixture(autouse=True)
def _no_complaints(recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """In every test, asyncio and qemu.qmp must print nothing, and no thread may be left."""
    yield
    assert not [str(w.message) for w in recwarn.list]
    assert not [record for record in caplog.records if record.name.startswith(("asyncio", "qemu"))]
    assert not [thread for thread in threading.enumerate() if thread.name == "qmp"]


@pytest.fixture
def vmm() -> Iterator[subprocess.Popen[bytes]]:
    """A process in the place of the QEMU behind a fake monitor; it can be killed."""
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


def connect_error(path: Path | str) -> VmmError:
    begin = time.monotonic()
    with pytest.raises(VmmError) as caught:
        QemuMigration(str(path), None, "tcp:127.0.0.1:1")
    assert time.monotonic() - begin < 10
    assert "\n" not in str(caught.value) and caught.value.remedy
    return caught.value


def test_a_vsock_uri_makes_the_kernel_load_vsock_before_the_probes_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def refused(family: int, _kind: int) -> socket.socket:
        made.append(family)
        raise OSError

    given = dict.fromkeys(("multifd", "downtime_limit", "bandwidth", "postcopy", "cpr_uri", "exec_command"))
    ends = {"source": str(tmp_path / "a"), "destination": str(tmp_path / "b"), "mode": "normal"}
    for uri in ("tcp:127.0.0.1:1", "vsock:1:5000"):
        with monkeypatch.context() as patched:
            patched.setattr("ebpf_mig.vmm.qemu.adapter.socket.socket", refused)
            patched.setattr(adapter, "QemuMigration", lambda *_: None)
            ADAPTER.connect(given | ends | {"uri": uri})
    assert made == [socket.AF_VSOCK]


def test_absent_socket(tmp_path: Path) -> None:
    error = connect_error(tmp_path / "none")
    assert str(tmp_path / "none") in str(error) and "No such file" in str(error)


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(tmp_path / "s"))
    assert "Connection refused" in str(connect_error(tmp_path / "s"))


def test_not_a_socket(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    assert "Connection refused" in str(connect_error(tmp_path / "file"))


@pytest.mark.parametrize("path", ["x" * 200, "nul\0byte", ""])
def test_impossible_paths(path: str) -> None:
    assert "cannot use" in str(connect_error(path))


@requires("root")
def test_a_socket_of_somebody_else(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    with serve(tmp_path / "s", qemu(os.getpid())):
        (tmp_path / "s").chmod(0o700)
        os.seteuid(65534)
        try:
            error = connect_error(tmp_path / "s")
        finally:
            os.seteuid(0)
    assert "Permission denied" in str(error)


def hang(connection: Connection) -> None:
    connection.read_all()


def test_a_monitor_in_use_does_not_greet(tmp_path: Path) -> None:
    with serve(tmp_path / "s", hang):
        error = connect_error(tmp_path / "s")
    assert "another client" in str(error) and "second -qmp socket" in str(error.remedy)


def test_a_monitor_with_a_queue_of_clients(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(str(tmp_path / "s"))
        error = connect_error(tmp_path / "s")
    assert "too many clients" in str(error)


def say(data: bytes) -> Talk:
    """Sends `data`, then closes."""

    def talk(connection: Connection) -> None:
        connection.socket.sendall(data)
        connection.socket.shutdown(socket.SHUT_WR)
        connection.read_all()

    return talk


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\xff\xfe\x00\n",
        b"[]\n",
        b'"QMP"\n',
        b'{"QMP": 1}\n',
        b'{"QMP": {"version": [], "capabilities": {}}}\n',
        b"[" * 100_000 + b"\n",
        GREETING[:40],
        GREETING,
        GREETING + b"garbage\n",
        GREETING + b'{"return": {}}\n' * 3,
        b"x" * (11 << 20),
    ],
    ids=lambda data: repr(data[:30]),
)
def test_not_qmp(tmp_path: Path, data: bytes) -> None:
    with serve(tmp_path / "s", say(data)):
        assert str(tmp_path / "s") in str(connect_error(tmp_path / "s"))


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("query_version", {"return": []}),
        ("query_version", {"return": {"qemu": {"major": "x"}}}),
        ("query_version", {"return": {"qemu": None}}),
        ("query_version", refusal("no such command")),
        ("query_version", {"nothing": 1}),
        ("query_version", b"}{\n"),
        ("query_version", None),
        ("qmp_capabilities", refusal("not today")),
    ],
)
def test_nonsense_at_the_handshake(tmp_path: Path, command: str, reply: Reply) -> None:
    special = {command: reply} if command == "query_version" else {}

    def talk(connection: Connection) -> None:
        connection.socket.sendall(GREETING)
        inner = replies(os.getpid(), **special)
        connection.answer(lambda name: reply if name == command else inner(name))

    with serve(tmp_path / "s", talk), pytest.raises(VmmError) as caught:
        QemuMigration(str(tmp_path / "s"), None, "tcp:127.0.0.1:1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cpus", [[], [{}], [{"thread-id": "x"}], [{"thread-id": 1 << 40}], {"a": 1}, None])
def test_the_pid_falls_back_to_the_peer(tmp_path: Path, cpus: Any) -> None:
    with serve(tmp_path / "s", qemu(1, query_cpus_fast={"return": cpus})):
        migration = QemuMigration(str(tmp_path / "s"), None, "tcp:127.0.0.1:1")
        targets = migration.targets()
        migration.close()
    assert [(t.pid, t.role, t.vmm, t.vmm_version) for t in targets] == [(os.getpid(), "source", "qemu", "7.2.22")]


@requires("/dev/kvm")
def test_the_process_with_a_kvm_machine_is_the_qemu(tmp_path: Path) -> None:
    """A thread id from a pid namespace belongs to another process outside of it."""
    with Path("/dev/kvm").open("rb", buffering=0) as dev, serve(tmp_path / "s", qemu(1)):
        machine = fcntl.ioctl(dev, kvm.CREATE_VM, 0)
        try:
            with contextlib.closing(QemuMigration(str(tmp_path / "s"), None, "tcp:127.0.0.1:1")) as migration:
                assert [target.pid for target in migration.targets()] == [os.getpid()]
        finally:
            os.close(machine)


def test_a_vcpu_thread_leads_to_its_process(tmp_path: Path) -> None:
    release, tids = threading.Event(), []
    thread = threading.Thread(target=lambda: (tids.append(threading.get_native_id()), release.wait(30)))
    thread.start()
    while not tids:
        time.sleep(0.001)
    assert tids[0] != os.getpid()
    assert procfs.process_of(tids[0]) == os.getpid()
    release.set()
    thread.join()


def test_source_and_destination_must_differ(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    with serve(a, qemu(os.getpid())), serve(b, qemu(os.getpid())), pytest.raises(VmmError, match="same QEMU"):
        QemuMigration(str(a), str(b), "tcp:127.0.0.1:1")


def test_an_absent_destination_lets_go_of_the_source(tmp_path: Path) -> None:
    with serve(tmp_path / "a", qemu(os.getpid())) as connections:
        with pytest.raises(VmmError, match="destination's QMP socket"):
            QemuMigration(str(tmp_path / "a"), str(tmp_path / "b"), "tcp:127.0.0.1:1")
        assert connections[0].closed.wait(5)


@pytest.mark.parametrize(
    ("special", "said"),
    [
        ({"query_status": {"return": {"status": "postmigrate"}}}, "no guest to migrate"),
        ({"query_status": {"return": []}}, "does not answer query-status as a QEMU"),
        ({"query_status": None}, "does not answer query-status within"),
        ({"migrate_set_capabilities": refusal("Unknown capability x")}, "Unknown capability x"),
        ({"migrate_set_parameters": refusal("out of range")}, "out of range"),
    ],
)
def test_refusals_before_the_migration(tmp_path: Path, special: dict[str, Reply], said: str) -> None:
    with serve(tmp_path / "s", qemu(os.getpid(), **special)):
        migration = QemuMigration(str(tmp_path / "s"), None, "tcp:127.0.0.1:1", QemuOptions(downtime_ms=5))
        with contextlib.closing(migration), pytest.raises(VmmError, match=said):
            migration.prepare()


def test_only_what_was_asked_for_is_set(tmp_path: Path) -> None:
    options = QemuOptions(bandwidth_bytes=0, multifd_channels=3, capabilities={"auto-converge": True})
    with serve(tmp_path / "s", qemu(os.getpid())) as connections:
        with contextlib.closing(QemuMigration(str(tmp_path / "s"), None, "tcp:127.0.0.1:1", options)) as migration:
            migration.prepare()
        said = {c["execute"]: c.get("arguments", {}) for c in connections[0].commands}
    assert said["migrate-set-parameters"] == {"max-bandwidth": 0, "multifd-channels": 3}
    capabilities = {c["capability"]: c["state"] for c in said["migrate-set-capabilities"]["capabilities"]}
    assert capabilities == {"events": True, "return-path": True, "multifd": True, "auto-converge": True}
    assert not {"migrate", "migrate_cancel", "quit", "stop", "cont"} & set(said)


def run(path: Path, special: dict[str, Any], vmm_pid: int, timeout_s: float = 20) -> Outcome:
    """One run against one monitor; `special` may hold functions that get the connection."""
    live: list[Connection] = []

    def bind(value: Any) -> Any:
        return (lambda: value(live[-1])) if callable(value) else value

    def talk(connection: Connection) -> None:
        live.append(connection)
        qemu(vmm_pid, **{name: bind(value) for name, value in special.items()})(connection)

    with contextlib.ExitStack() as stack:
        stack.enter_context(serve(path / "s", talk))
        migration = QemuMigration(str(path / "s"), None, "tcp:127.0.0.1:1")
        stack.callback(migration.close)
        migration.prepare()
        return migration.run(timeout_s)


def statuses(*names: str, after: Callable[[Connection], None] | None = None) -> Callable[[Connection], Reply]:
    """A reply to `migrate` after which these statuses come as events."""

    def reply(connection: Connection) -> Reply:
        def later() -> None:
            time.sleep(0.1)
            for name in names:
                connection.event("MIGRATION", {"status": name})
            if after is not None:
                after(connection)

        threading.Thread(target=later).start()
        return {"return": {}}

    return reply


def test_completed_without_a_destination(tmp_path: Path) -> None:
    figures = {"status": "completed", "downtime": 7, "total-time": 80, "ram": {"downtime-bytes": 1 << 20, "normal": -1}}
    special = {"migrate": statuses("setup", "active", "completed"), "query_migrate": {"return": figures}}
    before = time.monotonic_ns()
    outcome = run(tmp_path, special, os.getpid())
    assert (outcome.result, outcome.error) == ("completed", "")
    marks = {m.name: m for m in outcome.marks if isinstance(m, Mark)}
    assert (marks["qmp.downtime_ms"].value, marks["qmp.downtime_bytes"].value) == (7, 1 << 20)
    assert "qmp.normal" not in marks, "a negative count is nonsense"
    order = ("session.trigger", "qmp.MIGRATION.setup", "qmp.MIGRATION.active", "qmp.MIGRATION.completed")
    stamps = [marks[name].at_ns for name in order]
    assert stamps == sorted(stamps) and before <= stamps[0] and stamps[-1] <= time.monotonic_ns()
    assert marks["qmp.MIGRATION.active"].doubt_ns >= 500, "QEMU's stamps are whole microseconds"


def test_figures_that_come_late_are_asked_for_again(tmp_path: Path) -> None:
    answers = [{"status": "completed", "downtime": 0, "total-time": 0}, {"status": "completed", "total-time": 9}]

    def query(_connection: Connection) -> Reply:
        return {"return": answers.pop(0) if len(answers) > 1 else answers[0]}

    outcome = run(tmp_path, {"migrate": statuses("completed"), "query_migrate": query}, os.getpid())
    assert [m.value for m in outcome.marks if isinstance(m, Mark) and m.name == "qmp.total_time_ms"] == [9]


def test_failed_in_qemus_own_words(tmp_path: Path) -> None:
    answer = {"return": {"status": "failed", "error-desc": "Failed to connect: No route to host"}}
    outcome = run(tmp_path, {"migrate": statuses("setup", "failed"), "query_migrate": answer}, os.getpid())
    assert (outcome.result, outcome.error) == ("failed", "Failed to connect: No route to host")


def test_postcopy_that_broke_is_an_end(tmp_path: Path) -> None:
    outcome = run(tmp_path, {"migrate": statuses("postcopy-active", "postcopy-paused")}, os.getpid())
    assert outcome.result == "failed" and "postcopy" in outcome.error


def test_migrate_refused(tmp_path: Path) -> None:
    outcome = run(tmp_path, {"migrate": refusal("State blocked by non-migratable device")}, os.getpid())
    assert outcome.result == "failed" and "non-migratable device" in outcome.error


def test_a_timeout_cancels(tmp_path: Path) -> None:
    cancelled: list[float] = []

    def cancel(connection: Connection) -> Reply:
        cancelled.append(time.monotonic())
        return statuses("cancelling", "cancelled")(connection)

    special = {"migrate": statuses("setup", "active"), "migrate_cancel": cancel}
    outcome = run(tmp_path, special, os.getpid(), timeout_s=0.4)
    assert outcome.result == "cancelled" and "not done within 0.4 s" in outcome.error
    assert len(cancelled) == 1


def test_a_failure_that_our_cancellation_made_is_a_cancellation(tmp_path: Path) -> None:
    """Seen on QEMU 10.0, now and then: `active`, then `failed` with an error of the socket that the cancel shut."""
    answer = {"return": {"status": "failed", "error-desc": "Unable to write to socket: Connection reset by peer"}}
    special = {"migrate": statuses("active"), "migrate_cancel": statuses("failed"), "query_migrate": answer}
    outcome = run(tmp_path, special, os.getpid(), timeout_s=0.3)
    assert (outcome.result, outcome.error) == ("cancelled", "not done within 0.3 s")


def test_a_timeout_that_cannot_cancel_says_so(tmp_path: Path) -> None:
    special = {"migrate": statuses("setup", "active"), "migrate_cancel": None}
    outcome = run(tmp_path, special, os.getpid(), timeout_s=0.3)
    assert outcome.result == "unknown"
    assert "not done within 0.3 s" in outcome.error and "may go on" in outcome.error


def test_a_source_that_does_not_answer(tmp_path: Path) -> None:
    begin = time.monotonic()
    outcome = run(tmp_path, {"migrate": None}, os.getpid())
    assert outcome.result in {"failed", "unknown"} and "does not answer migrate" in outcome.error
    assert time.monotonic() - begin < 10


def test_a_source_that_dies(tmp_path: Path, vmm: subprocess.Popen[bytes]) -> None:
    def die(connection: Connection) -> None:
        connection.socket.shutdown(socket.SHUT_RDWR)
        vmm.send_signal(signal.SIGKILL)

    outcome = run(tmp_path, {"migrate": statuses("active", after=die)}, vmm.pid)
    assert (outcome.result, outcome.error) == ("failed", "the source QEMU ended during the migration")


def test_a_monitor_that_breaks_is_not_a_dead_qemu(tmp_path: Path, vmm: subprocess.Popen[bytes]) -> None:
    """The migration may still complete, so the result must not be `failed`."""

    def hang_up(connection: Connection) -> None:
        connection.socket.shutdown(socket.SHUT_RDWR)

    outcome = run(tmp_path, {"migrate": statuses("active", after=hang_up)}, vmm.pid)
    assert outcome.result == "unknown" and "monitor broke" in outcome.error


def test_hostile_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events of any shape are used or ignored; the next real one still counts."""
    monkeypatch.setattr(endpoint, "_MAX_MARKS", 500)

    def flood(connection: Connection) -> None:
        for data in (None, [], "text", 7, {"status": 5}, {"status": ["x"]}, {"pass": "many"}, {"pass": 1 << 70}):
            for name in ("MIGRATION", "MIGRATION_PASS", "STOP"):
                connection.event(name, data)
        for stamp in (None, [], {}, {"seconds": -1, "microseconds": -1}, {"seconds": 1 << 80, "microseconds": 0}, "x"):
            connection.event("RESUME", {}, stamp)
        connection.event("X" * 1_000_000, {})
        for _ in range(1000):
            connection.socket.sendall(b'{"event": "NOISE", "timestamp": {"seconds": 1, "microseconds": 2}}\n')
        connection.event("MIGRATION", {"status": "completed"})

    outcome = run(tmp_path, {"migrate": statuses("active", after=flood)}, os.getpid())
    assert outcome.result == "completed"
    assert len(outcome.marks) <= 510, "a flood is bounded"
    assert all(isinstance(m, Mark) and len(m.name) < 200 and abs(m.at_ns) < 1 << 63 for m in outcome.marks)


class Pair:
    """A source and a destination that answer as a test wants."""

    def __init__(self, directory: Path, pids: tuple[int, int], **special: Any) -> None:
        self._stack = contextlib.ExitStack()
        self.connections: dict[str, Connection] = {}
        usual = {"destination": {"query_status": {"return": {"status": "inmigrate"}}}, "source": {}}
        for role, pid in zip(("source", "destination"), pids, strict=True):
            self._serve(directory / role, role, pid, usual[role] | special.get(role, {}))
        self.migration = QemuMigration(str(directory / "source"), str(directory / "destination"), "tcp:127.0.0.1:1")
        self._stack.callback(self.migration.close)

    def _serve(self, path: Path, role: str, pid: int, special: dict[str, Any]) -> None:
        def talk(connection: Connection) -> None:
            self.connections[role] = connection
            bound = {
                name: (lambda value=value: value(connection)) if callable(value) else value
                for name, value in special.items()
            }
            qemu(pid, **bound)(connection)

        self._stack.enter_context(serve(path, talk))

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def test_the_destination_may_complete_later(tmp_path: Path, vmm: subprocess.Popen[bytes]) -> None:
    def destination_follows(_source: Connection) -> None:
        time.sleep(0.2)
        pair.connections["destination"].event("RESUME")
        pair.connections["destination"].event("MIGRATION", {"status": "completed"})

    with Pair(
        tmp_path, (os.getpid(), vmm.pid), source={"migrate": statuses("completed", after=destination_follows)}
    ) as pair:
        outcome = pair.migration.run(20)
    assert outcome.result == "completed"
    names = [(m.pid, m.name) for m in outcome.marks if isinstance(m, Mark)]
    assert (vmm.pid, "qmp.RESUME") in names and (vmm.pid, "qmp.MIGRATION.completed") in names


def test_a_destination_that_says_nothing_is_not_success(tmp_path: Path, vmm: subprocess.Popen[bytes]) -> None:
    with Pair(tmp_path, (os.getpid(), vmm.pid), source={"migrate": statuses("completed")}) as pair:
        outcome = pair.migration.run(20)
    assert outcome.result == "unknown" and "whether the destination runs is not known" in outcome.error


def test_a_destination_that_dies_after_the_source_is_done(tmp_path: Path, vmm: subprocess.Popen[bytes]) -> None:
    def die(_source: Connection) -> None:
        vmm.kill()
        pair.connections["destination"].socket.shutdown(socket.SHUT_RDWR)

    with Pair(tmp_path, (os.getpid(), vmm.pid), source={"migrate": statuses("completed", after=die)}) as pair:
        outcome = pair.migration.run(20)
    assert outcome.result == "failed" and "destination QEMU" in outcome.error


@pytest.mark.parametrize("last", ["active", "cancelled", "failed"])
def test_a_source_that_is_ended_after_its_last_byte(last: str, tmp_path: Path, vmm: subprocess.Popen[bytes]) -> None:
    """SIGTERM has QEMU cancel, but the destination has everything and runs the guest."""

    def end(source: Connection) -> None:
        vmm.kill()
        source.socket.shutdown(socket.SHUT_RDWR)
        time.sleep(0.3)
        pair.connections["destination"].event("RESUME")
        pair.connections["destination"].event("MIGRATION", {"status": "completed"})

    source = {"migrate": statuses("active", last, after=end)}
    with Pair(tmp_path, (vmm.pid, os.getpid()), source=source) as pair:
        outcome = pair.migration.run(20)
    assert (outcome.result, outcome.error) == ("completed", "") and "the source QEMU ended" in outcome.remark


def test_a_source_that_does_not_notice_is_cancelled(tmp_path: Path, vmm: subprocess.Popen[bytes]) -> None:
    """The destination is dead and the source still sends. Without a cancel it would never stop."""

    def die(_source: Connection) -> None:
        vmm.kill()
        pair.connections["destination"].socket.shutdown(socket.SHUT_RDWR)

    source = {"migrate": statuses("active", after=die), "migrate_cancel": statuses("cancelled")}
    with Pair(tmp_path, (os.getpid(), vmm.pid), source=source) as pair:
        outcome = pair.migration.run(20)
        assert "migrate_cancel" in [c["execute"] for c in pair.connections["source"].commands]
    assert outcome.result == "failed" and "destination QEMU ended" in outcome.error


@pytest.mark.parametrize(
    ("answer", "listens"),
    [({}, True), ({"status": "setup"}, False), ({"status": "setup", "socket-address": [{"host": "h"}]}, False)],
)
def test_a_destination_is_told_to_listen_once(
    tmp_path: Path, vmm: subprocess.Popen[bytes], answer: dict[str, Any], listens: bool
) -> None:
    with Pair(tmp_path, (os.getpid(), vmm.pid), destination={"query_migrate": {"return": answer}}) as pair:
        pair.migration.prepare()
        said = [c["execute"] for c in pair.connections["destination"].commands]
    assert ("migrate-incoming" in said) == listens


def test_a_destination_that_already_runs(tmp_path: Path, vmm: subprocess.Popen[bytes]) -> None:
    status = {"query_status": {"return": {"status": "running"}}}
    pair = Pair(tmp_path, (os.getpid(), vmm.pid), destination=status)
    with pair, pytest.raises(VmmError, match="not waiting for a migration"):
        pair.migration.prepare()


def test_cancel_before_and_after(tmp_path: Path) -> None:
    with serve(tmp_path / "s", qemu(os.getpid())) as connections:
        migration = QemuMigration(str(tmp_path / "s"), None, "tcp:127.0.0.1:1")
        migration.prepare()
        migration.cancel()
        assert migration.run(20).result == "cancelled"
        migration.close()
        migration.close()
        migration.cancel()
        assert "migrate" not in [c["execute"] for c in connections[0].commands]


def test_ctrl_c_while_connecting(tmp_path: Path) -> None:
    """Nothing is left behind (see `_no_complaints`), and the interruption is raised."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with serve(tmp_path / "s", hang) as connections:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                QemuMigration(str(tmp_path / "s"), None, "tcp:127.0.0.1:1")
            assert connections[0].closed.wait(5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_wall_clock_stamps_become_monotonic() -> None:
    wall, monotonic = time.time_ns(), time.monotonic_ns()
    converted = mark(1, "x", wall_ns=wall - 5_000_000, grain_ns=1000)
    assert abs(converted.at_ns - (monotonic - 5_000_000)) <= converted.doubt_ns + 1_000_000
    assert converted.doubt_ns >= 500


@pytest.mark.parametrize(
    ("incoming", "waits"),
    [
        ('{"channel-type":"cpr","addr":{"transport":"socket","type":"unix","path":"/run/cpr"}}', True),
        ("{'channel-type': 'cpr'}", True),
        ("channel-type=cpr,addr.transport=socket,addr.type=unix,addr.path=/run/cpr", True),
        ('{"channel-type":"main","addr":{"transport":"socket","type":"unix","path":"/run/cpr"}}', False),
        ("unix:/run/cpr", False),
        ("defer", False),
    ],
)
def test_a_qemu_that_waits_for_a_live_update_has_no_vm_yet(incoming: str, waits: bool) -> None:
    command = ["qemu-system-x86_64", "-name", "channel-type=cpr", "-incoming", "unix:/run/main", "-incoming", incoming]
    assert ADAPTER.awaits_vm(command) is waits
    assert ADAPTER.awaits_live_update(command) is waits
