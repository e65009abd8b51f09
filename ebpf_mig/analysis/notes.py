# SPDX-License-Identifier: Apache-2.0
"""Notes of a breakdown: what the figures leave out, and what was taken for granted.

In: a `TracedMigration`, the window and the source's work in it. Out: sentences. Figures never depend on them.
"""

from __future__ import annotations

from collections import Counter

from ebpf_mig.analysis import outcome
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.source_work import Work
from ebpf_mig.breakdown import IMMEDIATE, Side, Span, SwitchoverKind


def gather(traced: TracedMigration, window: Span | None, work: Work | None) -> list[str]:
    """All notes, in order. `window` and `work` are None if there is no switchover."""
    notes = [*traced.notes, *traced.material.header.notes]
    if traced.nothing_seen and traced.switchover is None:
        notes.append("nothing of a migration was seen: the VM only ran while it was traced")
    if window is not None and traced.source is None:
        notes.append("the source was not traced: the window begins with the destination's first restore work")
        if outcome.booted(traced):
            notes.append("no state was seen to come in over a connection: the guest booted, or was loaded from a file")
    elif window is not None and traced.switchover is not None and traced.switchover.kind == SwitchoverKind.STOPPED:
        last = "first answer to the state" if traced.answered and traced.postcopy else "last event that was seen"
        notes.append(f"no vCPU was seen to start on the destination: the window ends with the {last}")
    if work is not None and work.coalesced:
        notes.append(
            "sends in the blackout were recorded as one batch: the boundary between memory and state is estimated"
        )
    if traced.bursts and traced.material.traced("brownout") and not (vcpus_accounted(traced) or traced.live_update):
        notes.append("the recording has no vCPU times outside KVM_RUN: the brownout is unknown")
    notes += _user_stacks(traced)
    notes += _unseen_sends(traced)
    notes += _spinning(traced)
    for side, process in ((Side.SOURCE, traced.source), (Side.DESTINATION, traced.destination)):
        if process is None or window is None:
            continue
        took = [
            (index, end - begin)
            for index, line in process.vcpus.items()
            for begin, end in line.immediate
            if window[0] <= begin <= window[1]
        ]
        if took:
            notes.append(_immediate_note(side, took))
    return notes


def _user_stacks(traced: TracedMigration) -> list[str]:
    """How complete the user half of the stacks is, and whether the programs keep frame pointers."""
    processes = [process for process in (traced.source, traced.destination) if process and process.user_stacks]
    stacks = [stack for process in processes for stack in process.user_stacks]
    if not stacks:
        return []
    cut = Counter(stack.end for stack in stacks if stack.end)
    why = "".join(f"; {count} end early ({end})" for end, count in sorted(cut.items()))
    programs = sorted({(m.path.rpartition("/")[2], m.frame_pointers) for p in processes for m in p.modules})
    without = [name for name, keeps in programs if keeps == 0]
    found = f"; by unwind tables, without frame pointers in {', '.join(without)}" if without else ""
    return [f"user half of {len(stacks)} stacks{found}{why}"]


def _unseen_sends(traced: TracedMigration) -> list[str]:
    """A note about sends without a traced system call: their bytes, or that such sends cannot be seen here."""
    hidden = sum(t.bytes for t in traced.sends if t.hidden)
    if hidden:
        return [
            f"{hidden} bytes were sent without a system call that is traced (e.g. by io_uring): their durations are "
            "unknown"
        ]
    blind = traced.source is not None and not traced.material.traced("hidden-sends")
    if blind and traced.bursts and not traced.sends:
        return ["no send was seen: sends by io_uring and the like cannot be traced on this kernel, RDMA on none"]
    return []


def _spinning(traced: TracedMigration) -> list[str]:
    """A note about a destination whose sender is gone: it keeps calling receive, and each call returns nothing."""
    empty = max((t.failed for t in traced.receives if not t.calls), default=0)
    if not empty:
        return []
    return [
        f"the destination's last {empty} receive calls returned nothing: the other end is gone, but it keeps calling"
    ]


def _immediate_note(side: str, took: list[tuple[int, int]]) -> str:
    """One line for all KVM_RUN calls that returned at once: (vCPU, ns inside)."""
    vcpus = sorted({index for index, _ in took})
    named = ", ".join(map(str, vcpus[:8])) + (f" and {len(vcpus) - 8} more" if len(vcpus) > 8 else "")
    longest = max(ns for _, ns in took) / 1000
    calls = f"{len(took)} KVM_RUN" + ("s" if len(took) > 1 else "")
    return f"{calls} of the {side}'s vCPU {named} returned -EINTR within {longest:.1f} us{IMMEDIATE}"


def vcpus_accounted(traced: TracedMigration) -> bool:
    """Whether the source's vCPU times outside KVM_RUN were recorded. A recording can list the signal and have none."""
    return traced.material.traced("brownout") and traced.source is not None and bool(traced.source.spans)
