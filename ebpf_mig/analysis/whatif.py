# SPDX-License-Identifier: Apache-2.0
"""What the blackout would have been, had the final fetch cost less, re-arming been skipped, or the link been faster.

In: an `Analysis` and wishes. Out: a `WhatIf` with the effect of each wish and the
assumptions. A prediction takes away from the measured blackout or adds to it; it is never built up from a model
alone, so that effects that no model covers stay in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ebpf_mig.analysis import bandwidth as link
from ebpf_mig.analysis.bandwidth import LinkUse
from ebpf_mig.analysis.result import Analysis
from ebpf_mig.analysis.spans import merged, overlap, total
from ebpf_mig.breakdown import Breakdown, Change, DirtyLogMode, FetchIoctl, PhaseName, Result, Span, WhatIf
from ebpf_mig.errors import UsageError

PAYLOAD = Fraction(1448, 1538)
"""Of an Ethernet link's bits with an MTU of 1500: preamble, header, checksum and gap take 38 bytes, IPv4 and TCP with
timestamps 52 (IEEE 802.3; RFC 791, 9293, 7323)."""
_RE_ARMS = ("CLEAR_DIRTY_LOG", "RESET_DIRTY_RINGS")


@dataclass(frozen=True, slots=True)
class Wishes:
    """The conditions to change; None: unchanged."""

    bandwidth: int | None = None
    """Of the link, bytes a second."""
    fetch: Fraction | None = None
    """Of the final fetch's time, what is left."""
    rearm: Fraction | None = None
    """Of the time for write-protecting pages anew in the final fetch, what is left."""
    said: tuple[tuple[str, str], ...] = ()
    """(name, as the user wrote it)."""

    def text(self, name: str) -> str:
        """The wish as it was written."""
        return dict(self.said).get(name, name)


def predict(analysis: Analysis, wishes: Wishes) -> WhatIf:
    """The blackout under `wishes`. UsageError if there is no blackout of a completed migration."""
    b, origin = analysis.breakdown, analysis.origin_ns
    if b.blackout_ns is None or b.migration.result != Result.COMPLETED:
        raise UsageError("there is no blackout of a completed migration to reckon from")
    use = link.observe(analysis.traced)
    queued = [] if isinstance(use, str) else [(begin - origin, end - origin) for begin, end in use.limited]
    changes: list[Change] = []
    assumptions: list[str] = []
    if wishes.bandwidth is not None:
        changes.append(_bandwidth(wishes.text("bandwidth"), wishes.bandwidth, use, assumptions))
    fetched = _fetch_gain(b, queued, wishes, changes)
    _rearm(b, queued, wishes, fetched, changes)
    if wishes.fetch is not None or wishes.rearm is not None:
        assumptions.append("all else takes as long as it did: what follows the fetch begins that much earlier")
        assumptions.append("what went on while the link was draining its queue gains nothing, the link sets the pace")
    told = [change.change_ns for change in changes]
    then = None if None in told else max(0, b.blackout_ns + sum(ns for ns in told if ns is not None))
    return WhatIf(blackout_ns=then, changes=changes, assumptions=assumptions)


def _bandwidth(wish: str, wanted: int, use: LinkUse | str, assumptions: list[str]) -> Change:
    if isinstance(use, str):
        return Change(wish=wish, change_ns=None, why=f"cannot be told: {use}")
    payload = float(wanted * PAYLOAD)
    was, rest = use.limited_ns, use.span_ns - use.limited_ns
    floor = min(was, max(use.source_ns, use.reader_ns))
    if use.rate is None:
        then, why = 0.0, "the link was never the limit, so a faster one changes nothing"
    else:
        then = max(use.limited_bytes * 1e9 / payload, floor)
        why = f"the link was the limit for {was / 1e6:.3f} ms, in which it carried {_mebibytes(use.limited_bytes)}"
        why += f" at {_megabits(use.rate)} of payload"
    whole = use.span_bytes * 1e9 / payload
    if whole > then + rest:
        then = whole - rest
        why += f"; at {_megabits(payload)} it is for all of the {_mebibytes(use.span_bytes)} that arrived"
    elif use.rate is not None and then == floor:
        why += f"; source and destination take {floor / 1e6:.3f} ms for it all the same"
    assumptions += [
        f"the blackout moves the same {_mebibytes(use.span_bytes)}: a VMM that converges further on a faster link"
        " leaves less to it",
        f"{float(PAYLOAD) * 100:.0f} % of the bandwidth is payload (MTU 1500); latency and loss stay the same",
        f"the source needs {use.source_ns / 1e6:.3f} ms of its own meanwhile, and the destination's receive calls"
        f" {use.reader_ns / 1e6:.3f} ms",
    ]
    return Change(wish=wish, change_ns=round(then - was), why=why)


