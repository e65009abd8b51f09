# SPDX-License-Identifier: Apache-2.0
"""What a peer sends is checked by type and bounded in bytes and time: one line and exit code 4, no hang."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.cli import main
from ebpf_mig.errors import VmmError
from ebpf_mig.vmm import unix_http
from ebpf_mig.vmm.cloud_hypervisor import event_monitor, log
from ebpf_mig.vmm.cloud_hypervisor.api import Api
from ebpf_mig.vmm.qemu import migration as adapter
from ebpf_mig.vmm.qemu import monitor
from ebpf_mig.vmm.qemu.migration import QemuMigration
from tests.unit.vmm.qmp_server import GREETING, Connection, Talk, qemu, replies, serve
from tests.unit.vmm.test_cloud_hypervisor import answer, read_request

WRONG: list[Any] = [None, [], [1], {}, {"a": 1}, "", "x", "\0", True, -1, 1 << 70, 1e400, 0.5, float("nan")]
"""Any JSON, and what Python's JSON parser accepts besides."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "GREETING_S", 1)
    monkeypatch.setattr(monitor, "COMMAND_S", 1)
    monkeypatch.setattr(adapter, "_CANCEL_S", 0.5)
    monkeypatch.setattr(unix_http, "QUICK_S", 1)


def in_a_line(call: Callable[[], Any]) -> None:
    """The call works or raises a VmmError of one line, and returns soon."""
    begin = time.monotonic()
    try:
        call()
    except VmmError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
    assert time.monotonic() - begin < 15


def prepared(path: Path) -> None:
    with contextlib.closing(QemuMigration(str(path), None, "tcp:127.0.0.1:1")) as migration:
        migration.prepare()
        migration.run(1)


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize(
    ("command", "shape"),
    [("query-version", lambda x: x), ("query-version", lambda x: {"qemu": x}),
     ("query-version", lambda x: {"qemu": {"major": x, "minor": 2, "micro": 0}}), ("query-cpus-fast", lambda x: x),
     ("query-cpus-fast", lambda x: [x]), ("query-cpus-fast", lambda x: [{"thread-id": x}]),
     ("query-status", lambda x: x), ("query-status", lambda x: {"status": x}), ("query-migrate", lambda x: x),
     ("query-migrate", lambda x: {"status": x, "ram": x, "total-time": x, "downtime": x, "error-desc": x})],
)  # fmt: skip
def test_qmp_of_any_type(tmp_path: Path, command: str, shape: Callable[[Any], Any], wrong: Any) -> None:
    special = {command.replace("-", "_"): {"return": shape(wrong)}, "migrate": {"error": {"class": "X", "desc": "no"}}}
    with serve(tmp_path / "qmp", qemu(os.getpid(), **special)):
        in_a_line(lambda: prepared(tmp_path / "qmp"))


def flood(connection: Connection) -> None:
    connection.socket.sendall(GREETING)
    event = (
        b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}, "data": {"x": "' + b"y" * 1000 + b'"}}\n'
    )
    threading.Thread(target=lambda: [_send(connection, event * 100) for _ in range(3000)], daemon=True).start()
    connection.answer(replies(os.getpid()))


