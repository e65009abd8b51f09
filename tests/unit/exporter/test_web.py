# SPDX-License-Identifier: Apache-2.0
"""The HTTP side over real sockets: pages, methods, greedy and slow and broken clients, TLS and users."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_mig.errors import UsageError
from ebpf_mig.exporter import web as web_module
from ebpf_mig.exporter.metrics import Metrics
from ebpf_mig.exporter.web import CONNECTIONS, Web
from tests.conftest import requires
from tests.unit.exporter.observations import observation, status


@contextlib.contextmanager
def serving(metrics: Metrics | None = None) -> Iterator[Web]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    server = Web(listener, metrics or Metrics())
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def connect(server: Web) -> socket.socket:
    return socket.create_connection(server.server_address[:2], timeout=10)


def ask(server: Web, request: bytes) -> bytes:
    with connect(server) as client:
        client.sendall(request)
        answer = b""
        while part := client.recv(65536):
            answer += part
    return answer


def get(server: Web, path: str, headers: str = "") -> bytes:
    return ask(server, f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())


def test_pages() -> None:
    metrics = Metrics()
    metrics.migration(observation())
    with serving(metrics) as server:
        assert get(server, "/").startswith(b"HTTP/1.0 200") and b'href="/metrics"' in get(server, "/")
        assert b"ebpf_mig_blackout_seconds_count" in get(server, "/metrics")
        assert b"# EOF" in get(server, "/metrics", "Accept: application/openmetrics-text; version=1.0.0\r\n")
        assert get(server, "/-/healthy").startswith(b"HTTP/1.0 200")
        assert get(server, "/-/ready").startswith(b"HTTP/1.0 503")
        metrics.status(status())
        assert get(server, "/-/ready").startswith(b"HTTP/1.0 200")
        assert get(server, "/nowhere").startswith(b"HTTP/1.0 404")
        head = ask(server, b"HEAD /metrics HTTP/1.1\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 200") and head.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "<script>"])
def test_other_methods_are_refused_without_echo(method: str) -> None:
    with serving() as server:
        answer = ask(server, f"{method} /metrics HTTP/1.1\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.0 405") and b"script" not in answer


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\0" * 100_000, b"A" * 100_000])
def test_junk_does_not_end_it(junk: bytes) -> None:
    with serving() as server:
        with connect(server) as client, contextlib.suppress(OSError):
            client.sendall(junk + b"\r\n\r\n")
            client.recv(1000)
        assert get(server, "/-/healthy").startswith(b"HTTP/1.0 200")


def test_too_many_connections_are_turned_away_at_once() -> None:
    metrics = Metrics()
    with serving(metrics) as server, contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(connect(server))
        deadline = time.monotonic() + 5
        while not (answer := get(server, "/-/healthy")).startswith(b"HTTP/1.1 503") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert answer.startswith(b"HTTP/1.1 503")
        assert metrics.registry.get_sample_value("ebpf_mig_exporter_connections_rejected_total", {"reason": "too-many"})


def test_a_client_that_trickles_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_module, "SECONDS", 0.5)
    metrics = Metrics()
    with serving(metrics) as server, connect(server) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begin < 8:
                client.sendall(b"X")
                time.sleep(0.1)
        assert time.monotonic() - begin < 8
    assert metrics.registry.get_sample_value("ebpf_mig_exporter_connections_rejected_total", {"reason": "too-slow"})


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def basic(user: str, password: str) -> str:
    return f"Authorization: Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}\r\n"


@requires("PyYAML", "bcrypt")
def test_users(tmp_path: Path) -> None:
    import bcrypt

    from ebpf_mig.exporter.webconfig import load

    secret = bcrypt.hashpw(b"right", bcrypt.gensalt(4)).decode()
    config = load(write(tmp_path / "web.yml", f"basic_auth_users:\n  alice: {secret}\n"))
    with serving() as server:
        server.authorise = config.authorise
        assert get(server, "/metrics").startswith(b"HTTP/1.0 401")
        assert b"WWW-Authenticate: Basic" in get(server, "/metrics")
        assert get(server, "/metrics", basic("alice", "wrong")).startswith(b"HTTP/1.0 401")
        assert get(server, "/metrics", basic("bob", "right")).startswith(b"HTTP/1.0 401")
        assert get(server, "/metrics", "Authorization: Basic ???\r\n").startswith(b"HTTP/1.0 401")
        assert get(server, "/metrics", "Authorization: Bearer x\r\n").startswith(b"HTTP/1.0 401")
        for _ in range(2):
            assert get(server, "/metrics", basic("alice", "right")).startswith(b"HTTP/1.0 200")


def certified(directory: Path) -> str:
    """The YAML for TLS with a new certificate for localhost."""
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *subject]
    files = ["-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")]
    subprocess.run([*made, *files], check=True, capture_output=True)
    return "tls_server_config:\n  cert_file: cert.pem\n  key_file: key.pem\n"


@requires("PyYAML", "openssl")
def test_tls_and_client_certificates(tmp_path: Path) -> None:
    from ebpf_mig.exporter.webconfig import load

    tls = certified(tmp_path)
    client = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))

    def over_tls(server: Web) -> bytes:
        with connect(server) as raw, client.wrap_socket(raw, server_hostname="localhost") as wrapped:
            wrapped.sendall(b"GET /-/healthy HTTP/1.1\r\n\r\n")
            return wrapped.recv(1000)

    with serving() as server:
        server.tls = load(write(tmp_path / "web.yml", tls)).tls
        assert over_tls(server).startswith(b"HTTP/1.0 200")
        with contextlib.suppress(OSError):
            assert b"200" not in get(server, "/-/healthy")
        server.tls = load(write(tmp_path / "web.yml", tls + "  client_ca_file: cert.pem\n")).tls
        with pytest.raises((ssl.SSLError, ConnectionError)):
            assert over_tls(server) == b"refused"
        client.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        assert over_tls(server).startswith(b"HTTP/1.0 200")


@requires("PyYAML", "bcrypt", "openssl", "promtool")
def test_prometheus_judges_a_configuration_as_we_do(tmp_path: Path) -> None:
    import bcrypt

    from ebpf_mig.exporter.webconfig import load

    more = "  client_ca_file: cert.pem\n  client_auth_type: RequireAndVerifyClientCert\n  min_version: TLS13\n"
    users = f"basic_auth_users:\n  alice: {bcrypt.hashpw(b'right', bcrypt.gensalt(4)).decode()}\n"
    good = certified(tmp_path) + more + users
    for text in (
        good,
        good.replace("cert.pem", "none.pem"),
        good.replace("min_", "mini_"),
        good.replace("$2b$04", "x"),
    ):
        file = write(tmp_path / "web.yml", text)
        judged = subprocess.run(["promtool", "check", "web-config", file], capture_output=True, check=False).returncode
        assert (judged == 0) is (text == good)
        with contextlib.nullcontext() if text == good else pytest.raises(UsageError):
            load(file)


@requires("PyYAML", "bcrypt")
@pytest.mark.parametrize(
    "text",
    [
        "- a",
        "a: [",
        "basic_auth_user: {}",
        "basic_auth_users: [a]",
        "basic_auth_users: {a: plain}",
        "tls_server_config: {cert_file: none.pem, key_file: none.pem}",
        "tls_server_config: {}",
        "tls_server_config: {cipher_suites: []}",
        "tls_server_config: {min_version: TLS10}",
        "rate_limit: {}",
    ],
)
def test_a_configuration_that_cannot_be_carried_out_is_refused(text: str, tmp_path: Path) -> None:
    from ebpf_mig.exporter.webconfig import load

    with pytest.raises(UsageError):
        load(write(tmp_path / "web.yml", text))
