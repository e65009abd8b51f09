# SPDX-License-Identifier: Apache-2.0
"""The Cloud Hypervisor adapter against servers that refuse, send garbage, close the connection, or are absent."""

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

from ebpf_mig.cli import main
from ebpf_mig.errors import PreflightError, UsageError, VmmError
from ebpf_mig.vmm.base import RemoteEnd
from ebpf_mig.vmm.cloud_hypervisor.api import Api
from ebpf_mig.vmm.cloud_hypervisor.lab import ENVIRONMENT, find_binary
from ebpf_mig.vmm.cloud_hypervisor.migration import ChMigration, ChOptions


@contextlib.contextmanager
def server(path: Path, *answers: bytes) -> Iterator[str]:
    """Each connection with a request gets the next answer; the last answer repeats."""
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
    """Reads one request with its body, or nothing. Closing with unread bytes in the socket resets the connection."""
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


@pytest.mark.parametrize("role", ["source", "destination"])
def test_two_hosts_need_a_network(role: str) -> None:
    with pytest.raises(UsageError, match="only a network"):
        ChMigration("/a", "/b", "unix:/m", remote=(role, RemoteEnd()))


@pytest.mark.parametrize("role", ["source", "destination"])
def test_events_of_a_vmm_on_another_host_are_refused(role: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["migrate", "cloud-hypervisor", "--source", "/a", "--destination", "/b", "--url", "tcp:h:1"]
    assert main([*arguments, f"--{role}-host", "far", f"--{role}-events", "/e"]) == 2
    assert f"--{role}-log works there" in capsys.readouterr().err


def test_only_what_was_asked_for_is_sent() -> None:
    assert ChOptions().send("tcp:a:1") == {"destination_url": "tcp:a:1"}
    options = ChOptions(local=True, downtime_ms=50, connections=4, postcopy=True)
    assert options.send("unix:/m") == {
        "destination_url": "unix:/m", "local": True, "downtime_ms": 50, "connections": 4, "memory_mode": "Postcopy",
    }  # fmt: skip
    assert options.receive("unix:/m") == {"receiver_url": "unix:/m", "memory_mode": "Postcopy"}


@pytest.mark.parametrize(
    ("words", "known"),
    [
        ("invalid type: map, expected a nonzero u32 at line 1 column 16", True),
        ("unknown variant `ebpf-mig`, expected `Precopy` or `Postcopy` at line 1 column 27", True),
        ("invalid type: integer `4711`, expected a string at line 1 column 53", False),
        ("", None),
    ],
)
def test_a_field_is_known_if_the_refusal_is_about_it(tmp_path: Path, words: str, known: bool | None) -> None:
    body = ["Failed to deserialize JSON", words] if words else b""
    with server(tmp_path / "s", answer(400, body)) as path:
        assert Api(path, "source").knows("vm.send-migration", "connections") is known


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("tcp:1.2.3.4", ChOptions()),
        ("tcp:host:port", ChOptions()),
        ("unix:", ChOptions()),
        ("exec:rm", ChOptions()),
        ("tcp:h:1", ChOptions(local=True)),
        ("unix:/m", ChOptions(connections=2)),
        ("unix:/m", ChOptions(tls_dir="/t")),
        ("tcp:h:1", ChOptions(postcopy=True, connections=2)),
        ("unix:/m", ChOptions(postcopy=True, local=True)),
    ],
)
def test_what_no_version_takes_is_refused_first(url: str, options: ChOptions) -> None:
    with pytest.raises(UsageError):
        options.check(url)
    ChOptions(connections=2, tls_dir="/t").check("tcp:[::1]:4444")


def test_no_binary_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "/nonexistent/from-environment")
    for wanted, name in (("/nonexistent/wanted", "/nonexistent/wanted"), (None, "/nonexistent/from-environment")):
        with pytest.raises(PreflightError, match=f"no {name} found") as caught:
            find_binary(wanted)
        assert "install a release" in str(caught.value.remedy) and "--vmm-binary" in str(caught.value.remedy)
