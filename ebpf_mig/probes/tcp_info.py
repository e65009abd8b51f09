# SPDX-License-Identifier: Apache-2.0
"""Reads `struct tcp_info` of a connection through sock_diag.

In: sockets as the tracer reports them. Out: `TcpInfo` events. The VMM's socket is not touched: a second reference to it
would delay its FIN. Sockets in another network namespace are not found and have no events.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from queue import Empty, SimpleQueue
from typing import Any

from ebpf_mig.linux import clock
from ebpf_mig.recording.events import Socket, TcpInfo

AF_INET, AF_INET6 = 2, 10
MOST_OPEN = 64
"""Most outstanding requests; beyond this no more are sent."""
FIELDS = (
    "busy_time", "rwnd_limited", "sndbuf_limited", "total_retrans", "bytes_retrans", "bytes_acked", "bytes_sent",
    "notsent_bytes", "rtt", "min_rtt", "snd_cwnd", "snd_mss", "snd_wnd", "delivery_rate",
)  # fmt: skip
_INET_DIAG_INFO = 1 << 1
"""Extension bits are numbered from 1: INET_DIAG_INFO is 2 (include/uapi/linux/inet_diag.h)."""
_MONOTONIC_COARSE = 6
"""CLOCK_MONOTONIC_COARSE of include/uapi/linux/time.h; the time module has no name for it."""
JIFFY_US = round(time.clock_getres(_MONOTONIC_COARSE) * 1e6)
"""The length of a jiffy. The coarse clock and the times in `struct tcp_info` advance once per jiffy."""


def read(diag: Any, socket: Socket) -> TcpInfo | None:
    """The tcp_info of one connection. None if it is not TCP, is gone, or is in another network namespace."""
    sport, dport = (int(end.rpartition(":")[2] or 0) for end in (socket.local, socket.remote))
    if socket.family not in (AF_INET, AF_INET6) or not sport or not dport:
        return None
    at = clock.monotonic_ns()
    for row in diag.get_sock_stats(socket.family, extensions=_INET_DIAG_INFO, sport=sport, dport=dport):
        if row["idiag_inode"] == socket.socket and (info := row.get_attr("INET_DIAG_INFO")):
            values = {name: int(info[f"tcpi_{name}"]) for name in FIELDS if f"tcpi_{name}" in info}
            more = {"queued": int(row["idiag_wqueue"]), "jiffy_us": JIFFY_US}
            return TcpInfo(at, socket.pid, socket.socket, {**values, **more})
    return None


class TcpReader:
    """Reads in its own thread, so that draining the ring buffer never waits for netlink."""

    def __init__(self) -> None:
        self._wanted: SimpleQueue[Socket | None] = SimpleQueue()
        self._answers: SimpleQueue[TcpInfo | None] = SimpleQueue()
        self._open = 0
        self._ready = threading.Event()
        threading.Thread(target=self._work, name="tcp-info", daemon=True).start()

    def wait(self) -> None:
        """Waits until requests are answered at once: pyroute2 takes a third of a second to import."""
        self._ready.wait(5)

    def ask(self, socket: Socket) -> None:
        """Requests a reading of a connection."""
        if self._open < MOST_OPEN:
            self._open += 1
            self._wanted.put(socket)

    def answers(self, timeout_s: float = 0.0) -> list[TcpInfo]:
        """The readings so far. Waits up to `timeout_s` for outstanding requests."""
        until = time.monotonic() + timeout_s
        found: list[TcpInfo] = []
        with contextlib.suppress(Empty):
            while self._open:
                left = until - time.monotonic()
                answer = self._answers.get(timeout=left) if left > 0 else self._answers.get_nowait()
                self._open -= 1
                if answer is not None:
                    found.append(answer)
        return found

    def close(self) -> None:
        """Stops the thread."""
        self._wanted.put(None)

    def _work(self) -> None:
        """This is only a witness: an exception of pyroute2 on some kernel must not end the tracing."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # signals are for the main thread
        with contextlib.suppress(Exception):
            from pyroute2 import DiagSocket  # imported here to save 30 MiB in a process that never traces

            with DiagSocket() as diag:
                diag.bind()
                self._ready.set()
                while (socket := self._wanted.get()) is not None:
                    answer = None
                    with contextlib.suppress(Exception):
                        answer = read(diag, socket)
                    self._answers.put(answer)
        self._ready.set()
