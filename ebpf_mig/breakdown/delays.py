# SPDX-License-Identifier: Apache-2.0
"""The part of the breakdown on what held the VMM up: the stop of the vCPUs, waits, throttling, a live update's start.

In: nothing. Out: frozen structs. The conventions are those of the package, which exports them all.
"""

from __future__ import annotations

from msgspec import field

from ebpf_mig.breakdown.vocabulary import PhaseName, Side, Struct


class Pausing(Struct, frozen=True, kw_only=True):
    """The stop of the vCPUs, as the thread that asked for it saw it."""

    stop_ns: int
    """From the pause request to the last vCPU's stop, ns."""
    noticed_ns: int
    """From there to the next call of that thread, ns: the thread notices the stop only then."""
    naps: int | None
    """Number of times that it slept between its request and that call; null: not measured."""
    asleep_ns: int | None
    """The part of `noticed_ns` that it slept, ns; null: not measured."""
    polling: bool | None
    """Whether it slept on a timer, so that nothing wakes it when the vCPUs have stopped; null: not measured."""
    kicked_late_ns: int | None
    """How long it had lost the CPU right before its request, and so before the window, ns; null: not measured."""


class ManagerWait(Struct, frozen=True, kw_only=True):
    """The VMM was ready, and waited for its manager to tell it to go on. All of them are the phase `management`."""

    side: Side
    """Whose VMM waited."""
    begin: int
    """When it was ready, ns from the window's begin."""
    duration_ns: int
    """Until the first byte of the command that ended the wait arrived, ns."""
    commands: int
    """Number of commands that arrived, the last included; others are questions, such as `query-migrate`."""


class Throttled(Struct, frozen=True, kw_only=True):
    """Stretches before the pause request in which no vCPU ran because the VMM kept them out, to slow the guest down
    (auto-converge, dirty limit). The guest was dark, but this is no part of the switchover, nor of the blackout."""

    dark_ns: int
    """All stretches of a millisecond or more together, ns."""
    stretches: int
    """Number of those stretches."""
    longest_ns: int
    """The longest of them, ns."""
    before_request_ns: int
    """The part from the last vCPU's stop to the pause request, ns; 0 if a vCPU was running then."""


class Wait(Struct, frozen=True, kw_only=True, omit_defaults=True):
    phase: PhaseName
    """The phase that the wait overlaps most."""
    thread: str
    """Name and tid."""
    duration_ns: int
    """The part in that phase, ns."""
    stack: list[str]
    """Kernel functions that it slept in, innermost first. If it could run and did not: `(CPU quota)`, `(CPU stolen)`,
    `(real-time throttling)`, `(preempted)`, or after a sleep `(waits for a CPU)`, where that is proven; else
    `(runnable, not running)`."""
    user_stack: list[str] = field(default_factory=list)
    """The VMM's own functions that led there, innermost first; only in recordings made with `--user-stacks`. The last
    item is in parentheses if frames are missing."""


class Stolen(Struct, frozen=True, kw_only=True):
    """CPU time that a hypervisor below the host withheld around the window (steal in /proc/stat)."""

    side: Side
    """Whose host: `both` if both VMMs run there."""
    cpu: int
    """The number of the CPU."""
    stolen_ns: int
    """In whole ticks of the kernel's clock, mostly 10 ms, so that less than one is not seen, ns."""
    between_ns: int
    """Time between the readings before and after the window, ns."""


class LiveUpdate(Struct, frozen=True, kw_only=True):
    descriptors: int | None
    """Number of descriptors that the old process passed to the new one (SCM_RIGHTS); null: the source was not traced,
    or the process replaced itself, and the descriptors were inherited."""
    setup_ns: int | None
    """The part of the phase `startup` inside KVM's ioctls, of all threads together, ns; null: there was no start-up."""
    slowest: str = ""
    """The slowest kind of these ioctls; empty: there was none."""
    slowest_ns: int = 0
    """Time in that kind, ns."""
