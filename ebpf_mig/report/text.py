# SPDX-License-Identifier: Apache-2.0
"""The terminal report: one screen with the blackout and where its time went.

In: a breakdown. Out: text of 80 to 100 columns, with colour if asked for. Every duration is in ms with three
decimals. Meaning never depends on colour. All names are made printable, because they come from the recording.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.text import Text

from ebpf_mig.breakdown import (
    IMMEDIATE,
    Breakdown,
    Clock,
    DirtyLogMode,
    Endpoint,
    FetchIoctl,
    Mode,
    Phase,
    PhaseName,
    Result,
    Side,
    Transport,
    Vcpu,
    Verdict,
    bounds,
)
from ebpf_mig.report import text_fetch, text_vmm, text_wire
from ebpf_mig.report.canvas import PLAIN, Canvas
from ebpf_mig.report.rows import Row, figure, ms, paired, remark
from ebpf_mig.report.waterfall import bar, ruler
from ebpf_mig.text import printable, size

MAX_VCPUS = 4
MAX_LISTED = 3
"""Rows of the other lists."""
SCREEN = 40
"""Lines of the report; if there are more, optional rows are left out."""
_BAR_AT = 39
_SIDES = {Side.SOURCE: ("src", "cyan"), Side.DESTINATION: ("dst", "magenta"), Side.BOTH: ("both", "blue")}
_VERDICTS = {Verdict.COMPLETE: "green", Verdict.BOUNDED: "yellow", Verdict.INCOMPLETE: "bold red"}
_NOT_MISSED = frozenset({PhaseName.EXEC, PhaseName.STARTUP, PhaseName.MANAGEMENT, PhaseName.UNATTRIBUTED})
"""Phases that most migrations do without; that they were not seen needs no mention."""
_PLAIN = str.maketrans({"…": "...", "→": "->", "±": "+-", "≤": "<="})


def render(breakdown: Breakdown, canvas: Canvas = PLAIN) -> str:
    """The report as text with a final newline. The same breakdown and canvas give the same bytes."""
    canvas = canvas.bounded()
    out = io.StringIO()
    console = Console(
        force_jupyter=False,
        file=out,
        width=canvas.width,
        force_terminal=canvas.colour,
        color_system="standard" if canvas.colour else None,
        no_color=not canvas.colour,
        legacy_windows=False,
        _environ={},
    )
    rows = [(row, list(_wrapped(row, canvas.width, console))) for row in _rows(breakdown, canvas)]
    for _, lines in _on_one_screen(rows):
        for line in lines:
            line.rstrip()
            console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)
    text = out.getvalue()
    return text if canvas.unicode else text.translate(_PLAIN).encode("ascii", "backslashreplace").decode()


def _rows(breakdown: Breakdown, canvas: Canvas) -> Iterator[Row]:
    """The blocks of the report with an empty row between each two."""
    blocks = (
        [_headline(breakdown), *_migration(breakdown)],
        [*_waterfall(breakdown, canvas)],
        [*_vcpus(breakdown)],
        [
            *text_vmm.throttled(breakdown.throttled),
            *text_vmm.pausing(breakdown.pausing),
            *text_vmm.management(breakdown.management),
            *text_vmm.live_update(breakdown.live_update),
            *text_vmm.postcopy(breakdown.postcopy),
            *_dirty_log(breakdown),
            *text_wire.sockets(breakdown.sockets),
            *text_wire.in_flight(breakdown),
            *text_vmm.witnesses(breakdown.witnesses),
        ],
        [*_trust(breakdown)],
    )
    for at, block in enumerate(block for block in blocks if block):
        if at:
            yield Row(Text())
        yield from block


def _on_one_screen(rows: list[tuple[Row, list[Text]]]) -> list[tuple[Row, list[Text]]]:
    """Leaves out optional rows, highest `spare` first and last row first, until the rest fits."""
    kept = list(rows)
    while sum(len(lines) for _, lines in kept) > SCREEN:
        spare = max((row.spare for row, _ in kept), default=0)
        if not spare:
            break
        del kept[max(at for at, (row, _) in enumerate(kept) if row.spare == spare)]
    return kept


def _wrapped(row: Row, width: int, console: Console) -> Iterator[Text]:
    if row.text.cell_len <= width:
        yield row.text
        return
    head, rest = row.text.divide([row.indent])
    for at, part in enumerate(rest.wrap(console, width - row.indent)):
        yield Text.assemble(head if at == 0 else " " * row.indent, part)


def _headline(breakdown: Breakdown) -> Row:
    return Row(Text(_headline_text(breakdown), "bold"))


def _headline_text(breakdown: Breakdown) -> str:
    result = breakdown.migration.result
    if breakdown.blackout_ns is None:
        if breakdown.migration.paused_before and breakdown.window_ns is None:
            return "no blackout: the guest was paused before the migration"
        if result in (Result.FAILED, Result.CANCELLED) and breakdown.window_ns is None:
            return "no blackout: the migration ended before the vCPUs stopped"
        alone = breakdown.migration.source is None
        missing = "stop" if breakdown.window_ns is None or alone else "start on the destination"
        return f"blackout not measured: no vCPU {missing} was seen"
    return f"{_blackout_word(breakdown)} {bounds.blackout(breakdown)}"


def _blackout_word(breakdown: Breakdown) -> str:
    aborted = breakdown.came_back and breakdown.migration.result != Result.SAVED
    return "aborted blackout" if aborted else "blackout"


def _migration(breakdown: Breakdown) -> Iterator[Row]:
    facts = breakdown.migration
    known = " ".join(name for name in (facts.vmm, facts.vmm_version) if name and name != "unknown")
    vmm = printable(known) or "unknown VMM"
    mode = _MODES.get(facts.mode, facts.mode)
    carrier = {Transport.PIPE: "a pipe", Transport.FILE: "a file"}.get(facts.transport, printable(facts.transport))
    way = "" if facts.transport == Transport.NONE else f" over {carrier}"
    if facts.transport == Transport.UNKNOWN:
        way = " over an unknown transport"
    elif facts.connections is not None and facts.connections > 1:
        way += f" ({facts.connections} connections)"
    if facts.through:
        way += f" through {', '.join(map(printable, facts.through))}"
    result = {Result.UNKNOWN: "result unknown"}.get(facts.result, facts.result)
    after = "" if facts.total_ns is None else f" after {ms(facts.total_ns)} ms"
    style = {Result.COMPLETED: "green", Result.FAILED: "bold red", Result.CANCELLED: "yellow"}.get(facts.result, "")
    paused = [when for when, was in (("before", facts.paused_before), ("after", facts.paused_after)) if was]
    after += f"; the guest was paused {' and '.join(paused)}" if paused else ""
    yield Row(Text.assemble(f"{vmm}, {printable(mode)}{way}, ", (printable(result), style), after))
    ends = [_endpoint("source", facts.source), _endpoint("destination", facts.destination)]
    yield Row(Text(" -> ".join(ends) + paired(facts.pairing)))


_MODES = {
    Mode.PRECOPY: "pre-copy",
    Mode.POSTCOPY: "post-copy",
    Mode.CPR: "live update (cpr)",
    Mode.UNKNOWN: "unknown mode",
}


def _endpoint(side: str, end: Endpoint | None) -> str:
    if end is None:
        return f"{side} not traced"
    return f"{side} pid {end.pid}" + (f" on {printable(end.host)}" if end.host else "")


def _waterfall(breakdown: Breakdown, canvas: Canvas) -> Iterator[Row]:
    window = breakdown.window_ns
    if not window:
        return
    width = canvas.width - _BAR_AT
    scale = ""
    if breakdown.blackout is not None:
        scale = ruler(breakdown.blackout, window, width, _blackout_word(breakdown), unicode=canvas.unicode)
    yield Row(Text.assemble((f"{'phase':14}{'side':5}{'ms':>11}{'share':>8} ", "dim"), (scale, "bold")))
    for phase in breakdown.phases:
        if phase.duration_ns or phase.bound_ns or phase.phase == PhaseName.UNATTRIBUTED:
            yield Row(_phase(phase, breakdown.clock, window, width, canvas.unicode))
    yield Row(
        Text(
            f"{'window':19}{bounds.limited(window, breakdown.window_bound_ns, breakdown.clock):>11}{'100.0%':>8}", "dim"
        )
    )
    unseen = [
        phase.phase
        for phase in breakdown.phases
        if not (phase.duration_ns or phase.bound_ns or phase.phase in _NOT_MISSED)
    ]
    if unseen:
        yield Row(Text("not seen: " + ", ".join(unseen), "dim"), spare=1)


def _phase(phase: Phase, clock: Clock, window: int, width: int, unicode: bool) -> Text:
    side, colour = _SIDES.get(phase.side, (phase.side, ""))
    name = "bold" if phase.phase.startswith("fetch.") else ""
    if phase.phase == PhaseName.UNATTRIBUTED:
        colour = name = "yellow"
    took = phase.duration_ns or 0
    share = f"{100 * took / window:.1f}%"
    return Text.assemble(
        (f"{phase.phase:14}", name),
        f"{side:5}{bounds.limited(took, phase.bound_ns, clock):>11}{share:>8} ",
        (bar(phase.spans, window, width, unicode=unicode), colour),
    )


def _vcpus(breakdown: Breakdown) -> Iterator[Row]:
    vcpus = breakdown.vcpus
    if len(vcpus) < 2:
        return
    head = f"{'vCPU':19}{'blackout ms':>11}{'kick to stop':>14}{'stop at':>11}{'start at':>11}"
    yield Row(Text(head, "dim"))
    slowest = sorted(vcpus, key=lambda v: (-(v.blackout_ns if v.blackout_ns is not None else 1 << 63), v.vcpu))
    for vcpu in slowest[:MAX_VCPUS]:
        yield Row(_vcpu(vcpu))
    if (more := len(vcpus) - MAX_VCPUS) > 0:
        yield Row(Text(f"... {more} more, slowest first", "dim"))


def _vcpu(vcpu: Vcpu) -> Text:
    own = f"{vcpu.vcpu:<19}{ms(vcpu.blackout_ns):>11}"
    return Text(f"{own}{ms(vcpu.kick_ns):>14}{ms(vcpu.stop):>11}{ms(vcpu.start):>11}")


def _dirty_log(breakdown: Breakdown) -> Iterator[Row]:
    log = breakdown.dirty_log
    final = log.final
    if final is not None:
        off = f", {ms(final.user_off_cpu_ns)} of it off CPU" if final.user_off_cpu_ns else ""
        if final.kernel_ns is None or final.user_ns is None:
            yield remark("final dirty-log fetch", "not seen: fetches were not traced", "bold")
        else:
            yield _fetch("final dirty-log fetch", final.kernel_ns, final.user_ns, off, "bold")
        pages = "pages not known" if final.pages is None else f"{final.pages} pages"
        if final.send_ns is None or final.bytes is None:
            yield remark("  what it caused", f"{pages}; sends were not traced")
        else:
            yield figure("  what it caused", final.send_ns, f"memory.send: {pages}, {size(final.bytes)}")
        if (longest := _longest(breakdown)) is not None:
            yield longest._replace(spare=1)
        yield from text_fetch.inside(breakdown)
    elif breakdown.window_ns is not None:
        why = {DirtyLogMode.NONE: "none: no dirty logging", DirtyLogMode.UNKNOWN: "the source was not traced"}.get(
            log.mode, "none seen after the last vCPU stopped"
        )
        yield remark("final dirty-log fetch", why, "bold")
    if passes := log.passes:
        kernel, user = sum(p.kernel_ns for p in passes), sum(p.user_ns for p in passes)
        known = [p.bytes for p in passes if p.bytes is not None]
        sent = f"; {size(sum(known))} sent" if known else "; sends were not traced"
        if passes[-1].bytes == 0:
            sent += ", the last one's kept for the final one" if len(passes) > 1 else ": kept for the final one"
        yield _fetch(f"{len(passes)} pre-copy pass{'es' if len(passes) > 1 else ''}", kernel, user, sent)
        yield from text_fetch.brownout(passes)
    for switch in log.logging:
        if switch.in_blackout_ns:
            word = "on" if switch.on else "off"
            yield figure("  logging switched", switch.in_blackout_ns, f"{word} in the blackout, {switch.slots} slots")


def _fetch(label: str, kernel_ns: int, user_ns: int, more: str = "", style: str = "") -> Row:
    text = f"kernel {ms(kernel_ns)}, user {ms(user_ns)}{more}"
    return figure(label, kernel_ns + user_ns, text, style)


def _longest(breakdown: Breakdown) -> Row | None:
    """The longest ioctl of the final fetch, its slot, and its wait for locks where that is known."""
    ioctls = [ioctl for fetch in breakdown.dirty_log.fetches for ioctl in fetch.ioctls]
    if not ioctls:
        return None
    longest: FetchIoctl = max(ioctls, key=lambda ioctl: ioctl.duration_ns)
    sizes = {slot.slot: slot.size_bytes for slot in breakdown.dirty_log.slots}
    space, slot = longest.slot >> 16, longest.slot & 0xFFFF
    where = f"slot {slot}" + (f" of space {space}" if space else "")
    extent = f", {size(sizes[longest.slot])}" if longest.slot in sizes else ""
    locks = sum((longest.lock_wait_ns or {}).values())
    wait = f"; locks {ms(locks)}" if locks else ""
    one = f"1 of {len(ioctls)}: " if len(ioctls) > 1 else ""
    return figure("  longest ioctl", longest.duration_ns, f"{one}{longest.ioctl}, {where}{extent}{wait}")


def _trust(breakdown: Breakdown) -> Iterator[Row]:
    """How reliable the figures are: verdict, losses, clocks, notes."""
    state = breakdown.completeness
    lost = "losses not known" if state.lost is None else _counts("lost", state.lost) or "nothing lost"
    facts = [lost, _counts("unpaired", state.unpaired or {})]
    yield remark(state.verdict, "; ".join(filter(None, facts)), _VERDICTS.get(state.verdict, ""))
    cost = "cost not measured" if state.observer_ns is None else f"{ms(state.observer_ns)} ms in all"
    if state.observer_window_ns is not None:
        cost = f"{cost}, in the window ≤ {ms(state.observer_window_ns)}"
    by = f"; {', '.join(_tiers(state.attach))}" if state.attach else ""
    yield remark("  observer", cost + by)
    for reason in state.reasons:
        yield remark("  because", printable(reason, 400))
    if breakdown.clock != Clock():
        yield remark("clock of destination", bounds.alignment(breakdown.clock))
    for at, note in enumerate(breakdown.notes[:MAX_LISTED]):
        yield remark("note", printable(note, 400))._replace(spare=2 if at or note.endswith(IMMEDIATE) else 0)
    if len(breakdown.notes) > MAX_LISTED:
        yield Row(Text(f"... {len(breakdown.notes) - MAX_LISTED} more notes, all in --format json", "dim"))


def _tiers(attach: dict[str, str]) -> Iterable[str]:
    """`fentry, tracepoint (vcpu)`: the tier of most signals, then the others with the signals that have them."""
    tiers: dict[str, list[str]] = {}
    for signal, tier in sorted(attach.items()):
        tiers.setdefault(tier, []).append(signal)
    (most, _), *others = sorted(tiers.items(), key=lambda item: (-len(item[1]), item[0]))
    return [printable(most), *(f"{printable(tier)} ({printable(', '.join(signals))})" for tier, signals in others)]


def _counts(word: str, counts: dict[str, int]) -> str:
    seen = [f"{printable(probe)} {count}" for probe, count in sorted(counts.items()) if count]
    return f"{word} {', '.join(seen)}" if seen else ""
