# SPDX-License-Identifier: Apache-2.0
"""When each vCPU ran guest code, from the recorded KVM_RUN calls.

In: the vCPU events and kicks of one thread. Out: its gaps, the stretches in which it ran no guest code.

Only entries after a gap, error returns and the last state are recorded. So a vCPU counts as running between two gaps,
although it left KVM_RUN for moments that are too short to be recorded.

A KVM_RUN that returns -EINTR immediately has run no guest code and does not end a gap. QEMU enters once while the
signal of a past kick is still pending (accel/kvm/kvm-all.c, `kvm_cpu_kick_self` and `resume_all_vcpus`). Cloud
Hypervisor enters with `immediate_exit` to finish a pending access (vmm/src/cpu.rs, `start_vcpu`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ebpf_mig.analysis.spans import any_in
from ebpf_mig.recording.events import VcpuEnter, VcpuExit, VcpuState

EINTR = -4
IMMEDIATE_NS = 1_000_000
"""The longest KVM_RUN that can count as an immediate -EINTR, without the time for which its thread was preempted. The
longest seen was 122 us."""

_IN, _OUT = 0, 1


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch without guest code. `begin` is None if the vCPU was not seen before it, `end` if not after it."""

    begin: int | None
    end: int | None
    entry: int | None
    """The last known entry into KVM_RUN before the gap."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """One vCPU thread."""

    tid: int
    gaps: tuple[Gap, ...]
    immediate: tuple[tuple[int, int], ...]
    """The KVM_RUN calls that count as having run no guest code: (entry, exit)."""

    @property
    def ran(self) -> bool:
        """Whether the vCPU was ever seen to run guest code."""
        return any(gap.begin is not None or gap.end is not None for gap in self.gaps)

    @property
    def first_run(self) -> int | None:
        """Entry of the first call that ran guest code; None if the vCPU already ran before tracing, or never ran."""
        return self.gaps[0].end if self.gaps and self.gaps[0].begin is None else None

    @property
    def ran_before(self) -> bool:
        """Whether the vCPU had been in KVM_RUN before its first gap, i.e. it ran before or when tracing began."""
        return bool(self.gaps) and self.gaps[0].begin is not None

    def covering(self, at: int) -> Gap | None:
        """The gap that contains the instant `at`."""
        lo, hi = 0, len(self.gaps)
        while lo < hi:
            mid = (lo + hi) // 2
            end = self.gaps[mid].end
            if end is not None and end <= at:
                lo = mid + 1
            else:
                hi = mid
        if lo == len(self.gaps):
            return None
        begin = self.gaps[lo].begin
        return self.gaps[lo] if begin is None or begin <= at else None

    def start_after(self, at: int) -> int | None:
        """Entry of the first guest-running call at or after `at` that ends a gap."""
        return next((gap.end for gap in self.gaps if gap.end is not None and gap.end >= at), None)


def build(
    tid: int,
    enters: Iterable[VcpuEnter],
    exits: Iterable[VcpuExit],
    states: Iterable[VcpuState],
    kicks: Sequence[int],
) -> Timeline:
    """The timeline of one thread. `kicks` are the instants at which it was kicked, in order."""
    ins: set[int] = set()
    outs: dict[int, int] = {}
    preempted: dict[int, int] = {}
    for enter in enters:
        ins.add(enter.at_ns)
        if 0 < enter.last_exit_ns < enter.at_ns:
            outs[enter.last_exit_ns] = min(enter.last_ret, outs.get(enter.last_exit_ns, 0))
    for exit_ in exits:
        outs[exit_.at_ns] = min(exit_.ret, outs.get(exit_.at_ns, 0))
        if 0 < exit_.enter_ns <= exit_.at_ns:
            ins.add(exit_.enter_ns)
            preempted[exit_.at_ns] = max(0, exit_.preempted_ns)
    for state in states:
        if state.enter_ns > 0:
            ins.add(state.enter_ns)
        if state.exit_ns > 0:
            outs[state.exit_ns] = min(state.ret, outs.get(state.exit_ns, 0))
    points = sorted([(at, _IN, 0) for at in ins] + [(at, _OUT, ret) for at, ret in outs.items()])
    return _walk(tid, points, kicks, preempted)


def _walk(
    tid: int, points: Sequence[tuple[int, int, int]], kicks: Sequence[int], preempted: Mapping[int, int]
) -> Timeline:
    """`preempted`: by the instant of a return, how long the thread was preempted in that call."""
    gaps: list[Gap] = []
    immediate: list[tuple[int, int]] = []
    outside = True
    left: int | None = None
    entry: int | None = None
    for at, kind, ret in points:
        if kind == _IN:
            if outside:
                gaps.append(Gap(left, at, entry))
                outside = False
            entry = at
            continue
        if (
            not outside
            and entry is not None
            and gaps
            and gaps[-1].end == entry
            and ret == EINTR
            and at - entry - preempted.get(at, 0) <= IMMEDIATE_NS
            # A kick inside the call means that the call ran until then. An earlier kick was pending at entry.
            and not any_in(kicks, entry + 1, at + 1)
        ):
            immediate.append((entry, at))
            before = gaps.pop()
            left, entry = before.begin, before.entry
        else:
            # Two exits in a row: the entry between them followed the first too soon to be recorded.
            left = at
        outside = True
    if outside and points:
        gaps.append(Gap(left, None, entry))
    return Timeline(tid, tuple(gaps), tuple(immediate))


def common(timelines: Sequence[Timeline]) -> list[tuple[int, int | None]]:
    """The stretches in which no vCPU ran, in order: (last stop, first re-entry or None).

    vCPUs that were never seen to run are left out, and so are stretches without a known begin.
    """
    lists = [timeline.gaps for timeline in timelines if timeline.ran]
    if not lists:
        return []
    rest: list[Sequence[tuple[int | None, int | None]]] = [[(gap.begin, gap.end) for gap in gaps] for gaps in lists]
    while len(rest) > 1:  # In pairs: one after the other would take time quadratic in the number of vCPUs.
        pairs = zip(rest[::2], rest[1::2], strict=False)
        rest = [_intersect(left, right) for left, right in pairs] + rest[len(rest) & ~1 :]
    current = rest[0]
    return [(begin, end) for begin, end in current if begin is not None]


def _intersect(
    left: Sequence[tuple[int | None, int | None]], right: Sequence[tuple[int | None, int | None]]
) -> list[tuple[int | None, int | None]]:
    result: list[tuple[int | None, int | None]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        (a_begin, a_end), (b_begin, b_end) = left[i], right[j]
        begins = [begin for begin in (a_begin, b_begin) if begin is not None]
        ends = [end for end in (a_end, b_end) if end is not None]
        begin = max(begins) if begins else None
        end = min(ends) if ends else None
        if begin is None or end is None or begin < end:
            result.append((begin, end))
        if a_end is not None and (b_end is None or a_end <= b_end):
            i += 1
        elif b_end is not None:
            j += 1
        else:
            break
    return result
