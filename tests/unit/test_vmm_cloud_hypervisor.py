# SPDX-License-Identifier: Apache-2.0
"""The Cloud Hypervisor adapter against servers that refuse, babble, hang up or are not there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_mig.errors import VmmError
from ebpf_mig.vmm.ch_api import Api, log_figures
from ebpf_mig.vmm.cloud_hypervisor import ChMigration, ChOptions


@contextlib.contextmanager
def server(path: Path, *answers: bytes) -> Iterator[str]:
    """Gives each connection that asks something the next answer, the last one for ever."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        queue = list(answers)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    if read_request(client):
                        client.sendall(queue.pop(0) if len(queue) > 1 else queue[0])
                    client.close()

        threading.Thread(target=serve, daemon=True).start()
        yield str(path)


def read_request(client: socket.socket) -> bytes:
    """One request with its body, or nothing: one who closes with unread bytes in the socket resets the connection."""
    asked = b""
    while part := client.recv(65536):
        asked += part
        head, end, body = asked.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if end and len(body) >= (int(length[1]) if length else 0):
            break
    return asked


def answer(status: int, body: object) -> bytes:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(text)) + text


PING = {"version": "54.0.0", "pid": os.getpid(), "features": []}


def test_no_socket() -> None:
    with pytest.raises(VmmError, match="No such file"):
        Api("/nonexistent/api", "source").ping()


@pytest.mark.parametrize(
    "babble",
    [b"", b"garbage\r\n\r\n", b'{"QMP": {}}\r\n', answer(200, b"[" * 5000), answer(200, {"x": 1}), answer(200, [])],
)
def test_something_else_than_cloud_hypervisor(tmp_path: Path, babble: bytes) -> None:
    with server(tmp_path / "s", babble) as path, pytest.raises(VmmError) as caught:
        Api(path, "source").ping()
    assert path in str(caught.value) and "--api-socket" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (["Error from API", "There is already an ongoing migration"], "Error from API: There is already an ongoing"),
        (b"plain text of v46", "plain text of v46"),
        (b"", "status 500"),
        ({"odd": 1}, "odd"),
    ],
)
def test_refusals_in_its_own_words(tmp_path: Path, body: object, words: str) -> None:
    with server(tmp_path / "s", answer(500, body)) as path, pytest.raises(VmmError, match="refuses") as caught:
        Api(path, "source").call("PUT", "vm.send-migration", {})
    assert words in str(caught.value)


def test_pid_and_version(tmp_path: Path) -> None:
    with server(tmp_path / "s", answer(200, PING)) as path:
        assert Api(path, "source").ping() == (os.getpid(), "54.0.0")


def test_the_same_vmm_twice(tmp_path: Path) -> None:
    with server(tmp_path / "s", answer(200, PING)) as path, pytest.raises(VmmError, match="same Cloud Hypervisor"):
        ChMigration(path, path, "tcp:127.0.0.1:1")


def test_only_what_was_asked_for_is_sent() -> None:
    assert ChOptions().send("tcp:a:1") == {"destination_url": "tcp:a:1"}
    options = ChOptions(local=True, downtime_ms=50, connections=4, postcopy=True)
    assert options.send("unix:/m") == {
        "destination_url": "unix:/m", "local": True, "downtime_ms": 50, "connections": 4, "memory_mode": "Postcopy",
    }  # fmt: skip
    assert options.receive("unix:/m") == {"receiver_url": "unix:/m", "memory_mode": "Postcopy"}


def test_figures_of_the_log_by_key(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "x INFO -- Migration completed after 2.2s with a downtime of 298ms (goal was 300ms)\r\n"
        "x DEBUG -- Downtime breakdown: 298ms (final_iter:269ms state:7ms send_state:19ms complete:1ms)\r\n"
        "x DEBUG -- Migration (incoming): recv_snapshot:3ms restore:10ms\r\n"
    )
    assert log_figures(str(log)) == {
        "downtime": 298, "final_iter": 269, "state": 7, "send_state": 19, "complete": 1,
        "recv_snapshot": 3, "restore": 10,
    }  # fmt: skip
    assert log_figures("/nonexistent") == {}
