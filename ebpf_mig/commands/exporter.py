# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig exporter`: watches this node and serves its migrations' figures to Prometheus."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from ebpf_mig.commands.options import SIZE, add_variables, examples, refuse_unknown_variables, say
from ebpf_mig.commands.watch import DIRECTORY
from ebpf_mig.errors import PreflightError, UsageError
from ebpf_mig.exporter.leash import Leash, is_stopped
from ebpf_mig.exporter.log_lines import FORMATS
from ebpf_mig.exporter.messages import Answer
from ebpf_mig.exporter.node import NodeWatch
from ebpf_mig.exporter.observation import Message, Reload, vmms
from ebpf_mig.exporter.otel_spans import Trace
from ebpf_mig.exporter.spawn import Options, start
from ebpf_mig.exporter.store import Store
from ebpf_mig.linux import capabilities
from ebpf_mig.text import printable

PORT = 9974
_DRAIN_S = 10.0
VARIABLES = "EBPF_MIG_EXPORTER_"
"""Every option can also be set by an environment variable of this prefix. The option has priority."""

_EXAMPLES = examples(
    "ebpf-mig exporter",
    "ebpf-mig exporter --web.listen-address :9974 --web.config.file web.yml",
)


@click.command("exporter", epilog=_EXAMPLES)
@click.option("--web.listen-address", "address", default=f"127.0.0.1:{PORT}", show_default=True, help="HOST:PORT.")
@click.option("--web.config.file", "web_config", type=click.Path(), help="TLS and users, in exporter-toolkit's format.")
@click.option("--vm", "only", default="*", metavar="GLOB", help="Watch only VMs whose name matches.")
@click.option("--state-directory", default=DIRECTORY, show_default=True, help="Directory of the recordings.")
@click.option(
    "--keep", type=click.IntRange(1), default=100, show_default=True, help="Largest number of recordings to keep."
)
@click.option(
    "--keep-size", type=SIZE, default="1GiB", show_default=True, help="Largest size of all recordings together."
)
@click.option(
    "--vm-label",
    type=click.Choice(["name", "hash", "none"]),
    default="name",
    show_default=True,
    help="How to label VMs in metrics.",
)
@click.option("--otlp-endpoint", "otlp", default="", metavar="URL", help="Send each migration as OpenTelemetry spans.")
@click.option(
    "--log-format",
    type=click.Choice(FORMATS),
    default=FORMATS[0],
    show_default=True,
    help="Format of the line on stderr for each migration.",
)
@click.option("--own-cost", is_flag=True, help="Measure the run time of our BPF programs; keeps CAP_SYS_ADMIN.")
def command(
    address: str,
    web_config: str | None,
    only: str,
    state_directory: str,
    keep: int,
    keep_size: int,
    vm_label: str,
    otlp: str,
    log_format: str,
    own_cost: bool,
) -> None:
    """Serve the downtime of each migration on this node to Prometheus."""
    refuse_unknown_variables(command, VARIABLES)
    reloads: list[int] = []
    signal.signal(signal.SIGHUP, lambda signum, _frame: reloads.append(signum))
    capabilities.require_tracing()
    with _listen(address) as listener:
        store = Store(state_directory, keep, keep_size)
        with _server(listener, vm_label, web_config, otlp, log_format) as (server, pipe):
            place = "{}:{}".format(*listener.getsockname()[:2])
            listener.close()
            with NodeWatch(store, pipe.send, only) as node:
                capabilities.keep_only((*capabilities.ENGINE, *(["CAP_SYS_ADMIN"] if own_cost else [])))
                node.verify()
                asked = stopping()
                pipe.put(node.status())
                say(f"listening on {place}; recordings go to {printable(state_directory)}")

                def over() -> bool:
                    if reloads:
                        reloads.clear()
                        pipe.put(Reload())
                    return bool(asked) or server.poll() is not None or is_stopped(server.pid)

                node.run(over, pipe.put)
                if asked:
                    say("draining")
                    return
            if server.poll() is None:
                raise PreflightError("the listener process was stopped")
            raise PreflightError(f"the listener process ended with status {server.returncode}")


add_variables(command, VARIABLES)


def stopping() -> list[int]:
    """A list that becomes non-empty with the first SIGTERM or Ctrl-C. A second one ends the process at once.

    No exception is raised: during a callback of the ring buffer it would be lost.
    """
    came: list[int] = []

    def take(signum: int, _frame: object) -> None:
        came.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, take)
    return came


class Pipe:
    """Messages to the listener, one JSON line each. Thread-safe."""

    def __init__(self, fd: int) -> None:
        self._file = os.fdopen(fd, "wb", buffering=0)
        self._lock = threading.Lock()

    def send(self, answer: Answer) -> None:
        """Sends the results of a migration."""
        for message in (answer.observation, answer.trace):
            if message is not None:
                self.put(message)

    def put(self, message: Message | Trace) -> None:
        """Writes one message. If the listener is gone, `command` notices it."""
        line = msgspec.json.encode(message) + b"\n"
        with self._lock, contextlib.suppress(BrokenPipeError):
            view = memoryview(line)
            while view:
                view = view[self._file.write(view) :]

    def close(self) -> None:
        """Has the listener drain and end."""
        self._file.close()


@contextlib.contextmanager
def _server(
    listener: socket.socket, vm_label: str, web_config: str | None, otlp: str, log_format: str
) -> Iterator[tuple[subprocess.Popen[bytes], Pipe]]:
    read_end, write_end = os.pipe()
    options = Options(
        listener=listener.fileno(),
        pipe=read_end,
        parent=os.getpid(),
        vm_label=vm_label,
        vmms=vmms(),
        web_config=str(Path(web_config).absolute()) if web_config else "",
        otlp=otlp,
        log_format=log_format,
    )
    encoded = msgspec.json.encode(options).decode()
    leash = Leash()
    server = start("ebpf_mig.exporter.serve", encoded, fds=[listener.fileno(), read_end, leash.theirs])
    leash.tie(server.pid)
    os.close(read_end)
    pipe = Pipe(write_end)
    try:
        yield server, pipe
    finally:
        pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0 if is_stopped(server.pid) else _DRAIN_S)
        leash.let_go()


def _listen(address: str) -> socket.socket:
    """A listening socket on HOST:PORT. `:PORT` is every address, `[::1]:PORT` is IPv6."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{printable(address)!r} is not HOST:PORT", f"e.g. 127.0.0.1:{PORT}")
    host = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in host or not host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family, backlog=128, dualstack_ipv6=not host)
    except OSError as error:
        raise UsageError(f"cannot listen on {printable(address)}: {error.strerror or error}") from error
