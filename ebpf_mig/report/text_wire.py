# SPDX-License-Identifier: Apache-2.0
"""The terminal report's rows about sockets, what was in flight between the hosts, and the longest waits.

In: a breakdown. Out: rows; optional rows have `spare` set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.text import Text

from ebpf_mig.breakdown import Breakdown, SocketUse, Wait
from ebpf_mig.report import text_fetch
from ebpf_mig.report.rows import Row, figure, ms
from ebpf_mig.text import printable, size

MAX_SOCKETS = 4
MAX_WAITS = 2
_STACK_ROOM = 34
_EVIDENCE_ROOM = 84
"""Two lines of 80 columns."""

_MUCH = 5
"""What was in flight for a fifth of the window is never left out."""


def sockets(uses: list[SocketUse]) -> Iterator[Row]:
    """Those that carried memory and state; the others are in the JSON report."""
    carriers = [use for use in uses if not use.role.endswith("control")]
    for at, use in enumerate(carriers[:MAX_SOCKETS]):
        inside = f"inside {ms(use.in_call_ns)}"
        if use.copy_ns is not None and use.blocked_ns is not None:
            inside = f"copy {ms(use.copy_ns)}, blocked {ms(use.blocked_ns)}"
        calls = f"{use.calls} call{'s' if use.calls != 1 else ''}"
        text = f"{size(use.bytes)} in {calls}: {inside}, between {ms(use.between_ns)}{text_fetch.tcp(use.tcp_info)}"
        if use.role.startswith("destination"):
            text = f"{size(use.bytes)}: {inside}"
        yield figure(use.role, use.in_call_ns + use.between_ns, text)._replace(
            spare=3 if use.role.startswith("dest") else 2 * int(at > 0)
        )
    if len(carriers) > MAX_SOCKETS:
        yield Row(Text(f"... {len(carriers) - MAX_SOCKETS} more sockets", "dim"))


def in_flight(breakdown: Breakdown) -> Iterator[Row]:
    """The longest stretch on the wire, if it matters, and the longest waits, where they were measured."""
    share = (breakdown.window_ns or 0) // 20
    long = [wire for wire in breakdown.wire or [] if wire.in_flight_ns >= share]
    for wire in sorted(long, key=lambda w: -w.in_flight_ns)[:1]:
        what = f"{size(wire.bytes)}{f' of {wire.message}' * bool(wire.message)}, {printable(wire.reason)}"
        why = _short(printable(wire.evidence), _EVIDENCE_ROOM - len(what))
        much = wire.in_flight_ns >= (breakdown.window_ns or 0) // _MUCH
        yield figure("in flight", wire.in_flight_ns, f"{what} ({why})")._replace(spare=0 if much else 2)
    waits: dict[tuple[str, str, str], list[int]] = {}
    for wait in breakdown.waits or []:
        waits.setdefault((wait.phase, wait.thread, _stack(wait)), []).append(wait.duration_ns)
    longest = sorted(waits.items(), key=lambda w: (-sum(w[1]), w[0]))[:MAX_WAITS]
    for at, ((phase, thread, stack), durations) in enumerate(longest):
        times = f" ({len(durations)} times)" if len(durations) > 1 else ""
        yield figure(
            f"wait in {phase}", sum(durations), f"{printable(thread)}{times}" + (f": {stack}" if stack else "")
        )._replace(spare=4 if at else 1)


def _short(text: str, room: int) -> str:
    """As many clauses as fit; always the first."""
    clauses = re.split(r"(?<=[,;]) ", text)
    shown = clauses[0]
    for clause in clauses[1:]:
        if len(shown) + 1 + len(clause) > room:
            break
        shown += f" {clause}"
    return shown.rstrip(",;")


def _stack(wait: Wait) -> str:
    """The innermost functions except the scheduler's, as many as fit on the line beside the thread's name."""
    frames = [frame for frame in wait.stack if not frame.startswith("schedule")] or wait.stack
    shown = ""
    for frame in frames[:3]:
        name = printable(frame).split(".")[0]
        longer = f"{shown} < {name}" if shown else name
        if shown and len(longer) + len(wait.thread) > _STACK_ROOM:
            break
        shown = longer
    return shown
