# SPDX-License-Identifier: Apache-2.0
"""Rows about the network between the hosts, and the longest waits.

In: a breakdown. Out: rows; the detail of each socket is marked for `-v`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ebpf_mig.analysis.diagnosis.frames import described
from ebpf_mig.breakdown import Breakdown, PhaseName, SocketUse
from ebpf_mig.report import text_fetch
from ebpf_mig.report.rows import Row, ms
from ebpf_mig.text import printable, size

MAX_SOCKETS = 4
MAX_WAITS = 2
_BLOCKED_NS = 100_000
"""Shorter sleeps in sends are not worth a word."""
_MUCH = 20
"""What was in flight for a twentieth of the window is shown."""
_FOR_DATA = ("sk_wait_data", "do_sys_poll", "unix_stream_", "pipe_read")
"""A destination that sleeps there in the handover waits for data: the network's row says more."""
_READ_LATE = "late reader"


def network(b: Breakdown) -> Iterator[Row]:
    """Whether the source was held up, and what was longest in flight; then each socket."""
    carriers = [use for use in b.sockets if not use.role.endswith("control")]
    source = [use for use in carriers if use.role.startswith("source")]
    words = list(filter(None, (_held_up(source), _in_flight(b, _said(b)))))
    words += [said for use in source if (said := text_fetch.tcp(use.tcp_info))]
    if words:
        yield Row("network", "; ".join(words))
    for use in carriers[:MAX_SOCKETS]:
        inside = f"in calls {ms(use.in_call_ns)} ms"
        if use.copy_ns is not None and use.blocked_ns is not None:
            inside = f"copying {ms(use.copy_ns)} ms, blocked {ms(use.blocked_ns)} ms"
        calls = f"{use.calls} call{'s' if use.calls != 1 else ''}"
        text = f"{_named(use.role)}: {size(use.bytes)} in {calls}, {inside}, between them {ms(use.between_ns)} ms"
        yield Row("socket", text, verbose=True)
    if len(carriers) > MAX_SOCKETS:
        yield Row("", f"{len(carriers) - MAX_SOCKETS} more sockets", verbose=True)


def hops(b: Breakdown) -> Iterator[Row]:
    """What each process on the way added to the last byte."""
    for at, hop in enumerate(b.hops or []):
        parts = f"read it after {ms(hop.unread_ns)}, then held it for {ms(hop.held_ns)}"
        text = f"{printable(hop.process)} {hop.pid} delayed the last byte by {ms(hop.delay_ns)} ms: {parts}"
        yield Row("" if at else "on the way", text)


def _named(role: str) -> str:
    """`source's migration socket` for the role `source migration`."""
    side, _, what = role.partition(" ")
    return f"{printable(side)}'s {printable(what)} socket" if what else f"{printable(role)} socket"


def _held_up(source: list[SocketUse]) -> str:
    if not source:
        return ""
    if any(use.blocked_ns is None for use in source):
        return f"source in send calls for {ms(sum(use.in_call_ns for use in source))} ms"
    blocked = sum(use.blocked_ns or 0 for use in source)
    return "source never blocked" if blocked < _BLOCKED_NS else f"source blocked in sends for {ms(blocked)} ms"


def _said(b: Breakdown) -> str:
    """The evidence that the diagnosis prints."""
    return " ".join(line for cause in (b.diagnosis.because[:1] if b.diagnosis else ()) for line in cause.evidence)


def _in_flight(b: Breakdown, said: str) -> str:
    rows = [wire for wire in b.wire or [] if wire.in_flight_ns * _MUCH >= (b.window_ns or 0)]
    if not rows:
        return ""
    longest = max(rows, key=lambda wire: wire.in_flight_ns)
    what = size(longest.bytes) + (f" of {printable(longest.message)}" if longest.message else "")
    if longest.reason == _READ_LATE:
        text = f"destination read late: {what} had arrived, and lay unread"
    else:
        text = f"{what} in flight for {ms(longest.in_flight_ns)} ms"
        if longest.evidence in said:
            return f"{text}: {printable(longest.reason)}"
        return f"{text}: {printable(longest.reason)} ({printable(longest.evidence, 400)})"
    return f"{text} for up to {ms(longest.in_flight_ns)} ms"


def waits(b: Breakdown) -> Iterator[Row]:
    """The longest waits that the diagnosis has not named; with `-v` all that were kept."""
    said = _said(b)
    groups: dict[tuple[str, str, str], list[int]] = {}
    for wait in b.waits or []:
        groups.setdefault((wait.phase, wait.thread, described(wait.stack, wait.user_stack)), []).append(
            wait.duration_ns
        )
    ordered = sorted(groups.items(), key=lambda item: (-sum(item[1]), item[0]))
    shown = 0
    for (phase, thread, place), durations in ordered:
        new = f"of {thread} in {place}" not in said and f"of {thread} {place}" not in said
        idle = phase == PhaseName.HANDOVER and place.startswith(_FOR_DATA)
        plain = new and not idle and not (phase == PhaseName.RESUME and place == "futex_wait")
        plain = plain and sum(durations) * _MUCH >= (b.window_ns or 0) and shown < MAX_WAITS
        shown += plain
        times = f" in {len(durations)} sleeps" if len(durations) > 1 else ""
        where = f" {'' if place.startswith('(') else 'in '}{printable(place)}" if place else ", no stack"
        yield Row("also waited", f"{phase}: {printable(thread)}{where}, {ms(sum(durations))} ms{times}",
                  verbose=not plain, spare=4)  # fmt: skip