def _send(connection: Connection, data: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.socket.sendall(data)


def long_line(connection: Connection) -> None:
    connection.socket.sendall(GREETING)
    connection.answer(lambda _name: b'{"return": "' + b"x" * 20_000_000 + b'"}\n')


def drip(connection: Connection) -> None:
    connection.socket.sendall(GREETING)

    def slowly(_name: str) -> None:
        for _ in range(100):
            _send(connection, b" ")
            time.sleep(0.1)

    connection.answer(slowly)


def greeting_drips(connection: Connection) -> None:
    for byte in GREETING[:-1]:
        _send(connection, bytes((byte,)))
        time.sleep(0.1)


@pytest.mark.parametrize("talk", [flood, long_line, drip, greeting_drips], ids=lambda t: t.__name__)
def test_qmp_without_end(tmp_path: Path, talk: Talk) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serve(tmp_path / "qmp", talk):
        in_a_line(lambda: prepared(tmp_path / "qmp"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10, "KiB"


@contextlib.contextmanager
def http_server(path: Path, talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Every client that sends a request gets an answer."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve_one(client: socket.socket) -> None:
            with client, contextlib.suppress(OSError):
                if read_request(client):
                    talk(client)

        def serve_all() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve_one, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=serve_all, daemon=True).start()
        yield str(path)


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize(
    "shape", [lambda x: x, lambda x: {"pid": x, "version": "54.0.0"}, lambda x: {"pid": 1, "version": x, "state": x}]
)
def test_http_of_any_type(tmp_path: Path, shape: Callable[[Any], Any], wrong: Any) -> None:
    with http_server(tmp_path / "api", lambda client: client.sendall(answer(200, shape(wrong)))) as path:
        in_a_line(Api(path, "source").ping)
        in_a_line(Api(path, "source").state)
        in_a_line(lambda: Api(path, "source").call("GET", "vm.info"))
        in_a_line(lambda: Api(path, "source").knows("vm.send-migration", "x"))


HEAD = b"HTTP/1.1 200 OK\r\n"
BABBLE = [
    HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}", HEAD + b"Content-Length: -7\r\n\r\n{}",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 5000 + b"\r\n", HEAD + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
    HEAD + b"X: y\r\n" * 1000 + b"\r\n", b"HTTP/1.1 " + b"1" * 5000 + b" x\r\n\r\n", b"HTTP/9.9 200 OK\r\n\r\n",
    b"\0" * 100,
    answer(200, b"[" * 100_000), answer(200, b'{"version": "\xff\xfe"}'), answer(200, b" " * (2 << 20)),
    answer(500, b"[" * 100_000), answer(500, b"\0\xff" * 1000), answer(500, ["x" * 10_000, {"a": [1]}, None]), b"",
]  # fmt: skip


@pytest.mark.parametrize("babble", BABBLE, ids=lambda b: repr(b[:40]))
def test_http_of_any_bytes(tmp_path: Path, babble: bytes) -> None:
    with http_server(tmp_path / "api", lambda client: client.sendall(babble)) as path:
        for call in (Api(path, "source").ping, Api(path, "source").state):
            in_a_line(call)


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 100 Continue\r\n\r\n", HEAD + b"Content-Length: 100000\r\n\r\n", HEAD, b"HTTP/"]
)
def test_http_without_end(tmp_path: Path, head: bytes) -> None:
    """A byte every 0.1 s meets the time-out of each read, but the whole answer comes too late."""

    def talk(client: socket.socket) -> None:
        client.sendall(head)
        for _ in range(200):
            client.sendall(head if b"100" in head[:12] else b"x")
            time.sleep(0.1)

    with http_server(tmp_path / "api", talk) as path:
        begin = time.monotonic()
        with pytest.raises(VmmError, match="does not answer"):
            Api(path, "source").ping()
        assert time.monotonic() - begin < 5


def test_the_user_sees_one_line_and_exit_code_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(tmp_path / "qmp", qemu(os.getpid(), query_status={"return": {"status": {"a": [1]}}})):
        code = main(["migrate", "qemu", "--source", str(tmp_path / "qmp"), "--destination", str(tmp_path / "qmp"),
                     "--uri", "tcp:127.0.0.1:1"])  # fmt: skip
    said = capsys.readouterr().err
    assert code == 4 and len(said.strip().splitlines()) == 1, said
    with http_server(tmp_path / "api", lambda client: client.sendall(answer(200, {"pid": [], "version": "1"}))) as path:
        code = main(
            ["migrate", "cloud-hypervisor", "--source", path, "--destination", path, "--url", "tcp:127.0.0.1:1"]
        )
    said = capsys.readouterr().err
    assert code == 4 and len(said.strip().splitlines()) == 1, said


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_events_of_any_type(wrong: Any) -> None:
    good = {"timestamp": {"secs": 1, "nanos": 2}, "event": "paused"}
    for text in (wrong, {"event": wrong, "timestamp": {"secs": 1, "nanos": 2}}, {"event": "x", "timestamp": wrong},
                 {"event": "x", "timestamp": {"secs": wrong, "nanos": wrong}}):  # fmt: skip
        found, rest = event_monitor.decode(json.dumps(text) + "\n\n" + json.dumps(good))
        assert found[-1] == ("paused", 10**9 + 2) and not rest
        assert all(0 <= stamp < 1 << 63 for _, stamp in found)


def test_an_event_file_without_end_and_one_that_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "none", Path("nul\0byte")):
        in_a_line(event_monitor.EventFile(str(path)).start)
    file = tmp_path / "events"
    file.touch()
    reader = event_monitor.EventFile(str(file))
    reader.start()
    good = json.dumps({"timestamp": {"secs": 1, "nanos": 2}, "event": "paused"})
    with file.open("a") as out:
        out.write("[" * 3_000_000 + "\n")
        out.write(good * 100_000)
    assert len(reader.stop()) <= 4096


def test_a_log_of_any_text(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(
        f"Migration completed after 1s with a downtime of {'9' * 5000}ms\nMigration failed: {'x' * 100_000}\n"
        "Downtime breakdown: state:٣ms final_iter=7ms\nReceiving final state and resuming the VM took 5ms\n\0\n"
    )
    place = log.LogPlace(str(path), 0)
    assert place.figures() == {"final_iter": 7, "state_to_resume": 5} and len(place.failure()) == 500
