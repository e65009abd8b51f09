# SPDX-License-Identifier: Apache-2.0
"""What limited TCP in a stretch of time, according to its own counters.

In: readings of `struct tcp_info`. Out: differences between the reading before the stretch and the one after it. The
kernel counts these times in jiffies, and the readings are not exactly at the stretch's ends. So the result also has the
resolution and the instants of the two readings.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection

from ebpf_mig.analysis.process import Process
from ebpf_mig.breakdown import Span
from ebpf_mig.recording.events import TcpInfo

_SUMS = {
    "busy_time": "busy_us",
    "rwnd_limited": "rwnd_limited_us",
    "sndbuf_limited": "sndbuf_limited_us",
    "total_retrans": "retransmits",
    "bytes_retrans": "bytes_retrans",
}
_LATEST = {"rtt": "rtt_us", "snd_cwnd": "cwnd", "snd_mss": "mss", "queued": "queued"}


def verdict(process: Process, socket: int, stretch: Span, origin: int) -> dict[str, int] | None:
    """The counters of one socket in the stretch; None unless it was read at least once after the stretch began.

    For a socket that was first read within the stretch, the difference is from its creation: all counters begin at 0.
    """
    readings = process.tcp_by_socket.get(socket, [])
    before = bisect_right(readings, stretch[0], key=_at) - 1
    after = min(bisect_left(readings, stretch[1], key=_at), len(readings) - 1)
    if after < 0 or after <= before:
        return None
    first, last = readings[before] if before >= 0 else None, readings[after]
    found = {name: _difference(last, first, key) for key, name in _SUMS.items() if key in last.values}
    found |= {name: last.values[key] for key, name in _LATEST.items() if key in last.values}
    found["resolution_us"] = last.values.get("jiffy_us", 0)
    seen = [s.at_ns for s in process.socket_events if s.socket == socket]
    begin = first.at_ns if first else min(seen, default=readings[0].at_ns)
    return {**found, "from": begin - origin, "until": last.at_ns - origin}


def _at(reading: TcpInfo) -> int:
    return reading.at_ns


def _difference(last: TcpInfo, first: TcpInfo | None, key: str) -> int:
    return max(0, last.values[key] - (first.values.get(key, 0) if first else 0))


def together(process: Process, sockets: Collection[int], stretch: Span, origin: int) -> dict[str, int] | None:
    """The counters of several sockets in the stretch: times and counts are added, the rest is the maximum."""
    verdicts = [v for socket in sorted(sockets) if (v := verdict(process, socket, stretch, origin)) is not None]
    if not verdicts:
        return None
    names = [name for name in verdicts[0] if all(name in v for v in verdicts)]
    total = {
        name: sum(v[name] for v in verdicts) if name in _SUMS.values() else max(v[name] for v in verdicts)
        for name in names
    }
    return {**total, "from": min(v["from"] for v in verdicts)}
