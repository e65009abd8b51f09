# SPDX-License-Identifier: Apache-2.0
"""The part of the breakdown on the network: the migration's sockets, bytes in flight, pages served in postcopy.

In: nothing. Out: frozen structs. The conventions are those of the package, which exports them all.
"""

from __future__ import annotations

from ebpf_mig.breakdown.vocabulary import Struct


class SocketUse(Struct, frozen=True, kw_only=True):
    role: str
    """migration or control, with the side: `source migration`."""
    bytes: int
    """Amount moved in the window, bytes."""
    calls: int
    """Number of calls."""
    copy_ns: int | None
    """Inside the calls, on the CPU, ns; null: not measured."""
    blocked_ns: int | None
    """Inside the calls, off the CPU, ns; null: not measured."""
    between_ns: int
    """Between the calls, ns."""
    in_call_ns: int
    """copy + blocked, ns; known even where the two cannot be separated."""
    local: str = ""
    """Own address and port; empty: unknown, or a UNIX socket."""
    remote: str = ""
    """The other end's address and port; empty: unknown, or a UNIX socket."""
    tcp_info: dict[str, int] | None = None
    """TCP's own account between two readings around the window: `busy_us`, `rwnd_limited_us`, `sndbuf_limited_us`
    (us, counted in jiffies: `resolution_us`), `retransmits` (number), `bytes_retrans` (bytes); `from` and `until`, the
    instants of the readings (ns); as last read `rtt_us` (us), `cwnd` (number of segments), `mss` and `queued` (bytes).
    Null: not measured."""


class Wire(Struct, frozen=True, kw_only=True):
    bytes: int
    """Number of bytes."""
    sent: int
    """When it had been sent, ns from the window's begin."""
    received: int
    """When it was received, ns from the window's begin."""
    in_flight_ns: int
    """From `sent` to `received`, ns."""
    reason: str
    """Why it took so long, by the kernel's events."""
    evidence: str
    """The events that show the reason."""
    bound_ns: int | None = 0
    """Error bound of `in_flight_ns`, as `Phase.bound_ns`, ns."""
    message: str = ""
    """What the bytes were: `pages`, `state`, or `state and pages` where pages follow on the same connection
    (postcopy); empty if the source's work is unknown."""


class Hop(Struct, frozen=True, kw_only=True):
    """A process on this host that passed the migration's bytes on, and when it did so with the last byte."""

    process: str
    """Its name."""
    pid: int
    """Process id on its host."""
    sent: int
    """When the process before it had sent the last byte, ns from the window's begin."""
    unread_ns: int
    """From there until this process had read it, ns."""
    held_ns: int
    """From there until this process had sent it, ns."""
    delay_ns: int
    """unread + held: what it added to the last byte's way, ns."""


class Served(Struct, frozen=True, kw_only=True):
    """What a destination received in postcopy during a span of time; approximate where calls were coalesced."""

    bytes: int
    """Amount received, bytes."""
    asked: int
    """Number of send calls that requested pages."""
    waited_ns: int | None
    """Time that its threads were off the CPU in receive calls, sum over all threads, ns; null: not measured."""


class Postcopy(Struct, frozen=True, kw_only=True):
    while_dark: Served | None
    """Pages that it needed to restore the VM before the start; null: pages have no connection of their own."""
    after: Served
    """What it received after the start."""
    drained_ns: int
    """From the start to the last byte received, ns."""
