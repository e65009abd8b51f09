# SPDX-License-Identifier: Apache-2.0
"""The HTTP side over real sockets: pages, methods, greedy and slow and broken clients, TLS and users."""

from __future__ import annotations

import base64
import contextlib
import gzip
import os
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


@pytest.mark.parametrize(
    ("accept", "packed"),
    [
        ("gzip", True),
        ("identity, GZIP;q=0.5", True),
        ("", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("x-gzip", False),
        ("deflate", False),
        ("gzip" * 300, False),
    ],
)
def test_metrics_are_packed_only_for_who_asks(accept: str, packed: bool) -> None:
    with serving() as server:
        head, _, body = get(server, "/metrics", f"Accept-Encoding: {accept}\r\n").partition(b"\r\n\r\n")
    assert (b"Content-Encoding: gzip" in head) == packed and f"Content-Length: {len(body)}".encode() in head
    assert b"Vary: Accept, Accept-Encoding" in head
    text = gzip.decompress(body) if packed else body
    assert b"ebpf_mig_blackout_seconds_count" in text and len(body) < (len(text) / 5 if packed else len(text) + 1)


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


def test_too_many_requests_are_turned_away_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, over, asked = Metrics(), threading.Event(), threading.Semaphore(0)
    monkeypatch.setattr(metrics, "text", lambda _: asked.release() or (over.wait(20) and b""))
    with serving(metrics) as server, contextlib.ExitStack() as stack:
        stack.callback(over.set)
        for _ in range(CONNECTIONS):
            stack.enter_context(connect(server)).sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert all(asked.acquire(timeout=10) for _ in range(CONNECTIONS))
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
        "basic_auth_users: 2024-99-99",
        "basic_auth_users: !!int abc",
        "basic_auth_users: {a: !!timestamp x}",
        "basic_auth_users: {a: $2b$31$" + "x" * 53 + "}",
        "basic_auth_users: 5",
        "tls_server_config: 5",
        "[" * 5000,
        "{a: " * 5000,
        "? " * 5000,
        '{tls_server_config: {cert_file: "a\\0b", key_file: x}}',
        "tls_server_config: {cert_file: [], key_file: {}}",
        "tls_server_config: {cert_file: /dev/zero, key_file: /dev/zero}",
        "tls_server_config: {cert_file: fifo, key_file: fifo}",
        "tls_server_config: {min_version: [], cert_file: a, key_file: a}",
        "!!python/object/apply:os.system [id]",
        "\0",
        "a: &a [*a, *a]",
        "- " * 40_000,
        "x" * 100_000,
    ],
)
def test_a_configuration_that_cannot_be_carried_out_is_refused(text: str, tmp_path: Path) -> None:
    from ebpf_mig.exporter.webconfig import load

    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError) as raised:
        load(write(tmp_path / "web.yml", text))
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000


@requires("PyYAML")
@pytest.mark.parametrize("path", ["fifo", "/dev/zero", "/dev/tty", ".", "none", "a\0b", "\udcff"])
def test_a_path_that_is_no_file_is_refused_at_once(path: str, tmp_path: Path) -> None:
    from ebpf_mig.exporter.webconfig import load

    os.mkfifo(tmp_path / "fifo")
    begin = time.monotonic()
    with pytest.raises(UsageError) as raised:
        load(f"{tmp_path}/{path}" if path != "/dev/zero" else path)
    assert time.monotonic() - begin < 1 and str(raised.value).isprintable()


@requires("PyYAML", "openssl")
def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    from ebpf_mig.exporter.webconfig import load

    tls = certified(tmp_path)
    key, locked = str(tmp_path / "key.pem"), str(tmp_path / "locked.pem")
    subprocess.run(["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:x", "-out", locked], check=True)
    with pytest.raises(UsageError):
        load(write(tmp_path / "web.yml", tls.replace("key.pem", "locked.pem")))


@requires("PyYAML")
def test_what_cannot_be_read_again_leaves_the_old_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from ebpf_mig.exporter.serve import reload

    os.mkfifo(tmp_path / "fifo")
    with serving() as server:
        server.authorise = old = lambda _: False
        for number, text in enumerate(("basic_auth_users: 2024-99-99", "[" * 5000)):
            reload(server, write(tmp_path / f"{number}.yml", text))
        reload(server, str(tmp_path / "fifo"))
        reload(server, "/a\0b")
        assert server.authorise is old and get(server, "/metrics").startswith(b"HTTP/1.0 401")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4 and all(message.isprintable() and "stays as it was" in message for message in said)


ACCEPTS = [
    "application/openmetrics-text; version",
    "application/openmetrics-text;version=",
    "application/openmetrics-text; version=x; charset",
    "text/plain; version=9" + "9" * 5000,
    "application/openmetrics-text; escaping=\x80; version=1.0.0.0.0",
    ";=;=;,,,==q",
    "*/*;q=\xff",
    "text/plain; escaping",
    ",".join("a/b;q=0" for _ in range(5000)),
]


@pytest.mark.parametrize("accept", ACCEPTS)
def test_an_odd_accept_header_is_answered(accept: str) -> None:
    with serving() as server:
        answer = ask(server, b"GET /metrics HTTP/1.1\r\nAccept: " + accept.encode("latin-1") + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.0 200") and b"ebpf_mig_up" in answer


def test_a_handler_that_fails_answers_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    monkeypatch.setattr(metrics, "text", lambda _: 1 // 0)
    with serving(metrics) as server:
        assert get(server, "/metrics").startswith(b"HTTP/1.0 500")
        assert get(server, "/-/healthy").startswith(b"HTTP/1.0 200")
    assert metrics.registry.get_sample_value("ebpf_mig_exporter_connections_rejected_total", {"reason": "failed"}) == 1


@pytest.mark.parametrize("said", [b"", b"GET /metrics HTTP/1.1\r\nHost:"], ids=["silent", "half"])
def test_idle_clients_keep_no_scraper_out(said: bytes) -> None:
    """Three times the limit of connections; each client reconnects when it is cut off."""
    over = threading.Event()

    def idle(server: Web) -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), connect(server) as client:
                client.sendall(said)
                client.settimeout(0.2)
                while not over.is_set():
                    with contextlib.suppress(TimeoutError):
                        if not client.recv(100):
                            break
                time.sleep(0.05)

    with serving() as server:
        crowd = [threading.Thread(target=idle, args=(server,)) for _ in range(3 * CONNECTIONS)]
        for one in crowd:
            one.start()
        try:
            time.sleep(1)
            for _ in range(20):
                begin = time.monotonic()
                assert get(server, "/metrics").startswith(b"HTTP/1.0 200")
                assert time.monotonic() - begin < 5
        finally:
            over.set()
            for one in crowd:
                one.join()
