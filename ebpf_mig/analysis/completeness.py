# SPDX-License-Identifier: Apache-2.0
"""The completeness verdict: how far the result can be relied upon.

In: the recording's header and ending, the two sides, the window, the source's sends, our own cost. Out: the
`Completeness`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ebpf_mig.analysis import own_time
from ebpf_mig.analysis.material import Material
from ebpf_mig.analysis.own_cost import OwnCost
from ebpf_mig.analysis.process import Process
from ebpf_mig.breakdown import Completeness, TracingCost, Verdict
from ebpf_mig.recording.events import RECURSION_MISSES, Transfer
from ebpf_mig.recording.kinds import MISSED_RETURN

ESSENTIAL = frozenset({"dirty-log", "vcpu", "state", "kick", "socket"})
"""Signals that the phases need. The other signals only add detail."""
_OF_FILES = ("on_io_uring_", "on_aio_")
"""Programs that see files only (bpf/uring.bpf.c, bpf/aio_sync.bpf.c)."""


def completeness(
    material: Material,
    source: Process | None,
    destination: Process | None,
    window: tuple[int, int] | None,
    sends: Sequence[Transfer],
    cost: OwnCost,
    tracing: TracingCost | None = None,
    *,
    alone: bool = False,
    loaded_again: bool = False,
    through_files: bool = False,
) -> Completeness:
    """The verdict and its reasons. `sends` are the source's sends for the migration. `alone`: it has one side only, as
    a snapshot after which the guest runs on, or a restore. `loaded_again`: nothing had to be sent. `through_files`:
    what the VMM does with files is part of it, and not only what its guest does with disks."""
    ending = material.ending
    lost = {name: count for name, count in sorted((ending.lost if ending else {}).items()) if count}
    holes: list[str] = []
    bounds: list[str] = []
    if material.truncated or ending is None:
        holes.append("the recording was cut off: events at its end, and the counts of losses, are missing")
    missed = dict(ending.missed_runs) if ending else {}
    of_disks = 0 if through_files else sum(missed.pop(name) for name in [*missed] if name.startswith(_OF_FILES))
    counts = {name: count - (of_disks if name == RECURSION_MISSES else 0) for name, count in lost.items()}
    holes += [_loss(name, count, missed) for name, count in counts.items() if count > 0]
    if material.unknown:
        holes.append(f"{material.unknown} events of a kind that this version does not know were left out")
    if source is None and not alone:
        bounds.append("the source was not traced: pause, fetch and sending are unknown")
    if destination is None and not alone:
        bounds.append("the destination was not traced: the blackout's end is unknown")
    bounds += [_silent(process) for process in material.processes.values() if process.target and not process.was_seen]
    for signal, tier in sorted(material.header.attach.items()):
        if tier.startswith("absent") and signal in ESSENTIAL:
            bounds.append(f"{signal} was not traced: {tier.removeprefix('absent').lstrip(': ') or 'absent'}")
    inherited = destination is not None and destination.born is not None  # the state may lie in memory, or in a file
    if source is not None and window is not None and not sends and not inherited and not loaded_again:
        bounds.append(_no_carrier(material))
    return Completeness(
        verdict=Verdict.INCOMPLETE if holes else Verdict.BOUNDED if bounds else Verdict.COMPLETE,
        lost=lost if ending else None,
        unpaired=dict(sorted(ending.unpaired.items())) if ending else None,
        attach=dict(sorted(material.header.attach.items())),
        observer_ns=sum(ending.observer_ns.values()) if ending and ending.observer_ns else own_time.in_all(material),
        reasons=holes + bounds,
        observer_window_ns=cost.most,
        observer_window_least_ns=cost.least,
        observer_window_estimate_ns=cost.estimate,
        observer_phases_ns=cost.phases,
        tracing=tracing,
    )


def _no_carrier(material: Material) -> str:
    unseen = [f"a {kind}" for kind in ("pipe", "file", "vsock") if not material.traced(kind)]
    return (
        f"no send of the migration was recognised: its carrier is unknown ({', '.join([*unseen, 'RDMA'])}), and the "
        "source's sending phases have no time"
    )


def _silent(process: Process) -> str:
    assert process.target is not None  # noqa: S101 - asked before
    return f"no event of process {process.pid} ({process.target.role}) was seen: does it run a KVM VM on this host?"


def _loss(name: str, count: int, missed: Mapping[str, int]) -> str:
    if name == RECURSION_MISSES:
        which = "".join(["recursion_misses", *(f"; {program}: {n}" for program, n in sorted(missed.items()))])
        return f"the kernel skipped {count} runs of our BPF programs ({which}): some calls may have no event"
    if name == MISSED_RETURN[1]:
        return (
            f"the return of {count} calls was not seen, so they have no event: the kernel has few return probes "
            "(kretprobes), and sleeping calls of any process occupy them; leave --tier out, or use --tier tracepoint"
        )
    return f"{count} events of {name} were lost in the kernel"
