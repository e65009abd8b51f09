# SPDX-License-Identifier: Apache-2.0
"""The rows below the phases: dirty log, network, waits, cross-checks, and how far to trust the figures.

In: a breakdown. Out: rows; those of `-v` are marked. What needs more than a few lines is in the `text_` modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ebpf_mig.breakdown import (
    IMMEDIATE,
    Breakdown,
    Clock,
    DirtyLogMode,
    FetchIoctl,
    PhaseCost,
    TracingCost,
    Verdict,
    bounds,
)
from ebpf_mig.report import answer, text_faults, text_fetch, text_vmm, text_wire
from ebpf_mig.report.rows import Row, figure, ms, remark, unmeasured, unseen
from ebpf_mig.text import printable, size

MAX_LISTED = 3
"""Notes; all are in the JSON."""
_STYLES = {Verdict.COMPLETE: "green", Verdict.BOUNDED: "yellow", Verdict.INCOMPLETE: "bold red"}


def rows(b: Breakdown) -> Iterator[Row]:
    """All rows in order."""
    if missing := unmeasured(b):
        yield Row("not seen", f"{', '.join(missing)}: not measured", verbose=b.window_ns is None)
    if absent := unseen(b):
        yield Row("not seen", ", ".join(absent), verbose=True)
    if b.window_ns is not None:
        window = bounds.limited(b.window_ns, b.window_bound_ns, b.clock)
        yield Row("window", f"{window} ms, from the pause request to the last vCPU's start", verbose=True)
    yield from text_vmm.throttled(b.throttled)
    yield from text_vmm.stolen(b.stolen)
    yield from text_vmm.pausing(b.pausing)
    yield from text_vmm.management(b.management)
    yield from text_vmm.live_update(b.live_update)
    yield from text_vmm.postcopy(b.postcopy)
    yield from text_faults.rows(b)
    yield from _dirty_log(b)
    yield from text_wire.network(b)
    yield from text_wire.hops(b)
    yield from text_wire.waits(b)
    yield from text_vmm.witnesses(b.witnesses)
    yield from _trust(b)


def _dirty_log(b: Breakdown) -> Iterator[Row]:
    log, final = b.dirty_log, b.dirty_log.final
    parts: list[str] = []
    if final is not None:
        parts.append(_last_fetch(final.kernel_ns, final.user_ns) + _caused(b))
    elif b.window_ns is not None:
        why = {DirtyLogMode.NONE: "not used", DirtyLogMode.UNKNOWN: "not seen: the source was not traced"}
        parts.append(why.get(log.mode, "no fetch was seen after the last vCPU stopped"))
    if log.passes:
        parts.append(_passes(b, after=final is not None))
    if parts:
        yield Row("dirty log", "; ".join(parts))
    if final is not None:
        if final.user_off_cpu_ns:
            text = f"{ms(final.user_off_cpu_ns)} ms of the last fetch"
            yield Row("off CPU", f"{text} in user space", verbose=True)
        if (longest := _longest(b)) is not None:
            yield longest._replace(verbose=True)
        yield from text_fetch.inside(b)
    if log.passes:
        kernel, user = sum(p.kernel_ns for p in log.passes), sum(p.user_ns for p in log.passes)
        text = f"kernel {ms(kernel)} ms, user space {ms(user)} ms in all"
        yield Row("earlier fetches", text, verbose=True)
        yield from text_fetch.brownout(log.passes)
    for switch in log.logging:
        if switch.in_blackout_ns:
            word = "on" if switch.on else "off"
            yield figure(
                "logging", switch.in_blackout_ns, f"switched {word} in the downtime, {switch.slots} memslots"
            )._replace(spare=2)


def _last_fetch(kernel_ns: int | None, user_ns: int | None) -> str:
    if kernel_ns is None or user_ns is None:
        return "last fetch not seen: fetches were not traced"
    return f"last fetch {ms(kernel_ns + user_ns)} ms (kernel {ms(kernel_ns)}, user {ms(user_ns)})"


def _caused(b: Breakdown) -> str:
    final = b.dirty_log.final
    if final is None:
        return ""
    pages = "" if final.pages is None else f"{final.pages} dirty pages, "
    if final.send_ns is None or final.bytes is None:
        return f", then {pages}sends were not traced"
    return f", then {pages}{size(final.bytes)} sent in {ms(final.send_ns)} ms"


def _passes(b: Breakdown, *, after: bool) -> str:
    passes = b.dirty_log.passes
    known = [p.bytes for p in passes if p.bytes is not None]
    sent = f"with {size(sum(known))}" if known else "; sends were not traced"
    deferred = passes[-1].bytes == 0
    if deferred and len(passes) == 1:
        sent = "with its pages deferred to the stop"
    elif deferred:
        sent += ", the last one's pages deferred to the stop"
    count = f"{len(passes)} pass{'es' if len(passes) > 1 else ''}"
    return f"{'before that ' if after else ''}{count} {sent}".replace(" ;", ";")


def _longest(b: Breakdown) -> Row | None:
    """The longest ioctl of the final fetch, its slot, and its wait for locks where that is known."""
    ioctls = [ioctl for fetch in b.dirty_log.fetches for ioctl in fetch.ioctls]
    if not ioctls:
        return None
    longest: FetchIoctl = max(ioctls, key=lambda ioctl: ioctl.duration_ns)
    sizes = {slot.slot: slot.size_bytes for slot in b.dirty_log.slots}
    space, slot = longest.slot >> 16, longest.slot & 0xFFFF
    where = f"memslot {slot}" + (f" of space {space}" if space else "")
    extent = f", {size(sizes[longest.slot])}" if longest.slot in sizes else ""
    locks = sum((longest.lock_wait_ns or {}).values())
    wait = f"; waited for locks {ms(locks)}" if locks else ""
    one = f"1 of {len(ioctls)}: " if len(ioctls) > 1 else ""
    return figure("longest ioctl", longest.duration_ns, f"{one}{printable(longest.ioctl)}, {where}{extent}{wait}")


def _trust(b: Breakdown) -> Iterator[Row]:
    """How reliable the figures are: losses, our own cost, clocks, notes."""
    state = b.completeness
    style = _STYLES.get(state.verdict, "")
    lost = "losses not known" if state.lost is None else _counts("lost", state.lost)
    if lost or state.reasons:
        reasons = "; ".join(printable(reason, 400) for reason in state.reasons)
        yield remark(state.verdict, "; ".join(filter(None, (lost, reasons))), style)
    unpaired = _counts("", state.unpaired or {})
    if unpaired:
        yield Row("unpaired", f"{unpaired}: harmless", verbose=True)
    yield Row("tracing", _cost(b))
    if state.tracing is not None:
        for name, cost in state.tracing.phases.items():
            if cost.programs_ns + cost.calls_ns + (cost.process_ns or 0):
                yield Row("", f"{name}: {_parts(cost)}", verbose=True)
        yield Row("", f"up to {ms(state.tracing.doubt_ns)} ms of it may lie beside the window", verbose=True)
    elif state.observer_window_estimate_ns is not None and state.observer_window_ns is not None:
        least, most = state.observer_window_least_ns or 0, state.observer_window_ns
        yield Row("", f"{ms(least)} to {ms(most)} ms by the readings around it", verbose=True)
    if state.observer_window_ns is not None and state.observer_ns is not None:
        yield Row("", f"{ms(state.observer_ns)} ms of BPF run time in the whole recording", verbose=True)
    if b.clock != Clock():
        yield Row("clocks", f"destination {bounds.alignment(b.clock)}")
    yield Row("processes", answer.ends(b), verbose=True)
    plain = [note for note in b.notes if not note.endswith(IMMEDIATE)]
    for at, note in enumerate([*plain, *(note for note in b.notes if note.endswith(IMMEDIATE))]):
        yield Row("note", printable(note, 400), verbose=at >= min(MAX_LISTED, len(plain)))
    if len(plain) > MAX_LISTED:
        yield Row("", f"{len(plain) - MAX_LISTED} more notes with -v")


def _cost(b: Breakdown) -> str:
    """Our own run time: in the window where that was measured."""
    state = b.completeness
    by = f" ({', '.join(_tiers(state.attach))})" if state.attach else ""
    if state.tracing is not None:
        return f"cost {_parts(state.tracing)}{by}"
    if state.observer_window_estimate_ns is not None:
        return f"cost about {ms(state.observer_window_estimate_ns)} ms of it{by}"
    if state.observer_window_ns is not None:
        return f"cost at most {ms(state.observer_window_ns)} ms of it{by}"
    if state.observer_ns is not None:
        return f"cost {ms(state.observer_ns)} ms in the whole recording{by}"
    return f"cost not measured{by}"


def _parts(cost: TracingCost | PhaseCost) -> str:
    """`0.714 ms of CPU time in it: programs 0.412, system calls 0.271, our process 0.031`."""
    parts = {"programs": cost.programs_ns, "system calls": cost.calls_ns, "our process": cost.process_ns}
    listed = ", ".join(f"{name} {ms(ns)}" for name, ns in parts.items() if ns is not None)
    return f"{ms(sum(ns or 0 for ns in parts.values()))} ms of CPU time in it: {listed}"


def _tiers(attach: dict[str, str]) -> Iterable[str]:
    """`fentry, tracepoint (vcpu)`: the tier of most signals, then the others with the signals that have them."""
    tiers: dict[str, list[str]] = {}
    for signal, tier in sorted(attach.items()):
        tiers.setdefault(tier, []).append(signal)
    (most, _), *others = sorted(tiers.items(), key=lambda item: (-len(item[1]), item[0]))
    return [printable(most), *(f"{printable(tier)} ({printable(', '.join(signals))})" for tier, signals in others)]


def _counts(word: str, counts: dict[str, int]) -> str:
    seen = [f"{printable(probe)} {count}" for probe, count in sorted(counts.items()) if count]
    return f"{word} {', '.join(seen)}".strip() if seen else ""
