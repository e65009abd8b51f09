# SPDX-License-Identifier: Apache-2.0
"""The process that listens: no capability, not root, no BPF, no LLVM; it knows only what the watch tells it.

In: a listening socket and a pipe of JSON lines, as file descriptors. Out: HTTP responses. It ends with the pipe:
when the watch dies, however it dies, the socket closes and a scrape fails, which is the truth.
Run as `python -m ebpf_mig.exporter.serve LISTENER PIPE VM_STYLE PARENT [WEB_CONFIG]`.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
import sys
import threading
from typing import BinaryIO

import msgspec

from ebpf_mig import __version__
from ebpf_mig.errors import UsageError
from ebpf_mig.exporter import privileges
from ebpf_mig.exporter.metrics import Metrics
from ebpf_mig.exporter.observation import Message, Observation
from ebpf_mig.exporter.web import Web

_log = logging.getLogger("ebpf_mig.exporter")


def main(arguments: list[str]) -> int:
    """Serves until the pipe ends."""
    logging.basicConfig(format="ebpf-mig: %(message)s", stream=sys.stderr)
    listener_fd, pipe_fd, style, parent, *config = arguments
    privileges.die_with_parent(int(parent))
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)  # the watch drains first, and then closes the pipe
    metrics = Metrics(style)
    metrics.build(__version__, platform.release())
    web = Web(socket.socket(fileno=int(listener_fd)), metrics)
    if config:
        load_access(web, config[0])
    privileges.become_nobody()
    signal.signal(signal.SIGHUP, lambda *_: _reload(web, config))
    threading.Thread(target=web.serve_forever, args=(0.5,), name="http", daemon=True).start()
    with os.fdopen(int(pipe_fd), "rb") as pipe:
        receive(pipe, metrics)
    web.shutdown()
    web.drain()
    return 0


def receive(pipe: BinaryIO, metrics: Metrics) -> None:
    """Takes messages until the pipe ends."""
    decoder = msgspec.json.Decoder(Message)
    for line in pipe:
        message = decoder.decode(line)
        if isinstance(message, Observation):
            metrics.migration(message)
        else:
            metrics.status(message)


def load_access(web: Web, path: str) -> None:
    """Takes the web configuration over; UsageError leaves the one in use as it was."""
    from ebpf_mig.exporter.webconfig import load

    config = load(path)
    web.tls, web.authorise = config.tls, config.authorise


def _reload(web: Web, config: list[str]) -> None:
    if not config:
        return
    try:
        load_access(web, config[0])
    except UsageError as error:
        _log.error("the web configuration stays as it was: %s", error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
