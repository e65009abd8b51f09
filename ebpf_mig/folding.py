# SPDX-License-Identifier: Apache-2.0
"""Long pre-copy in little memory: transfers that lie far from the switchover are folded into runs as they are read.

In: a recording's blocks. Out: a `Recording` in which calls of one thread on one socket are runs of at most 100 ms, as
the kernel half makes them outside a blackout, where there are more than a few hundred thousand events. Whatever is
near vCPU state being read or written, which is what a switchover does, is kept call by call.
"""

from __future__ import annotations

from collections import deque
from functools import cache

from ebpf_mig import kvm
from ebpf_mig.events import AnyEvent, Ioctl, Transfer
from ebpf_mig.recording import MAX_EVENTS, Recording, RecordingReader

NEAR = 16
"""Blocks (of up to 4096 events each) before and after a switchover's sign that are left as they are."""
RUN_NS = 100_000_000
"""FOLD_MAX_NS in bpf/common.h."""

Key = tuple[int, int, int, int, int]


def read_folded(path: str) -> Recording:
    """Reads a whole recording. RecordingError if it is none or its header is bad."""
    with RecordingReader(path) as reader:
        folder = _Folder()
        for block in reader.blocks():
            if len(folder.kept) > MAX_EVENTS:
                reader.cut(f"it holds more than {MAX_EVENTS} events")
                break
            folder.take(block)
        return Recording(
            header=reader.header,
            events=folder.finish(),
            truncated=reader.truncated,
            reason=reader.reason,
            unknown=reader.unknown,
        )


class _Folder:
    """Takes blocks in order; folds each once it lies NEAR blocks back, unless a switchover is near."""

    def __init__(self) -> None:
        self.kept: list[AnyEvent] = []
        self._recent: deque[list[AnyEvent]] = deque()
        self._spared = 0
        """How many of the oldest waiting blocks, and of those to come, are to be left alone."""
        self._open: dict[Key, list[Transfer]] = {}

    def take(self, block: list[AnyEvent]) -> None:
        """The next block."""
        self._recent.append(block)
        if any(map(_of_the_switchover, {e.cmd for e in block if type(e) is Ioctl})):
            self._spared = len(self._recent) + NEAR
        if len(self._recent) > NEAR:
            self._leave(self._recent.popleft())

    def finish(self) -> list[AnyEvent]:
        """Everything; what is near the end is as it was."""
        self._close_all()
        for block in self._recent:
            self.kept += block
        return self.kept

    def _leave(self, block: list[AnyEvent]) -> None:
        if self._spared > 0:
            self._spared -= 1
            self._close_all()
            self.kept += block
            return
        kept, open_ = self.kept, self._open
        for event in block:
            kind = type(event)
            if kind is Transfer:
                key = (event.pid, event.tid, event.socket, event.direction, event.hidden)  # type: ignore[union-attr]
                run = open_.get(key)
                if run is None:
                    open_[key] = [event]  # type: ignore[list-item]
                else:
                    first, last = run[0], run[-1]
                    if (
                        event.end_ns - first.begin_ns <= RUN_NS  # type: ignore[union-attr]
                        and event.position == last.position + last.bytes  # type: ignore[union-attr]
                        and event.begin_ns >= last.end_ns > 0  # type: ignore[union-attr]
                    ):
                        run.append(event)  # type: ignore[arg-type]
                    else:
                        kept.append(run_of(run))
                        open_[key] = [event]  # type: ignore[list-item]
            else:
                if kind is Ioctl and open_:
                    self._close_all()  # a fetch ends a pass: what was sent before belongs to the one before
                kept.append(event)

    def _close_all(self) -> None:
        self.kept += map(run_of, self._open.values())
        self._open.clear()


@cache
def _of_the_switchover(cmd: int) -> bool:
    return kvm.name_of(cmd) in kvm.VCPU_STATE_GET | kvm.VCPU_STATE_SET


def run_of(calls: list[Transfer]) -> Transfer:
    """Calls of one thread on one socket, one after the other, as one run."""
    if len(calls) == 1:
        return calls[0]
    first, last = calls[0], calls[-1]
    known = all(call.off_cpu_ns >= 0 for call in calls)
    return Transfer(
        first.begin_ns,
        last.end_ns,
        first.pid,
        first.tid,
        first.fd,
        first.direction,
        first.socket,
        sum(call.calls for call in calls),
        sum(call.bytes for call in calls),
        sum(call.in_call_ns for call in calls),
        max(call.max_call_ns for call in calls),
        sum(call.failed for call in calls),
        first.position,
        sum(call.off_cpu_ns for call in calls) if known else -1,
        first.off_before_ns,
        first.hidden,
    )
