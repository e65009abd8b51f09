# SPDX-License-Identifier: Apache-2.0
"""Predicts the blackout with a cheaper final fetch, without re-arming, over another link, or without a cause.

In: an `Analysis` and a `Hypothesis`. Out: a `WhatIf` with the effect of each change and the assumptions. A prediction
adds to the measured blackout or subtracts from it. It is never computed from a model alone, so effects that no model
covers stay in it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from msgspec.structs import replace

from ebpf_mig.analysis import bandwidth as link
from ebpf_mig.analysis import diagnosis, drivers, own_delay
from ebpf_mig.analysis.bandwidth import LinkUse
from ebpf_mig.analysis.diagnosis.facts import shared, without
from ebpf_mig.analysis.diagnosis.rules import PREDICTABLE
from ebpf_mig.analysis.result import Analysis
from ebpf_mig.analysis.spans import merged, overlap, total
from ebpf_mig.breakdown import Breakdown, Change, DirtyLogMode, FetchIoctl, PhaseName, Result, Span, WhatIf
from ebpf_mig.errors import UsageError

PAYLOAD = Fraction(1448, 1538)
"""The payload's share of an Ethernet link with an MTU of 1500. Of 1538 bytes, preamble, header, checksum and gap take
38, IPv4 and TCP with timestamps take 52 (IEEE 802.3; RFC 791, 9293, 7323)."""
_NAGLE = "Nagle, delayed ACK"
_NAMES = {"nagle": "data that Nagle's algorithm held back until an acknowledgement"}
_RE_ARMS = ("CLEAR_DIRTY_LOG", "RESET_DIRTY_RINGS")


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """The conditions to change; None: unchanged."""

    bandwidth: int | None = None
    """The link's bandwidth, bytes/s."""
    fetch: Fraction | None = None
    """The share of the final fetch's time that remains."""
    rearm: Fraction | None = None
    """The share that remains of the final fetch's time for write-protecting pages again."""
    nodelay: bool = False
    """Whether the VMM sets TCP_NODELAY."""
    untraced: bool = False
    """Whether nothing of ours runs."""
    causes: tuple[tuple[str, Fraction], ...] = ()
    """Rules of the diagnosis that can be predicted, and the share of their time that remains."""
    texts: tuple[tuple[str, str], ...] = ()
    """(name, the change as the user wrote it)."""

    def text(self, name: str) -> str:
        """The change as the user wrote it."""
        return dict(self.texts).get(name, name)


def predict(analysis: Analysis, hypothesis: Hypothesis) -> WhatIf:
    """The blackout under `hypothesis`. UsageError without a blackout of a completed migration."""
    b, origin = analysis.breakdown, analysis.origin_ns
    if b.blackout_ns is None or b.migration.result != Result.COMPLETED:
        raise UsageError("a prediction needs the blackout of a completed migration, and the recording has none")
    use = link.observe(analysis.traced)
    queued = [] if isinstance(use, str) else [(begin - origin, end - origin) for begin, end in use.limited]
    changes: list[Change] = []
    assumptions: list[str] = []
    if hypothesis.bandwidth is not None:
        changes.append(_bandwidth(hypothesis.text("bandwidth"), hypothesis.bandwidth, use, assumptions))
    fetched = _fetch_gain(b, queued, hypothesis, changes)
    _rearm(b, queued, hypothesis, fetched, changes)
    shorter = hypothesis.nodelay or hypothesis.causes or hypothesis.fetch is not None or hypothesis.rearm is not None
    if shorter:
        assumptions.append("all else takes as long as it did: what follows the fetch begins that much earlier")
        assumptions.append("work done while the link was draining its queue gains nothing: the link sets the pace")
    _causes(analysis, queued, hypothesis, use, changes, assumptions)
    if hypothesis.untraced:
        changes.append(_untraced(analysis, b.blackout or (0, 0), hypothesis.text("untraced"), assumptions))
    effects = [change.change_ns for change in changes]
    then = None if None in effects else max(0, b.blackout_ns + sum(ns for ns in effects if ns is not None))
    return WhatIf(blackout_ns=then, changes=changes, assumptions=assumptions)


