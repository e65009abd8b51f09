# SPDX-License-Identifier: Apache-2.0
"""The watch as one of the exporter's processes: it has the programs loaded, gives up privilege, and watches the node.

In: sockets for the listener and for the analyst, from the supervisor. Out: messages. It ends with SIGTERM after it has
kept what it was tracing, or with the supervisor. Run as `python -m ebpf_mig.exporter.watch_process OPTIONS`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import struct
import sys

import msgspec

from ebpf_mig.errors import EbpfMigError
from ebpf_mig.exporter.listener_messages import Found
from ebpf_mig.exporter.messages import Answer
from ebpf_mig.exporter.node import NodeWatch
from ebpf_mig.exporter.observation import Status
from ebpf_mig.exporter.spawn import leave
from ebpf_mig.exporter.store import Store
from ebpf_mig.linux import capabilities, clock
from ebpf_mig.text import printable

WAIT_S = 60
"""How long a listener that cannot be started again holds up the recordings of later migrations."""

_log = logging.getLogger("ebpf_mig.exporter")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor passes on the command line, as JSON."""

    only: str
    state_directory: str
    keep: int
    keep_bytes: int
    own_cost: bool
    log_level: int
    parent: int
    messages: int
    tasks: int
    ready: int


class Outbox:
    """Messages to the listener. Thread-safe."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", WAIT_S, 0))
        self._run, self._number = f"{os.getpid()}-{clock.monotonic_ns()}", 0

    def send(self, answer: Answer) -> None:
        """Sends the results of a migration. Waits while the listener is being replaced: OSError if that takes longer
        than `WAIT_S`. Call it from one thread.
        """
        if answer.observation is None:
            return
        self._number += 1
        found = Found(run=self._run, number=self._number, observation=answer.observation, trace=answer.trace)
        self._socket.send(msgspec.json.encode(found))

    def state(self, status: Status) -> None:
        """Sends the state, unless the listener has not read what was sent before."""
        with contextlib.suppress(OSError):
            self._socket.send(msgspec.json.encode(status), socket.MSG_DONTWAIT)


def main(arguments: list[str]) -> int:
    """Watches until SIGTERM."""
    options = msgspec.json.decode(arguments[0], type=Options)
    capabilities.die_with_parent(options.parent)
    logging.basicConfig(format="ebpf-mig: %(message)s", stream=sys.stderr)
    logging.getLogger("ebpf_mig").setLevel(options.log_level)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, _frame: asked.append(signum))
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # for the supervisor
    try:
        store = Store(options.state_directory, options.keep, options.keep_bytes)
        outbox, tasks = Outbox(options.messages), socket.socket(fileno=options.tasks)
        with NodeWatch(store, outbox.send, options.only, tasks) as node:
            capabilities.keep_only((*capabilities.ENGINE, *(["CAP_SYS_ADMIN"] if options.own_cost else [])))
            node.verify()
            outbox.state(node.status())

            def tick(status: Status) -> None:
                outbox.state(status)
                _beat(options.ready)

            _beat(options.ready)
            node.run(lambda: bool(asked), tick)
    except EbpfMigError as error:
        _log.error("%s", printable("; ".join(filter(None, (str(error), error.remedy))), 2000))
        return error.exit_code
    return 0


def _beat(fd: int) -> None:
    """Tells the supervisor that the loop turns."""
    with contextlib.suppress(OSError):
        os.write(fd, b".")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
