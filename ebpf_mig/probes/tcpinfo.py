# SPDX-License-Identifier: Apache-2.0
"""TCP's own account of a connection, through sock_diag.

In: sockets as the tracer told them. Out: `TcpInfo` events. The VMM's socket is not touched: a second reference to it
would hold back its FIN. Sockets of another network namespace are not found, and nothing is told of them.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from ebpf_mig.events import Socket, TcpInfo

AF_INET, AF_INET6 = 2, 10
_INET_DIAG_INFO = 1 << 1
"""Extension bits are numbered from 1: INET_DIAG_INFO is 2 (include/uapi/linux/inet_diag.h)."""
FIELDS = (
    "busy_time", "rwnd_limited", "sndbuf_limited", "total_retrans", "bytes_retrans", "bytes_acked", "bytes_sent",
    "notsent_bytes", "rtt", "min_rtt", "snd_cwnd", "snd_mss", "snd_wnd", "delivery_rate",
)  # fmt: skip

_MONOTONIC_COARSE = 6
"""CLOCK_MONOTONIC_COARSE of include/uapi/linux/time.h; the time module has no name for it."""
JIFFY_US = round(time.clock_getres(_MONOTONIC_COARSE) * 1e6)
"""The coarse clock moves once a jiffy, and so do the times in `struct tcp_info`."""


class TcpReader:
    """Reads what TCP says of single connections; use `close` at the end."""

    def __init__(self) -> None:
        from pyroute2 import DiagSocket  # here: a process that never traces does not pay its 30 MiB

        self._diag: Any = DiagSocket()
        self._diag.bind()

    def read(self, socket: Socket) -> TcpInfo | None:
        """One connection's account; None if it is none of TCP's, is gone, or is in another network namespace."""
        if socket.family not in (AF_INET, AF_INET6):
            return None
        sport, dport = (int(end.rpartition(":")[2] or 0) for end in (socket.local, socket.remote))
        if not sport or not dport:
            return None
        # A figure to set beside ours: whatever pyroute2 raises on some kernel must not end the tracing.
        with contextlib.suppress(Exception):
            at = time.monotonic_ns()
            rows = self._diag.get_sock_stats(socket.family, extensions=_INET_DIAG_INFO, sport=sport, dport=dport)
            for row in rows:
                if row["idiag_inode"] == socket.socket and (info := row.get_attr("INET_DIAG_INFO")):
                    values = {name: int(info[f"tcpi_{name}"]) for name in FIELDS if f"tcpi_{name}" in info}
                    more = {"queued": int(row["idiag_wqueue"]), "jiffy_us": JIFFY_US}
                    return TcpInfo(at, socket.pid, socket.socket, {**values, **more})
        return None

    def close(self) -> None:
        self._diag.close()
