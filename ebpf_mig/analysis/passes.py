# SPDX-License-Identifier: Apache-2.0
"""The rows of the dirty log: pre-copy passes, the fetches after the stop, logging switched on and off, re-arming.

In: a source's fetches and sends. Out: rows of the breakdown.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ebpf_mig.analysis import brownout, dirty_log, fetch_split, tcp_info
from ebpf_mig.analysis.dirty_log import Burst
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.sockets import off_cpu_within
from ebpf_mig.analysis.spans import covered, total, uncovered
from ebpf_mig.analysis.waits import OffCpuTotals
from ebpf_mig.breakdown import Fetch, FetchIoctl, Logging, Pass, Rearm, Span
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import Ioctl, Samples, Transfer

GIB = 1 << 30


@dataclass
class DirtyLogRows:
    """Makes the rows about one source's dirty log. Instants in the rows count from `origin`."""

    process: Process
    bursts: Sequence[Burst]
    stop: int | None
    """The last vCPU's stop."""
    sends: Sequence[Transfer]
    """On the migration's sockets, in order."""
    origin: int
    page: int = 4096
    since: int = 0
    """When tracing began."""
    brownout: bool = False
    """Whether the vCPUs' times outside KVM_RUN were recorded."""
    sends_known: bool = True
    """False if sends could not be traced."""
    _begins: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._begins = [send.begin_ns for send in self.sends]

    @cached_property
    def samples(self) -> dict[tuple[int, int], list[Samples]]:
        return fetch_split.by_ioctl(self.process.samples)

    @cached_property
    def _resets(self) -> list[Ioctl]:
        return [i for i in self.process.ioctls if i.cmd == kvm.RESET_DIRTY_RINGS]

    @cached_property
    def _logged(self) -> int | None:
        """When logging was switched on; None if unknown or if the vCPUs' times outside KVM_RUN were not recorded."""
        return dirty_log.switched_on(self.process, self.stop) if self.brownout else None

    @cached_property
    def _off_cpu(self) -> OffCpuTotals:
        return OffCpuTotals(self.process, self.process.fetchers)

    def passes(self) -> list[Pass]:
        """The fetches that began while the guest ran, each with the sends up to the next fetch."""
        running = [b for b in self.bursts if b.fetched and (self.stop is None or b.begin < self.stop)]
        rows: list[Pass] = []
        for index, burst in enumerate(running):
            before = running[index - 1] if index else None
            following = running[index + 1].begin if index + 1 < len(running) else self.stop
            rows.append(self._pass(burst, before, following))
        return rows

    def _pass(self, burst: Burst, before: Burst | None, following: int | None) -> Pass:
        first = bisect_left(self._begins, burst.begin)
        until = bisect_left(self._begins, following) if following is not None else len(self._begins)
        sent = self.sends[first:until]
        ready = sent[0].begin_ns if sent else burst.end
        end = max([s.end_ns for s in sent], default=burst.begin)
        size = sum([s.bytes for s in sent])
        pages, most = self.returned(burst, before), size // self.page if self.sends_known else None
        dirtied = most if pages is None else pages
        took = burst.begin - before.begin if before else 0
        user = uncovered([(i.begin_ns, i.end_ns) for i in burst.ioctls], (burst.begin, ready))
        stretch = (burst.begin, following if following is not None else max(end, burst.end))
        return Pass(
            begin=burst.begin - self.origin,
            kernel_ns=burst.kernel_ns,
            user_ns=total(user),
            pages=pages,
            bytes=size if self.sends_known else None,
            send_ns=sum([min(s.in_call_ns, s.end_ns - s.begin_ns) for s in sent]) if self.sends_known else None,
            blocked_ns=off_cpu_within(sent, (burst.begin, end)) if sent else None,
            dirty_pages_per_s=dirtied * 1_000_000_000 // took if took > 0 and dirtied is not None else None,
            pages_at_most=most,
            user_off_cpu_ns=self._off_cpu.within(user),
            split=fetch_split.split(burst.ioctls, self.samples),
            brownout=brownout.stretch(self.process, *stretch, self.origin) if self.brownout else None,
            baseline=brownout.baseline(self.process, self.since, self._logged, stretch[1] - stretch[0], self.origin),
            tcp_info=tcp_info.together(self.process, {s.socket for s in sent}, stretch, self.origin)
            if self.process.tcp
            else None,
        )

    def returned(self, burst: Burst, before: Burst | None) -> int | None:
        """Ring entries that were reset between the end of the previous fetch and that of this one; None with a
        bitmap.
        """
        if any(i.cmd == kvm.GET_DIRTY_LOG for i in burst.ioctls):
            return None
        since = before.end if before else self.bursts[0].begin
        first, until = bisect_left(self._resets, since, key=_begin), bisect_right(self._resets, burst.end, key=_begin)
        resets = self._resets[first:until]
        return sum(max(0, i.ret) for i in resets) if resets else None

    def final(self, until: int) -> list[Fetch]:
        """The fetches that began in the blackout."""
        return [
            Fetch(
                begin=burst.begin - self.origin,
                end=max(i.end_ns for i in burst.ioctls) - self.origin,
                kernel_ns=burst.kernel_ns,
                ioctls=[self._ioctl(i) for i in burst.ioctls],
                split=fetch_split.split(burst.ioctls, self.samples),
            )
            for burst in self.last(until)
        ]

    def last(self, until: int) -> list[Burst]:
        return [b for b in self.bursts if self.stop is not None and self.stop <= b.begin < until]

    def _ioctl(self, ioctl: Ioctl) -> FetchIoctl:
        return FetchIoctl(
            ioctl=kvm.name_of(ioctl.cmd),
            slot=ioctl.slot,
            begin=ioctl.begin_ns - self.origin,
            duration_ns=ioctl.end_ns - ioctl.begin_ns,
            lock_wait_ns=dirty_log.lock_waits(ioctl),
            off_cpu_ns=ioctl.off_cpu_ns if ioctl.off_cpu_ns >= 0 else None,
            split=fetch_split.split([ioctl], self.samples),
        )

    def user_off_cpu(self, spans: Sequence[Span]) -> int | None:
        """The part of the bitmap work in these spans (relative to `origin`) that was off the CPU, in ns."""
        return self._off_cpu.within((begin + self.origin, end + self.origin) for begin, end in spans)

    def rearm(self, until: int) -> Rearm | None:
        """The work of the fetches in the blackout to write-protect pages again; None if there was none or it is
        unknown.
        """
        ioctls = [i for burst in self.last(until) for i in burst.ioctls]
        manual = any(dirty_log.is_clear(i) for burst in self.bursts for i in burst.ioctls)
        gets = [i for i in ioctls if kvm.name_of(i.cmd) == "GET_DIRTY_LOG"]
        others = [i for i in ioctls if kvm.name_of(i.cmd) != "GET_DIRTY_LOG"]
        ns = sum(fetch_split.on_cpu(i) for i in others)
        pages = sum(i.size if dirty_log.is_clear(i) else max(0, i.ret) for i in others)
        error = 0
        samples: int | str = "exact"
        if gets and not manual:  # With manual protection, a GET does not protect pages.
            found = fetch_split.split(gets, self.samples)
            if found is None:
                return None
            ns += found.walk + found.flush
            error = (found.walk_error or 0) + (found.flush_error or 0)
            samples = found.samples
            places = self.process.places
            pages += sum(places[i.slot][1] // self.page for i in gets if i.slot in places)
        if not pages or not ns:
            return None
        return Rearm(
            ns=ns,
            error_ns=error,
            samples=samples,
            pages=pages,
            ns_per_page=round(ns / pages, 3),
            ms_per_gib=round(ns / 1e6 / (pages * self.page / GIB), 6),
        )

    def logging(self, blackout: Span | None) -> list[Logging]:
        """Each time that the migration switched logging on or off. Slots that follow each other closely are one row."""
        since = dirty_log.switched_on(self.process, self.stop)
        state: dict[int, bool] = {}
        groups: list[tuple[bool, list[Ioctl]]] = []
        for ioctl in self.process.memslots:
            if not ioctl.size:
                continue
            flag = bool(ioctl.flags & kvm.MEM_LOG_DIRTY_PAGES)
            if flag != state.get(ioctl.slot, False) and since is not None and ioctl.begin_ns >= since:
                near = groups and ioctl.begin_ns - groups[-1][1][-1].end_ns < dirty_log.LOGGING_GAP_NS
                if near and groups[-1][0] == flag:
                    groups[-1][1].append(ioctl)
                else:
                    groups.append((flag, [ioctl]))
            state[ioctl.slot] = flag
        return [self._switch(flag, ioctls, blackout) for flag, ioctls in groups]

    def _switch(self, flag: bool, ioctls: Sequence[Ioctl], blackout: Span | None) -> Logging:
        calls = [(i.begin_ns, i.end_ns) for i in ioctls]
        return Logging(
            on=flag,
            begin=ioctls[0].begin_ns - self.origin,
            end=max(i.end_ns for i in ioctls) - self.origin,
            kernel_ns=total(calls),
            slots=len({i.slot for i in ioctls}),
            in_blackout_ns=covered(calls, blackout) if blackout is not None else None,
        )


def _begin(ioctl: Ioctl) -> int:
    return ioctl.begin_ns
