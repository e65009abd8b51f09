# SPDX-License-Identifier: Apache-2.0
"""When a VMM executed a call of its API, and when it waited for the next one.

In: a process, what it did for a snapshot or a restore, and a span. Out: `Request`s, and the spans between them, which
become the phase `management`.

Cloud Hypervisor and Firecracker serve HTTP on a UNIX socket: a request is received, executed, and answered on the same
socket by the same thread. QEMU reads its monitor byte by byte (`management.monitors`), and answers `migrate` before the
work is done. So between QEMU's commands only the last wait counts, which `cont` ends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ebpf_mig.analysis import management
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.spans import FOREVER
from ebpf_mig.breakdown import Span
from ebpf_mig.recording.events import AF_UNIX, RECEIVE, SEND, Transfer

ASKED_BEFORE_NS = 1_000_000_000
"""A request to pause was received at most this long before the guest stopped."""
HTTP_LEAST_BYTES = 16
"""The shortest request line is longer. A console and a notification send a byte."""
HTTP_MOST_BYTES = 64 << 10
"""A request or an answer is shorter. A disk's or a display's socket carries more."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call of the API. Instants are absolute, in ns."""

    at: int
    """Its first byte was received."""
    answered: int
    """Its answer was sent; FOREVER if that was not seen."""
    waits: bool
    """Whether the answer comes only when the work is done."""


def of(process: Process, since: int, until: int, carriers: Collection[int] = ()) -> list[Request]:
    """The requests that arrived in [since, until), in order. `carriers`: what carries the memory."""
    monitors = management.monitors(process, carriers)
    found = [Request(c.at, c.answered, False) for c in management.commands(process, monitors, since, until)]
    for (direction, key), received in process.streams.items():
        known = process.sockets.get(key)
        if direction != RECEIVE or known is None or known.family != AF_UNIX or key in carriers or key in monitors:
            continue
        sent = process.streams.get((SEND, key), [])
        if _is_http(received, sent):
            found += [one for one in _calls(received, sent) if since <= one.at < until]
    return sorted(found, key=lambda one: (one.at, one.answered))


def _is_http(received: Sequence[Transfer], sent: Sequence[Transfer]) -> bool:
    """Whether one thread takes requests there and answers them: it receives first, and little."""
    if not received or not sent or sent[0].begin_ns < received[0].end_ns:
        return False
    if {t.tid for t in received} != {t.tid for t in sent}:
        return False
    sizes = [sum(t.bytes for t in received), sum(t.bytes for t in sent)]
    return min(sizes) >= HTTP_LEAST_BYTES and max(t.bytes for t in (*received, *sent)) <= HTTP_MOST_BYTES


def _calls(received: Sequence[Transfer], sent: Sequence[Transfer]) -> Iterable[Request]:
    answered = 0
    for one in received:
        if not one.bytes or one.end_ns < answered:
            continue
        answered = next((t.end_ns for t in sent if t.begin_ns >= one.end_ns), FOREVER)
        yield Request(one.end_ns if one.calls == 1 else one.begin_ns, answered, True)


def waits(acts: Iterable[Span], requests: Sequence[Request], since: int, until: int) -> list[Span]:
    """When the VMM waited for a request between its acts, in order. `acts` may overlap; `until` ends the last wait.

    A wait begins when the last act has ended and the request that it belongs to was answered. It ends with the first
    byte of the last request before the next act; those before it only asked for something.
    """
    found: list[Span] = []
    busy = since
    steps = sorted((begin, end) for begin, end in acts if since <= begin < until)
    for begin, end in [*steps, (until, until)]:
        last = begin == until
        ready = max([busy, *(r.answered for r in requests if r.waits and r.at < busy and r.answered < FOREVER)])
        came = [r.at for r in requests if ready <= r.at <= begin and (r.waits or last)]
        if came and came[-1] > ready:
            found.append((ready, came[-1]))
        busy = max(busy, end)
    return found
