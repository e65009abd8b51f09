# SPDX-License-Identifier: Apache-2.0
"""The process that listens: no capability, not root, no BPF, no LLVM; it knows only what the watch tells it.

In: a listening socket and a pipe of JSON lines, as file descriptors. Out: HTTP responses. It ends with the pipe:
when the watch dies, however it dies, the socket closes and a scrape fails, which is the truth.
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
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from ebpf_mig import __version__
from ebpf_mig.errors import EbpfMigError
from ebpf_mig.exporter.metrics import Metrics
from ebpf_mig.exporter.observation import Message, Observation, Reload
from ebpf_mig.exporter.otel_spans import Trace
from ebpf_mig.exporter.spawn import Options
from ebpf_mig.exporter.web import Web
from ebpf_mig.linux import capabilities
from ebpf_mig.text import printable

if TYPE_CHECKING:
    from ebpf_mig.exporter.otlp import Sender

_log = logging.getLogger("ebpf_mig.exporter")


def main(arguments: list[str]) -> int:
    """Serves until the pipe ends."""
    logging.basicConfig(format="ebpf-mig: %(message)s", stream=sys.stderr)
    options = msgspec.json.decode(arguments[0], type=Options)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(
            signum, signal.SIG_IGN
        )  # the watch drains first, and then closes the pipe; it says when to reload
    metrics = Metrics(options.vm_label)
    metrics.build(__version__, platform.release())
    web = Web(socket.socket(fileno=options.listener), metrics)
    try:
        if options.web_config:
            load_access(web, options.web_config)
        sender = _sender(options, metrics)
    except EbpfMigError as error:
        _log.error("%s", "; ".join(filter(None, (str(error), error.remedy))))
        return error.exit_code
    capabilities.become_nobody()
    capabilities.die_with_parent(options.parent)  # after it: a change of identity forgets this
    threading.Thread(target=web.serve_forever, args=(0.5,), name="http", daemon=True).start()
    trace = sender() if sender else None
    with os.fdopen(options.pipe, "rb") as pipe:
        receive(pipe, metrics, trace, lambda: reload(web, options.web_config))
    if trace is not None:
        trace.close()
    web.shutdown()
    web.drain()
    return 0


def _sender(options: Options, metrics: Metrics) -> Callable[[], Sender] | None:
    """Imports what sending takes, which nobody may not be able to read; its threads must not keep privilege."""
    if not options.otlp:
        return None
    from ebpf_mig.exporter.otlp import Sender

    metrics.traces(True, 0)
    return lambda: Sender(options.otlp, metrics.traces)


def receive(pipe: BinaryIO, metrics: Metrics, sender: Sender | None, reload: Callable[[], None]) -> None:
    """Takes messages until the pipe ends."""
    decoder = msgspec.json.Decoder(Message | Trace)
    for line in pipe:
        message = decoder.decode(line)
        if isinstance(message, Observation):
            metrics.migration(message)
        elif isinstance(message, Trace):
            if sender is not None:
                sender.send(message, metrics.label_of(message.vm))
        elif isinstance(message, Reload):
            reload()
        else:
            metrics.status(message)


def load_access(web: Web, path: str) -> None:
    """Takes the web configuration over; UsageError leaves the one in use as it was."""
    from ebpf_mig.exporter.webconfig import load

    config = load(path)
    web.tls, web.authorise = config.tls, config.authorise


def reload(web: Web, config: str) -> None:
    """Reads the web configuration again; what is wrong with it leaves the old one, and is said in one line."""
    if not config:
        return
    try:
        load_access(web, config)
    except Exception as error:  # the old restriction stays in force, whatever is wrong with the new one
        _log.error("the web configuration stays as it was: %s", printable(str(error) or type(error).__name__, 500))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
