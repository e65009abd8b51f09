# SPDX-License-Identifier: Apache-2.0
"""The part of the event model on ourselves: what our BPF programs and our process take.

In: nothing. Out: structs. The conventions are those of `events.py`, which exports them all.
"""

from __future__ import annotations

from ebpf_mig.recording.fields import Count, Duration, Event, Instant, MaybeCpu


class OwnCost(Event, frozen=True, tag=17):
    """Run time of our BPF programs since tracing began, from the kernel's statistics."""

    at_ns: Instant
    run_ns: Duration
    runs: Count
    remote: bool = False
    """Of the other host, in a joined recording."""


class OwnRuns(Event, frozen=True, tag=26):
    """Runs of our BPF programs on one CPU since tracing began, as the programs themselves measure and count them."""

    since_ns: Instant
    """Begin of the first run for a traced process after the previous such event of this CPU."""
    until_ns: Instant
    """End of the last."""
    at_ns: Instant
    """When the sums were taken: the begin of the next run for a traced process."""
    cpu: MaybeCpu
    run_ns: Duration
    """Time in runs for traced processes, from their first time stamp to their last."""
    runs: Count
    """Runs for traced processes."""
    calls: Count
    """Their system calls, if a program sees these."""
    other_runs: Count
    """Runs for all other processes. They end after their first test."""
    other_calls: Count
    """Their system calls, if a program sees these."""
    remote: bool = False
    """Of the other host, in a joined recording."""


class OwnRates(Event, frozen=True, tag=28):
    """What tracing takes where our programs take no time stamp, measured right after they were attached."""

    at_ns: Instant
    run_ns: Duration
    """A run for a process that is not traced (kernel's run statistics); each run has this part."""
    call_ns: Duration
    """What a system call of such a process takes longer, its two runs included. 0: no program sees system calls."""
    remote: bool = False
    """Of the other host, in a joined recording."""


class OwnTurn(Event, frozen=True, tag=29):
    """A thread of the recording process had a CPU."""

    begin_ns: Instant
    end_ns: Instant
    cpu: MaybeCpu
    remote: bool = False
    """Of the other host, in a joined recording."""
