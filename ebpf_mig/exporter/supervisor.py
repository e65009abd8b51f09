# SPDX-License-Identifier: Apache-2.0
"""Keeps the exporter's processes running: the watch, the listener, and the analyst while there is work for it.

In: a `Plan`. Out: an exit code. It reads no /proc of others, no recording and no request, and of its children only that
they are alive. It keeps the privilege that starting them takes. It holds open the sockets over which they talk, and the
listener's counters, so one process can be replaced while the others go on. When it ends for any reason, the kernel
kills them (`leash.py`). Run as `python -m ebpf_mig.exporter.supervisor PLAN`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from ebpf_mig.exporter import checkpoint
from ebpf_mig.exporter.analyst import Analyst, socket_pair
from ebpf_mig.exporter.child import Child
from ebpf_mig.exporter.spawn import give_back, leave
from ebpf_mig.linux import capabilities

DRAIN_S, QUIT_S = 12.0, 6.0
"""After SIGTERM: for the watch to end what it traces, and for the listener to answer open requests."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""They are blocked until their handlers are installed."""


_log = logging.getLogger("ebpf_mig.exporter")


class Plan(NamedTuple):
    """What to run: the options of `ebpf-mig exporter`, and the listening socket."""

    only: str
    state_directory: str
    keep: int
    keep_bytes: int
    own_cost: bool
    listener: int
    vm_label: str
    vmms: tuple[str, ...]
    web_config: str
    otlp: str
    log_format: str
    log_level: int


class Supervisor:
    """Create it, then call `run`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._inbox, self._outbox = socket_pair()
        self._inbox.shutdown(socket.SHUT_WR)  # the listener cannot answer
        self._analyst = Analyst()
        messages, tasks, inbox = (s.fileno() for s in (self._outbox, self._analyst.tasks, self._inbox))
        counters = checkpoint.create()

        def argument(**more: int) -> Callable[[int], str]:
            common = plan._asdict() | {"parent": os.getpid()} | more
            return lambda ready: json.dumps(common | {"ready": ready})

        watching = argument(messages=messages, tasks=tasks)
        serving = argument(inbox=inbox, counters=counters)
        self._watch = Child("watch", "ebpf_mig.exporter.watch_process", watching, [messages, tasks], beats=True)
        held = [plan.listener, inbox, counters]
        self._listener = Child("listener", "ebpf_mig.exporter.serve", serving, held)
        self._said: bytes | None = None
        self._stopping = 0.0
        self._asked: list[int] = []
        self._reload = False
        self._wake, self._woken = os.pipe()

    def run(self) -> int:
        """Runs until SIGTERM or Ctrl-C, or until the watch or the listener ends with an error at its first start."""
        self._take_signals()
        announced = False
        while True:
            for child in (self._listener, self._watch):
                ended = child.look()
                if child is self._watch and self._stopping:
                    continue
                if ended and not child.was_ready and (child.status or 0) > 0:
                    self._kill_all()
                    return child.status or 0
                if ended:
                    child.count_restart()
                child.start()
            self._analyst.look()
            self._speak()
            if not announced and not self._watch.missing and not self._listener.missing:
                announced = True
                self._announce()
            if self._asked and not self._stopping:
                self._stopping = time.monotonic()
                _log.warning("draining")
                self._watch.terminate()
            if self._stopping and (not self._watch.runs or time.monotonic() - self._stopping > DRAIN_S):
                return self._quit()
            self._wait()

    def _announce(self) -> None:
        host, port = socket.socket(fileno=os.dup(self._plan.listener)).getsockname()[:2]
        where = ascii(self._plan.state_directory)[1:-1]
        _log.warning("listening on %s:%d; recordings go to %s", host, port, where)
        give_back()

    def _speak(self) -> None:
        """Tells the listener what changed. A full socket has to be tried again."""
        children = (self._watch, self._listener, self._analyst.child)
        missing = {child.name: child.missing for child in children if child.missing}
        if self._analyst.rests:
            missing.pop(self._analyst.child.name, None)
        restarts = {child.name: child.restarts for child in children}
        state = json.dumps({"type": "processes", "restarts": restarts, "missing": missing}).encode()
        with contextlib.suppress(OSError):
            if self._reload:
                self._outbox.send(b'{"type": "reload"}', socket.MSG_DONTWAIT)
                self._reload = False
            if state != self._said:
                self._outbox.send(state, socket.MSG_DONTWAIT)
                self._said = state

    def _wait(self) -> None:
        """Waits for a signal, for a child to get ready, for work, or until something is due."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for child in (self._watch, self._listener):
            if child.pipe >= 0:
                poll.register(child.pipe, select.POLLIN)
        due = [self._watch.due_in(), self._listener.due_in()]
        if self._stopping:
            due.append(0.1)
        if self._analyst.child.runs or self._analyst.child.due_in() > 0:
            due.append(self._analyst.child.due_in())
        else:
            poll.register(self._analyst.work, select.POLLIN)
        if poll.poll(1 + int(min(due) * 1000)):
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)

    def _take_signals(self) -> None:
        for fd in (self._wake, self._woken):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

        def reload(_signum: int, _frame: object) -> None:
            self._reload = True

        def stop(signum: int, _frame: object) -> None:
            self._asked.append(signum)
            signal.signal(signum, signal.SIG_DFL)  # a second one ends this process at once, and so the others

        signal.signal(signal.SIGHUP, reload)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _quit(self) -> int:
        """Has the listener answer open requests and end, then kills what is left."""
        self._outbox.close()
        self._watch.kill()
        self._watch.wait(1)
        self._listener.wait(QUIT_S)
        self._kill_all()
        return 0

    def _kill_all(self) -> None:
        for child in (self._listener, self._watch, self._analyst.child):
            child.kill()
            child.wait(1)


def main(arguments: list[str]) -> int:
    """See the module."""
    plan = Plan(**json.loads(arguments[0]))
    logging.basicConfig(format="ebpf-mig: %(message)s", stream=sys.stderr)
    capabilities.keep_only(capabilities.SUPERVISOR, pass_on=True)
    return Supervisor(plan).run()


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