def _bandwidth(text: str, wanted: int, use: LinkUse | str, assumptions: list[str]) -> Change:
    if isinstance(use, str):
        return Change(wish=text, change_ns=None, why=f"cannot be predicted: {use}")
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
        why += f"; source and destination still take {floor / 1e6:.3f} ms for it"
    assumptions += [
        f"the blackout moves the same {_mebibytes(use.span_bytes)}, although a VMM that converges further on a faster"
        " link leaves less for it",
        f"{float(PAYLOAD) * 100:.0f} % of the bandwidth is payload (MTU 1500); latency and loss stay the same",
        f"in that time the source needs {use.source_ns / 1e6:.3f} ms for its own work, and the destination's receive"
        f" calls {use.reader_ns / 1e6:.3f} ms",
    ]
    return Change(wish=text, change_ns=round(then - was), why=why)


def _fetch_gain(b: Breakdown, queued: Sequence[Span], hypothesis: Hypothesis, changes: list[Change]) -> bool:
    """Adds the effect of a faster final fetch. Returns whether there is one: it includes re-arming."""
    if hypothesis.fetch is None:
        return False
    spans = sorted(
        span for p in b.phases if p.phase in (PhaseName.FETCH_KERNEL, PhaseName.FETCH_USER) for span in p.spans
    )
    changes.append(_less(hypothesis.text("fetch"), "the final fetch", spans, queued, hypothesis.fetch))
    return True


def _rearm(b: Breakdown, queued: Sequence[Span], hypothesis: Hypothesis, fetched: bool, changes: list[Change]) -> None:
    """Adds the effect of less re-arming. Re-arming is done by ioctls of its own, or else in KVM_GET_DIRTY_LOG."""
    if hypothesis.rearm is None:
        return
    text = hypothesis.text("rearm")
    if fetched:
        changes.append(Change(wish=text, change_ns=0, why="part of the final fetch, which is counted already"))
        return
    ioctls = [i for fetch in b.dirty_log.fetches for i in fetch.ioctls]
    if b.dirty_log.mode != DirtyLogMode.LEGACY:
        calls = [i for i in ioctls if i.ioctl in _RE_ARMS]
        what = f"{len(calls)} calls that re-arm"
        changes.append(_less(text, what, merged(map(_span, calls)), queued, hypothesis.rearm))
        return
    gets = [i for i in ioctls if i.ioctl == "GET_DIRTY_LOG"]
    if not gets or any(_protecting(i) is None for i in gets):
        why = "cannot be predicted: KVM_GET_DIRTY_LOG re-arms by itself here, and its parts were not measured"
        changes.append(Change(wish=text, change_ns=None, why=why))
        return
    took = sum(_protecting(i) or 0 for i in gets)
    queueing = overlap(queued, merged(map(_span, gets)))
    gain = max(0, took - queueing)
    why = f"walk and flush of {len(gets)} KVM_GET_DIRTY_LOG took {took / 1e6:.3f} ms"
    if samples := [i.split.samples for i in gets if i.split and isinstance(i.split.samples, int)]:
        why += f", known from {sum(samples)} samples"
    changes.append(Change(wish=text, change_ns=-round(gain * (1 - hypothesis.rearm)), why=why))


