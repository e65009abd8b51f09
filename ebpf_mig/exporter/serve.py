# SPDX-License-Identifier: Apache-2.0
"""The listener: a process of user nobody without capabilities, BPF or LLVM. It only knows what it is sent.

In: a listening socket, a socket of messages, and memory for its counters, as file descriptors. Out: HTTP responses. It
ends when nobody holds the other end of the messages. A migration is counted and saved before its message is removed
from the socket, so a listener that is killed and started again counts each once.
Run as `python -m ebpf_mig.exporter.serve OPTIONS`.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ebpf_mig import __version__
from ebpf_mig.errors import EbpfMigError
from ebpf_mig.exporter.checkpoint import Checkpoint
from ebpf_mig.exporter.listener_messages import MESSAGE_BYTES, Found, Message, Processes, Reload
from ebpf_mig.exporter.log_lines import log_line
from ebpf_mig.exporter.metrics import Metrics
from ebpf_mig.exporter.process_metrics import ProcessMetrics
from ebpf_mig.exporter.spawn import leave
from ebpf_mig.exporter.web import Web
from ebpf_mig.linux import capabilities
from ebpf_mig.text import printable

if TYPE_CHECKING:
    from ebpf_mig.exporter.otlp import Sender

_log = logging.getLogger("ebpf_mig.exporter")
_lines = logging.getLogger("ebpf_mig.exporter.migrations")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor passes on the command line, as JSON."""

    listener: int
    inbox: int
    counters: int
    ready: int
    parent: int
    vm_label: str
    vmms: tuple[str, ...]
    web_config: str
    otlp: str
    log_format: str


def main(arguments: list[str]) -> int:
    """Serves until the other end of the messages is closed."""
    logging.basicConfig(format="ebpf-mig: %(message)s", stream=sys.stderr)
    _lines.addHandler(logging.StreamHandler(sys.stderr))  # these lines are for machines: no prefix
    _lines.propagate = False
    _lines.setLevel(logging.INFO)
    options = msgspec.json.decode(arguments[0], type=Options)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the supervisor ends it, and says when to reload
    metrics = Metrics(options.vm_label, options.vmms, Checkpoint(options.counters))
    metrics.build(__version__, platform.release())
    metrics.registry.register(ProcessMetrics(options.parent))
    web = Web(socket.socket(fileno=options.listener), metrics)
    try:
        if options.web_config:
            load_access(web, options.web_config)
        sender = _sender(options, metrics)
    except EbpfMigError as error:
        _log.error("%s", "; ".join(filter(None, (str(error), error.remedy))))
        return error.exit_code
    capabilities.become_nobody()
    capabilities.die_with_parent(options.parent)  # after becoming nobody: a change of identity clears this
    threading.Thread(target=web.serve_forever, args=(0.5,), name="http", daemon=True).start()
    trace = sender() if sender else None
    os.write(options.ready, b"r")
    inbox = socket.socket(fileno=options.inbox)
    receive(inbox, metrics, trace, lambda: reload(web, options.web_config), options.log_format)
    if trace is not None:
        trace.close()
    web.shutdown()
    web.drain()
    return 0


def _sender(options: Options, metrics: Metrics) -> Callable[[], Sender] | None:
    """Imports OpenTelemetry now: user nobody may be unable to read it. Its threads start later, unprivileged."""
    if not options.otlp:
        return None
    from ebpf_mig.exporter.otlp import Sender

    metrics.traces(True, 0)
    return lambda: Sender(options.otlp, metrics.traces)


def receive(
    inbox: socket.socket,
    metrics: Metrics,
    sender: Sender | None,
    reload: Callable[[], None],
    log_format: str = "none",
) -> None:
    """Handles messages until the other end is closed. `log_format`: of the line for each migration."""
    decoder = msgspec.json.Decoder(Message)
    while data := inbox.recv(MESSAGE_BYTES, socket.MSG_PEEK):
        message = decoder.decode(data)
        new = isinstance(message, Found) and metrics.found(message)
        inbox.recv(1)  # removes the whole message
        if isinstance(message, Found):
            if new and log_format != "none":
                _lines.info("%s", log_line(message.observation, metrics.label_of(message.observation.vm), log_format))
            if new and sender is not None and message.trace is not None:
                sender.send(message.trace, metrics.label_of(message.trace.vm))
        elif isinstance(message, Reload):
            reload()
        elif isinstance(message, Processes):
            metrics.processes(message)
        else:
            metrics.status(message)


def load_access(web: Web, path: str) -> None:
    """Loads and applies the web configuration. On UsageError the one in use stays."""
    from ebpf_mig.exporter.webconfig import load

    config = load(path)
    web.tls, web.authorise = config.tls, config.authorise


def reload(web: Web, config: str) -> None:
    """Reads the web configuration again. If it is wrong, the old one stays, and one line is logged."""
    if not config:
        return
    try:
        load_access(web, config)
    except Exception as error:  # the old restrictions stay in force on any error
        _log.error("the web configuration stays as it was: %s", printable(str(error) or type(error).__name__, 500))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
