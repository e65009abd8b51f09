# SPDX-License-Identifier: Apache-2.0
"""Many migrations of the truth machine in sequence: `python -m tests.integration.swarm N --name NAME`.

In: the number of migrations, and for `--threads N` how many threads each process has besides. Out: `ready` on stdout;
the migrations start after a line on stdin; `done N` at the end. Each has two new processes with a real KVM VM each.
They are forked from this one, so that no interpreter has to start, and are prepared ahead of time, because a VM usually
exists for a while before it migrates.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass

from tests.truth.machine import Destination, Source
from tests.truth.parts import KICK, Plan

AHEAD = 6
"""Pairs prepared ahead of time."""
AGE_S = 1.5
"""A VM is found up to 0.3 s after its creation; one that migrates sooner can be missed."""
LINGER_S = 0.6
"""A VMM stays for a while after its VM has migrated."""
PLAN = Plan(passes=1, dirty_pages=16)

_held: set[int] = set()
"""Our ends of pipes. A child must close those of the others, or it would keep the others alive."""


@dataclass
class Pair:
    """A source and a destination that wait. A byte makes the source migrate; EOF on the pipe ends both."""

    pids: list[int]
    go: int
    done: int
    migrated_at: float = 0.0

    def migrate(self) -> None:
        os.write(self.go, b"go")
        assert os.read(self.done, 2) == b"ok", "a migration failed"
        self.migrated_at = time.monotonic()

    def close(self) -> None:
        for fd in (self.go, self.done):
            _held.remove(fd)
            os.close(fd)
        for pid in self.pids:
            os.waitpid(pid, 0)


def pair() -> Pair:
    """Starts both processes. Their VMs exist when it returns."""
    go, go_in = os.pipe()
    done_out, done = os.pipe()
    listener = socket.create_server(("127.0.0.1", 0))
    pids = []
    for role in ("destination", "source"):
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(OSError, EOFError):
                for fd in (go_in, done_out, *_held):
                    os.close(fd)
                _live(role, listener, go, done)
                status = 0
            os._exit(status)
        pids.append(pid)
    listener.close()
    os.close(go)
    os.close(done)
    for _ in pids:
        assert os.read(done_out, 1) == b"r"
    _held.update((go_in, done_out))
    return Pair(pids, go_in, done_out)


def _live(role: str, listener: socket.socket, go: int, done: int) -> None:
    signal.signal(KICK, lambda *_: None)
    threading.stack_size(1 << 16)
    for _ in range(_threads()):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    if role == "source":
        address = listener.getsockname()
        listener.close()
        source = Source(PLAN)
        os.write(done, b"r")
        if os.read(go, 2) != b"go":
            return
        with socket.socket() as made:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.connect(address)
            source.migrate(made)
            made.recv(1)  # the destination reports that its guest runs
            os.write(done, b"ok")
            os.read(go, 1)
    else:
        destination = Destination(PLAN)
        os.write(done, b"r")
        connection, _ = listener.accept()
        listener.close()
        destination.serve(connection)
        connection.sendall(b"k")
        os.read(go, 1)


def _threads() -> int:
    return int(sys.argv[sys.argv.index("--threads") + 1]) if "--threads" in sys.argv else 0


def main(number: int) -> None:
    sys.setswitchinterval(0.0001)
    waiting = deque(pair() for _ in range(min(AHEAD, number)))
    made, over = len(waiting), deque[Pair]()
    time.sleep(AGE_S)
    print("ready", flush=True)  # noqa: T201
    sys.stdin.readline()
    for done in range(number):
        one = waiting.popleft()
        one.migrate()
        over.append(one)
        if made < number:
            waiting.append(pair())
            made += 1
        while over and (time.monotonic() - over[0].migrated_at > LINGER_S or done == number - 1):
            time.sleep(max(0, over[0].migrated_at + LINGER_S - time.monotonic()))
            over.popleft().close()
    print(f"done {number}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]))
