# SPDX-License-Identifier: Apache-2.0
"""The part of the breakdown that says how far it can be trusted: what the recording lacks, and what tracing took.

In: nothing. Out: frozen structs. The conventions are those of the package, which exports them all.
"""

from __future__ import annotations

from ebpf_mig.breakdown.vocabulary import Struct, Verdict


class PhaseCost(Struct, frozen=True, kw_only=True):
    """What tracing took in one phase, in CPU time of all CPUs of the hosts."""

    programs_ns: int
    """Our BPF programs, ns."""
    calls_ns: int
    """System calls, which take longer in the kernel as soon as a program listens to them, ns."""
    process_ns: int | None
    """The process that records, ns; null: not measured."""


class TracingCost(Struct, frozen=True, kw_only=True):
    """What tracing took in the window, in CPU time of all CPUs of the hosts."""

    programs_ns: int
    """Our BPF programs, ns."""
    calls_ns: int
    """System calls, which take longer in the kernel as soon as a program listens to them, ns."""
    process_ns: int | None
    """The process that records, ns; null: not measured."""
    doubt_ns: int
    """How much of programs and calls may belong to the time right before or after the window, ns."""
    phases: dict[str, PhaseCost]
    """By phase."""


class Completeness(Struct, frozen=True, kw_only=True):
    verdict: Verdict
    """How reliable the result is."""
    lost: dict[str, int] | None
    """Number of events lost in the kernel, by probe; null: the recording was cut off before the counts."""
    unpaired: dict[str, int] | None
    """Number of unpaired events, e.g. exits without an entry, by probe; harmless. Null: as `lost`."""
    attach: dict[str, str]
    """By signal, how it was traced: `fentry`, `kprobe`, `tracepoint`, or `absent` and why."""
    observer_ns: int | None
    """Run time of our BPF programs, over the whole recording and all threads of the hosts, ns; null: not measured."""
    reasons: list[str]
    """Why the verdict is not `complete`, one line each."""
    observer_window_ns: int | None = None
    """In the window, at most, ns; null: not measured. By `tracing` and its doubt. In recordings without it: from the
    last reading before the window to the first after it, and no more than all CPUs had where their number is known."""
    observer_window_least_ns: int | None = None
    """At least, ns; null: not measured. In recordings without `tracing`: between the first and the last reading
    in it."""
    observer_window_estimate_ns: int | None = None
    """Most likely, ns; null: not measured. In recordings without `tracing`: what ran between two readings, shared
    out by the calls seen and by time."""
    observer_phases_ns: dict[str, int] | None = None
    """The estimate by phase, ns; null: not measured."""
    tracing: TracingCost | None = None
    """What tracing took in the window, measured by the programs themselves; null: not recorded."""
