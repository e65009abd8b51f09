# SPDX-License-Identifier: Apache-2.0
"""The state of a migration while it runs: its pass, its rates, whether it converges, how long vCPUs stalled.

In: batches of events, and the `MigrationWatch` that knows the sources. Out: one line of text. Pure.

A pass begins with a fetch of the dirty log. It sends what was dirtied while the pass before it ran, so its bytes
and the length of that pass give the dirty rate. With a dirty ring the kernel says how many pages it took back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import SEND, AnyEvent, Ioctl, Kick, Transfer, VcpuEnter, VcpuExit, VcpuSpan
from ebpf_mig.recording.thresholds import FETCH_GAP_NS
from ebpf_mig.text import ms, size
from ebpf_mig.tracing.lifecycle import MigrationWatch

RATE_NS = 1_000_000_000
"""Rates are those of this last stretch."""
LAST_PASS_NS = 300_000_000
"""A pass as short as this can be the last one: QEMU's default downtime limit (migration/options.c, QEMU 11)."""
EVEN = 0.05
"""A dirty rate this close to the send rate is called equal to it."""
_S = 1_000_000_000
_Moved = tuple[int, int, int]
"""Begin, end, bytes."""


class Progress:
    """Pass events to `saw`; `line` says where the migration is."""

    def __init__(self, watch: MigrationWatch, page_size: int = 4096) -> None:
        self._watch = watch
        self._page = page_size
        self._begin = self._last_fetch = self._now = 0
        self._slots: set[tuple[int, int]] = set()
        """(pid, slot) that the fetch so far has read."""
        self._largest: dict[int, Ioctl] = {}
        """The largest memslot of a process that is logged."""
        self._fetchers: set[int] = set()
        """Threads that fetch it. Another one may only look at the display's memory."""
        self._passes: deque[tuple[int, int]] = deque(maxlen=3)
        """(begin, bytes) of the last passes; the last one is still running."""
        self._sent: deque[_Moved] = deque()
        """Sends within `RATE_NS`."""
        self._ring: deque[_Moved] = deque()
        """What a dirty ring reported within `RATE_NS`."""
        self._bytes = self._stall_ns = 0
        self._urgent = False
        self.passes = 0

    def saw(self, events: Iterable[AnyEvent]) -> None:
        """Takes events after the `MigrationWatch` has seen them."""
        sources = self._watch.sources
        self._urgent = False
        for event in events:
            if getattr(event, "pid", -1) not in sources:
                continue
            if isinstance(event, Transfer):
                self._transfer(event)
            elif isinstance(event, Ioctl):
                self._ioctl(event)
            elif isinstance(event, VcpuSpan):
                self._stall_ns = max(self._stall_ns, event.longest_ns)
            elif isinstance(event, VcpuEnter) and self._begin and event.last_exit_ns >= self._begin:
                self._stall_ns = max(self._stall_ns, event.at_ns - event.last_exit_ns)
            elif isinstance(event, Kick | VcpuExit):
                self._urgent = True

    @property
    def quiet(self) -> bool:
        """Whether the guest is stopped, or is being stopped: nothing must disturb it now."""
        return self._urgent or self._watch.source_stopped

    def line(self, width: int = 1000) -> str:
        """Where the migration is, in at most `width` characters; empty before its first fetch."""
        if not self._begin:
            return ""
        sending, dirtying = _rate(self._sent, self._begin, self._now), self._dirty_rate()
        rates = f"{size(sending)}/s sent"
        parts = [f"{(self._now - self._begin) / _S:.1f} s, pass {self.passes}", rates, f"{size(self._bytes)} so far"]
        if dirtying is not None:
            parts[1:2] = [f"{rates}, {size(dirtying)}/s dirtied", self._outlook(dirtying, sending)]
        if self._stall_ns:
            parts.append(f"longest vCPU stall {ms(self._stall_ns)} ms")
        while len(text := "; ".join(parts)) > width and len(parts) > 1:
            parts.pop()
        return text[:width]

    def _transfer(self, event: Transfer) -> None:
        if event.direction != SEND or not self._begin or self._watch.carriers.is_of_a_file(event):
            return
        if event.end_ns <= self._begin:  # a batch of before, which its thread ended with its next call
            return
        self._now = max(self._now, event.end_ns)
        self._bytes += event.bytes
        self._sent.append((event.begin_ns, event.end_ns, event.bytes))
        for index in range(len(self._passes) - 1, -1, -1):
            begin, count = self._passes[index]
            if event.end_ns > begin:  # records of calls that were coalesced arrive late
                self._passes[index] = begin, count + event.bytes
                break

    def _ioctl(self, event: Ioctl) -> None:
        if event.cmd in kvm.MEMSLOT and event.flags & kvm.MEM_LOG_DIRTY_PAGES:
            known = self._largest.get(event.pid)
            self._largest[event.pid] = event if known is None or event.size > known.size else known
        elif event.cmd == kvm.RESET_DIRTY_RINGS:
            self._ring.append((event.begin_ns, event.end_ns, max(0, event.ret) * self._page))
            self._fetched(event)
        elif event.cmd == kvm.GET_DIRTY_LOG:
            largest = self._largest.get(event.pid)
            if largest is None or largest.slot == event.slot:
                self._fetchers.add(event.tid)
            if event.tid in self._fetchers:
                self._fetched(event)

    def _fetched(self, event: Ioctl) -> None:
        self._now = max(self._now, event.end_ns)
        self._begin = self._begin or event.begin_ns
        slot = event.pid, event.slot
        again = event.cmd == kvm.GET_DIRTY_LOG and slot in self._slots
        if again or event.begin_ns - self._last_fetch >= FETCH_GAP_NS:
            self.passes += 1
            self._slots.clear()
            self._passes.append((event.begin_ns, 0))
        self._slots.add(slot)
        self._last_fetch = event.end_ns

    def _dirty_rate(self) -> int | None:
        """Bytes a second; None if no pass has shown it yet."""
        if self._ring:
            return _rate(self._ring, self._begin, self._now)
        if self.passes < 3:
            return None  # the first pass sends all memory, and the second one still runs
        (before, _), (begin, dirtied), _ = self._passes
        return dirtied * _S // max(1, begin - before)

    def _outlook(self, dirtying: int, sending: int) -> str:
        share = dirtying / max(1, sending)
        if share > 1 + EVEN:
            return "does not converge"
        if share > 1 - EVEN:
            return "as fast as it is sent"
        took = self._passes[-1][0] - self._passes[-2][0] if len(self._passes) > 1 else 0
        if took <= LAST_PASS_NS:
            return "converges"
        if not dirtying:
            return "converges in the next pass"
        more = math.ceil(math.log(LAST_PASS_NS / took) / math.log(share))
        left = sum(took * share**number for number in range(1, more))
        return f"converges in about {max(1, round(left / _S))} s"


def _rate(moved: deque[_Moved], begin: int, now: int) -> int:
    """Bytes a second over the last `RATE_NS`, or since `begin`. Older entries are removed.

    A batch of calls that was begun earlier counts with its share: it can be a tenth of the stretch long. Entries are
    not in order: the kernel half ends a batch when its thread calls again, which can be a second later.
    """
    since = max(begin, now - RATE_NS)
    for _ in range(len(moved)):
        if (one := moved.popleft())[1] > since:
            moved.append(one)
    parts = (count * (end - max(first, since)) // max(1, end - first) for first, end, count in moved)
    return sum(parts) * _S // max(1, now - since)
