# SPDX-License-Identifier: Apache-2.0
"""Reads a long pre-copy in little memory: transfers far from the switchover are coalesced into batches.

In: a recording's blocks. Out: a `Recording`. If it has more than about ten thousand events, the calls of one thread on
one socket are coalesced into batches of at most a second (the BPF programs make shorter batches outside a blackout),
and waits are left out. Blocks near a read or write of vCPU state, which marks a switchover, stay unchanged.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, pairwise
from operator import attrgetter

from ebpf_mig.linux import kvm
from ebpf_mig.recording.budget import Budget, TooLargeError
from ebpf_mig.recording.events import AnyEvent, Ioctl, OffCpu, Transfer
from ebpf_mig.recording.file import MAX_EVENTS, Recording, RecordingReader, read_recording

NEAR = 16
"""Blocks (of up to 4096 events each) before and after a sign of a switchover that stay unchanged."""
RUN_NS = 1_000_000_000
"""Longest batch. Its first and last byte still bound the clock offset; a second is precise enough for a long
pre-copy.
"""


def read_coalesced(path: str, *, with_axis: bool = False, share: int = 1) -> Recording:
    """Reads a whole recording; `with_axis` and `share` as for `Budget`. Raises as `read_recording`."""
    with RecordingReader(path) as reader:
        coalescer = _Coalescer(reader, Budget(reader.name, with_axis=with_axis, share=share))
        for block in reader.blocks():
            if len(coalescer.kept) > MAX_EVENTS:
                reader.cut(f"it holds more than {MAX_EVENTS} events")
                break
            coalescer.take(block)
        return Recording(
            header=reader.header,
            events=coalescer.finish(),
            truncated=reader.truncated,
            reason=reader.reason,
            unknown=reader.unknown,
        )


def read_whole_or_coalesced(path: str, *, with_axis: bool = False) -> Recording:
    """Reads a recording unchanged, or coalesced if it is too large for that. Raises as `read_recording`."""
    with contextlib.suppress(TooLargeError):
        return read_recording(path, within_budget=True, with_axis=with_axis)
    return read_coalesced(path, with_axis=with_axis)  # here the first attempt holds no memory any more


class _Coalescer:
    """Takes blocks in order. Coalesces a block once NEAR newer ones have arrived, unless a switchover is near."""

    def __init__(self, reader: RecordingReader, budget: Budget) -> None:
        self._reader, self._budget = reader, budget
        self.kept: list[AnyEvent] = []
        self._recent: deque[list[AnyEvent]] = deque()
        self._spared = 0
        """Number of blocks, counted from the oldest waiting one, that must stay unchanged."""

    def take(self, block: list[AnyEvent]) -> None:
        """Takes the next block."""
        self._recent.append(block)
        if Ioctl in map(type, block) and any(map(of_the_switchover, {e.cmd for e in block if type(e) is Ioctl})):
            self._spared = len(self._recent) + NEAR
        if len(self._recent) > NEAR:
            self._leave(self._recent.popleft())

    def finish(self) -> list[AnyEvent]:
        """All events; the last blocks stay unchanged."""
        for block in self._recent:
            self._keep(block)
        return self.kept

    def _keep(self, block: list[AnyEvent]) -> None:
        self._budget.spend(block, self._reader.stored)
        self.kept += block

    def _leave(self, block: list[AnyEvent]) -> None:
        if self._spared > 0:
            self._spared -= 1
            self._keep(block)
        else:
            self._keep(list(coalesced(block)))


_MOST = (1 << 63) - 1
_LEFT_OUT = (Transfer, OffCpu)
_way = attrgetter("pid", "tid", "socket", "direction", "hidden")
_end, _bytes = attrgetter("end_ns"), attrgetter("bytes")


def coalesced(block: list[AnyEvent]) -> Iterator[AnyEvent]:
    """A block with batches instead of calls. Waits are left out, since they matter in the window only.

    A fetch ends a pass, so no batch extends across an ioctl.
    """
    kinds = list(map(type, block))
    yield from (event for event, kind in zip(block, kinds, strict=True) if kind not in _LEFT_OUT)
    ioctls = (at for at, kind in enumerate(kinds) if kind is Ioctl)
    for before, until in pairwise(chain((-1,), ioctls, (len(block),))):
        if until - before > 1:
            transfers = [event for event in block[before + 1 : until] if type(event) is Transfer]
            by_way: dict[tuple[int, ...], list[Transfer]] = defaultdict(list)
            for way, transfer in zip(map(_way, transfers), transfers, strict=True):
                by_way[way].append(transfer)
            yield from map(run_of, chain.from_iterable(map(_batches, by_way.values())))


def _batches(calls: list[Transfer]) -> Iterable[list[Transfer]]:
    """Calls of one thread on one socket, split where bytes are missing and before a batch gets too long."""
    first, last = calls[0], calls[-1]
    whole = last.position + last.bytes - first.position == sum(map(_bytes, calls))
    if whole and 0 < last.end_ns - first.begin_ns <= RUN_NS:
        yield calls
        return
    ends = list(map(_end, calls))
    gaps = () if whole else (at for at, (a, b) in enumerate(pairwise(calls), 1) if a.position + a.bytes != b.position)
    for begin, end in pairwise(chain((0,), gaps, (len(calls),))):
        at = begin
        while at < end:
            until = bisect_right(ends, calls[at].begin_ns + RUN_NS, at + 1, end)
            yield calls[at:until]
            at = until


@cache
def of_the_switchover(cmd: int) -> bool:
    """Whether an ioctl reads or writes a vCPU's state."""
    return kvm.name_of(cmd) in kvm.VCPU_STATE_GET | kvm.VCPU_STATE_SET


def run_of(calls: list[Transfer]) -> Transfer:
    """Coalesces consecutive calls of one thread on one socket into one batch."""
    if len(calls) == 1:
        return calls[0]
    first, last = calls[0], calls[-1]
    count = size = in_call = failed = descriptors = 0
    for call in calls:  # one loop is faster than a sum for each field
        count += call.calls
        size += call.bytes
        in_call += call.in_call_ns
        failed += call.failed
        descriptors += call.descriptors
    off_cpu = [call.off_cpu_ns for call in calls]
    return Transfer(
        first.begin_ns if first.tid else min([call.begin_ns for call in calls]),  # queued requests overlap
        last.end_ns,
        first.pid,
        first.tid,
        first.fd,
        first.direction,
        first.socket,
        _limited(count),
        _limited(size),
        _limited(in_call),
        max([call.max_call_ns for call in calls]),
        _limited(failed),
        first.position,
        _limited(sum(off_cpu)) if min(off_cpu) >= 0 else -1,
        first.off_before_ns,
        first.hidden,
        _limited(descriptors),
    )


def _limited(total: int) -> int:
    """A sum, limited to what can be stored, since a recording can contain any figures."""
    return min(total, _MOST)