def _fetch_gain(b: Breakdown, queued: Sequence[Span], wishes: Wishes, changes: list[Change]) -> bool:
    """Whether the final fetch is to become faster, and so re-arming with it."""
    if wishes.fetch is None:
        return False
    spans = sorted(
        span for p in b.phases if p.phase in (PhaseName.FETCH_KERNEL, PhaseName.FETCH_USER) for span in p.spans
    )
    changes.append(_less(wishes.text("fetch"), "the final fetch", spans, queued, wishes.fetch))
    return True


def _rearm(b: Breakdown, queued: Sequence[Span], wishes: Wishes, fetched: bool, changes: list[Change]) -> None:
    """What re-arming costs: ioctls of its own, or parts of KVM_GET_DIRTY_LOG where there are none."""
    if wishes.rearm is None:
        return
    wish = wishes.text("rearm")
    if fetched:
        changes.append(Change(wish=wish, change_ns=0, why="part of the final fetch, which is counted already"))
        return
    ioctls = [i for fetch in b.dirty_log.fetches for i in fetch.ioctls]
    if b.dirty_log.mode != DirtyLogMode.LEGACY:
        calls = [i for i in ioctls if i.ioctl in _RE_ARMS]
        what = f"{len(calls)} calls that re-arm"
        changes.append(_less(wish, what, merged(map(_span, calls)), queued, wishes.rearm))
        return
    gets = [i for i in ioctls if i.ioctl == "GET_DIRTY_LOG"]
    if not gets or any(_protecting(i) is None for i in gets):
        why = "cannot be told: KVM_GET_DIRTY_LOG re-arms by itself here, and its parts were not measured"
        changes.append(Change(wish=wish, change_ns=None, why=why))
        return
    took = sum(_protecting(i) or 0 for i in gets)
    beside = overlap(queued, merged(map(_span, gets)))
    gain = max(0, took - beside)
    why = f"walk and flush of {len(gets)} KVM_GET_DIRTY_LOG took {took / 1e6:.3f} ms"
    if samples := [i.split.samples for i in gets if i.split and isinstance(i.split.samples, int)]:
        why += f", known from {sum(samples)} samples"
    changes.append(Change(wish=wish, change_ns=-round(gain * (1 - wishes.rearm)), why=why))


def _span(ioctl: FetchIoctl) -> Span:
    return ioctl.begin, ioctl.begin + ioctl.duration_ns


def _protecting(ioctl: FetchIoctl) -> int | None:
    """What KVM_GET_DIRTY_LOG without manual protection does beyond copying the bitmap (kvm_get_dirty_log_protect)."""
    return ioctl.split.walk + ioctl.split.flush if ioctl.split is not None else None


def _less(wish: str, what: str, spans: Sequence[Span], queued: Sequence[Span], left: Fraction) -> Change:
    took = total(spans)
    beside = overlap(queued, spans)
    why = f"{what} took {took / 1e6:.3f} ms of the blackout"
    if beside:
        why += f", {beside / 1e6:.3f} of it beside the link's queue"
    return Change(wish=wish, change_ns=-round((took - beside) * (1 - left)), why=why)


def _megabits(rate: float) -> str:
    return f"{rate * 8 / 1e6:.0f} Mbit/s"


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
