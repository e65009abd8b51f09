# SPDX-License-Identifier: Apache-2.0
"""Which socket, pipe or file carries a migration, as far as it can be told while tracing goes on.

In: the transfers of processes, in order; what kind of carrier each is; which threads fetch dirty logs. Out: where a
process sends most, when it last sent there, and when that was answered. Pure. `analysis/sockets.py` decides afterwards.
"""

from __future__ import annotations

from collections import Counter

from ebpf_mig.recording.events import AF_UNIX, FILE, PIPE, SEND, Socket, Transfer

COMPANION_SHARE = 4
"""A socket with less than 1/COMPANION_SHARE of the busiest socket's bytes is a monitor or a console, not a connection
of the migration. multifd channels carry about the same amount each.
"""
CARRIER_BYTES = 64 << 10
"""A socket that sent less does not carry the migration. The page headers of even a tiny VM's memory take more."""


class Carriers:
    """Pass each transfer to `carried`, and keep `known` and `fetchers` up to date."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], Socket] = {}
        """Each carrier by (pid, key)."""
        self.fetchers: set[tuple[int, int]] = set()
        """(pid, tid) of threads that fetch dirty logs."""
        self.sent_at: dict[int, int] = {}
        """By pid: the end of the last send that was of the migration."""
        self.answered_at: dict[int, int] = {}
        """By pid: when bytes last came back over the busiest carrier."""
        self._sent: dict[int, Counter[int]] = {}
        self._sent_by_fetchers: dict[int, Counter[int]] = {}
        self._moved: Counter[tuple[int, int]] = Counter()
        """Bytes in both directions by (pid, key)."""

    def carried(self, event: Transfer) -> bool:
        """Takes the next transfer. Whether it is a send of the migration, if its process is a source."""
        self._moved[event.pid, event.socket] += event.bytes
        sent = self._sent.setdefault(event.pid, Counter())
        if event.direction != SEND:
            if event.bytes and event.socket in sent and event.socket == self.busiest(event.pid):
                self.answered_at[event.pid] = max(self.answered_at.get(event.pid, 0), event.end_ns)
            return False
        fetches = (event.pid, event.tid) in self.fetchers
        if fetches:
            self._sent_by_fetchers.setdefault(event.pid, Counter())[event.socket] += event.bytes
        elif self.is_of_a_file(event):
            return False
        sent[event.socket] += event.bytes
        if not fetches and sent[event.socket] * COMPANION_SHARE < max(sent.values()):
            return False
        self.sent_at[event.pid] = max(self.sent_at.get(event.pid, 0), event.end_ns)
        return True

    def start_anew(self, pid: int) -> None:
        """Forgets what the process sent: it begins another migration, or is another program."""
        for known in (self._sent, self._sent_by_fetchers, self.answered_at):
            known.pop(pid, None)

    def is_of_a_file(self, event: Transfer) -> bool:
        """Whether it read or wrote a file: a disk, a log or firmware, unless the fetching thread wrote it."""
        known = self.known.get((event.pid, event.socket))
        return known is not None and known.family == FILE

    def is_unix(self, event: Transfer) -> bool:
        """Whether it went over a UNIX socket."""
        known = self.known.get((event.pid, event.socket))
        return known is not None and known.family == AF_UNIX

    @property
    def opaque(self) -> list[Socket]:
        """Pipes and UNIX sockets that moved much, and whose other end no traced process holds."""
        ends = Counter(key for _, key in self.known)
        large = [carrier for at, carrier in self.known.items() if self._moved[at] >= CARRIER_BYTES]
        return [
            one
            for one in large
            if (one.family == PIPE and ends[one.socket] < 2) or (one.family == AF_UNIX and not ends[one.peer])
        ]

    def busiest(self, pid: int) -> int:
        """The carrier: where the thread that fetches dirty logs sends most, or else where all threads do; 0: none."""
        empty: Counter[int] = Counter()
        for sent in (self._sent_by_fetchers.get(pid, empty), self._sent.get(pid, empty)):
            most = max(sent, key=lambda socket: (sent[socket], socket), default=0)
            if most and sent[most] >= CARRIER_BYTES:
                return most
        return 0