def _causes(
    analysis: Analysis,
    queued: Sequence[Span],
    hypothesis: Hypothesis,
    use: LinkUse | str,
    changes: list[Change],
    assumptions: list[str],
) -> None:
    """Adds the effect of each cause that would be gone: the instants that the diagnosis explains by it."""
    if not hypothesis.nodelay and not hypothesis.causes:
        return
    b, origin = analysis.breakdown, analysis.origin_ns
    slept = drivers.sleeps(analysis.traced, analysis.attribution)
    calls = drivers.long_calls(analysis.traced, analysis.attribution)
    spans = diagnosis.explained(b, slept, calls, use, origin)
    wanted = [(name, hypothesis.text(name), left) for name, left in hypothesis.causes]
    if hypothesis.nodelay:
        spans["nagle"] = shared(spans.get("nagle", []), _held_back(analysis))
        wanted.insert(0, ("nagle", hypothesis.text("nodelay"), Fraction(0)))
        assumptions.append("data leaves when it is written, and arrives as fast as after the acknowledgement")
    counted = _fetch_spans(b) if hypothesis.fetch is not None else []
    for name, text, left in wanted:
        ours = spans.get(name, [])
        own = without(ours, counted)
        if not ours:
            changes.append(Change(wish=text, change_ns=0, why="the diagnosis found nothing of this kind"))
            continue
        change = _less(text, _NAMES.get(name, f"what the diagnosis calls {name}"), own, queued, left)
        if twice := total(ours) - total(own):
            change = replace(change, why=f"{change.why}; {twice / 1e6:.3f} ms more are counted with the final fetch")
        changes.append(change)
        if name in PREDICTABLE:
            assumptions.append(f"{PREDICTABLE[name]}, and nothing else takes the time instead")


def _untraced(analysis: Analysis, blackout: Span, text: str, assumptions: list[str]) -> Change:
    """The effect of tracing: what our programs took in the process that each phase of the blackout belongs to."""
    found = own_delay.delays(analysis.traced, analysis.breakdown.phases, analysis.origin_ns, blackout)
    if found is None:
        return Change(
            wish=text, change_ns=None, why="cannot be predicted: the recording does not say what tracing took"
        )
    took = sum(found.values())
    most = sorted(found.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {ns / 1e6:.3f}" for name, ns in most if ns)
    why = f"our programs, and the longer way through system calls, took {took / 1e6:.3f} ms in the process that was"
    why += f" to act{f': {parts}' if parts else ''}"
    cost = analysis.breakdown.completeness.tracing
    if cost is not None and cost.process_ns:
        beside = f"our process, which had a CPU for {cost.process_ns / 1e6:.3f} ms of the window, took none that"
        assumptions.append(f"{beside} the VMMs needed")
    assumptions.append("what tracing took in caches, and in waits for the other side, is not part of it")
    return Change(wish=text, change_ns=-took, why=why)


def _held_back(analysis: Analysis) -> list[Span]:
    """From the send of data that Nagle's algorithm held back to the acknowledgement that released it."""
    source, origin = analysis.traced.source, analysis.origin_ns
    acks = sorted(s.at_ns - origin for s in source.segments if not s.payload) if source else []
    found = []
    for wire in analysis.breakdown.wire or ():
        last = bisect_right(acks, wire.received) - 1
        if wire.reason == _NAGLE and last >= 0 and acks[last] > wire.sent:
            found.append((wire.sent, acks[last]))
    return found


def _fetch_spans(b: Breakdown) -> list[Span]:
    return merged(s for p in b.phases if p.phase in (PhaseName.FETCH_KERNEL, PhaseName.FETCH_USER) for s in p.spans)


def _span(ioctl: FetchIoctl) -> Span:
    return ioctl.begin, ioctl.begin + ioctl.duration_ns


def _protecting(ioctl: FetchIoctl) -> int | None:
    """Time that KVM_GET_DIRTY_LOG without manual protection spends on re-arming (kvm_get_dirty_log_protect), in ns."""
    return ioctl.split.walk + ioctl.split.flush if ioctl.split is not None else None


def _less(text: str, what: str, spans: Sequence[Span], queued: Sequence[Span], left: Fraction) -> Change:
    took = total(spans)
    queueing = overlap(queued, spans)
    why = f"{what} took {took / 1e6:.3f} ms of the blackout"
    if queueing:
        why += f", {queueing / 1e6:.3f} of it while the link drained its queue"
    return Change(wish=text, change_ns=-round((took - queueing) * (1 - left)), why=why)


def _megabits(rate: float) -> str:
    return f"{rate * 8 / 1e6:.0f} Mbit/s"


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
