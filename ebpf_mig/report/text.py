# SPDX-License-Identifier: Apache-2.0
"""The terminal report: one screen that says how long the blackout was and where it went.

In: a breakdown. Out: text of 80 to 100 columns, with colour if asked for. Every duration is in ms with three
decimals. Meaning never depends on colour. All names in it are made printable: they come from other people.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from ebpf_mig.breakdown import Breakdown, Endpoint, FetchIoctl, Phase, SocketUse, Vcpu, Wait, Witness
from ebpf_mig.printable import printable
from ebpf_mig.report.canvas import PLAIN, Canvas
from ebpf_mig.report.waterfall import bar, ruler

MAX_VCPUS = 4
MAX_SOCKETS = 4
MAX_WAITS = 2
MAX_LISTED = 3
_STACK_ROOM = 34
"""Rows of the other lists."""

_LABEL = 21
_TEXT_AT = 23
_FIGURE_TEXT_AT = 35
_BAR_AT = 39
_SIDES = {"source": ("src", "cyan"), "destination": ("dst", "magenta"), "both": ("both", "blue")}
_VERDICTS = {"complete": "green", "bounded": "yellow", "incomplete": "bold red"}
_PLAIN = str.maketrans({"…": "...", "→": "->", "±": "+-"})


class Row(NamedTuple):
    """A line of the report; what does not fit goes on below, indented."""

    text: Text
    indent: int = 2


def render(breakdown: Breakdown, canvas: Canvas = PLAIN) -> str:
    """The report as text with a final newline. The same breakdown and canvas give the same bytes."""
    canvas = canvas.bounded()
    out = io.StringIO()
    console = Console(
        file=out,
        width=canvas.width,
        force_terminal=canvas.colour,
        color_system="standard" if canvas.colour else None,
        no_color=not canvas.colour,
        legacy_windows=False,
        _environ={},
    )
    for row in _rows(breakdown, canvas):
        for line in _folded(row, canvas.width, console):
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
            *_dirty_log(breakdown),
            *_sockets(breakdown.sockets),
            *_in_flight(breakdown),
            *_witnesses(breakdown.witnesses),
        ],
        [*_trust(breakdown)],
    )
    for at, block in enumerate(block for block in blocks if block):
        if at:
            yield Row(Text())
        yield from block


def _folded(row: Row, width: int, console: Console) -> Iterator[Text]:
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
        if result in {"failed", "cancelled"} and breakdown.window_ns is None:
            return "no blackout: the migration ended before the vCPUs stopped"
        missing = "stop" if breakdown.window_ns is None else "start on the destination"
        return f"blackout not measured: no vCPU {missing} was seen"
    return f"{_blackout_word(breakdown)} {_ms(breakdown.blackout_ns)} ms"


def _blackout_word(breakdown: Breakdown) -> str:
    return "aborted blackout" if breakdown.migration.result in {"failed", "cancelled"} else "blackout"


def _migration(breakdown: Breakdown) -> Iterator[Row]:
    facts = breakdown.migration
    known = " ".join(name for name in (facts.vmm, facts.vmm_version) if name and name != "unknown")
    vmm = printable(known) or "unknown VMM"
    mode = {"precopy": "pre-copy", "postcopy": "post-copy", "unknown": "unknown mode"}.get(facts.mode, facts.mode)
    way = "" if facts.transport == "none" else f" over {printable(facts.transport)}"
    if facts.transport == "unknown":
        way = " over an unknown transport"
    elif facts.connections > 1:
        way += f" ({facts.connections} connections)"
    result = {"unknown": "result unknown"}.get(facts.result, facts.result)
    after = "" if facts.total_ns is None else f" after {_ms(facts.total_ns)} ms"
    style = {"completed": "green", "failed": "bold red", "cancelled": "yellow"}.get(facts.result, "")
    yield Row(Text.assemble(f"{vmm}, {printable(mode)}{way}, ", (printable(result), style), after))
    ends = [_endpoint("source", facts.source), _endpoint("destination", facts.destination)]
    yield Row(Text(" -> ".join(ends)))


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
        if phase.duration_ns or phase.phase == "unattributed":
            yield Row(_phase(phase, window, width, canvas.unicode))
    yield Row(Text(f"{'window':19}{_ms(window):>11}{'100.0%':>8}", "dim"))
    unseen = [phase.phase for phase in breakdown.phases if not phase.duration_ns and phase.phase != "unattributed"]
    if unseen:
        yield Row(Text("not seen: " + ", ".join(unseen), "dim"))


def _phase(phase: Phase, window: int, width: int, unicode: bool) -> Text:
    side, colour = _SIDES.get(phase.side, (phase.side, ""))
    name = "bold" if phase.phase.startswith("fetch.") else ""
    if phase.phase == "unattributed":
        colour = name = "yellow"
    share = f"{100 * phase.duration_ns / window:.1f}%"
    return Text.assemble(
        (f"{phase.phase:14}", name),
        f"{side:5}{_ms(phase.duration_ns):>11}{share:>8} ",
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
    own = f"{vcpu.vcpu:<19}{_ms(vcpu.blackout_ns):>11}"
    return Text(f"{own}{_ms(vcpu.kick_ns):>14}{_ms(vcpu.stop):>11}{_ms(vcpu.start):>11}")


def _dirty_log(breakdown: Breakdown) -> Iterator[Row]:
    log = breakdown.dirty_log
    final = log.final
    if final is not None:
        yield _fetch("final dirty-log fetch", final.kernel_ns, final.user_ns, "", "bold")
        pages = "pages not known" if final.pages is None else f"{final.pages} pages"
        yield _figure("  what it caused", final.send_ns, f"memory.send: {pages}, {_bytes(final.bytes)}")
        if (longest := _longest(breakdown)) is not None:
            yield longest
    elif breakdown.window_ns is not None:
        why = "none: no dirty logging" if log.mode == "none" else "none seen after the last vCPU stopped"
        yield _remark("final dirty-log fetch", why, "bold")
    if passes := log.passes:
        kernel, user = sum(p.kernel_ns for p in passes), sum(p.user_ns for p in passes)
        sent = f"; {_bytes(sum(p.bytes for p in passes))} sent"
        yield _fetch(f"{len(passes)} pre-copy pass{'es' if len(passes) > 1 else ''}", kernel, user, sent)


def _fetch(label: str, kernel_ns: int, user_ns: int, more: str = "", style: str = "") -> Row:
    text = f"kernel {_ms(kernel_ns)}, user {_ms(user_ns)}{more}"
    return _figure(label, kernel_ns + user_ns, text, style)


def _longest(breakdown: Breakdown) -> Row | None:
    """The longest ioctl of the final fetch, its slot, and its wait for locks where that is known."""
    ioctls = [ioctl for fetch in breakdown.dirty_log.fetches for ioctl in fetch.ioctls]
    if not ioctls:
        return None
    longest: FetchIoctl = max(ioctls, key=lambda ioctl: ioctl.duration_ns)
    sizes = {slot.slot: slot.size_bytes for slot in breakdown.dirty_log.slots}
    space, slot = longest.slot >> 16, longest.slot & 0xFFFF
    where = f"slot {slot}" + (f" of space {space}" if space else "")
    size = f", {_bytes(sizes[longest.slot])}" if longest.slot in sizes else ""
    locks = sum((longest.lock_wait_ns or {}).values())
    wait = f"; locks {_ms(locks)}" if locks else ""
    one = f"1 of {len(ioctls)}: " if len(ioctls) > 1 else ""
    return _figure("  longest ioctl", longest.duration_ns, f"{one}{longest.ioctl}, {where}{size}{wait}")


def _sockets(sockets: list[SocketUse]) -> Iterator[Row]:
    """Those that carried memory and state; the others are in the JSON report."""
    carriers = [use for use in sockets if not use.role.endswith("control")]
    for use in carriers[:MAX_SOCKETS]:
        inside = f"inside {_ms(use.in_call_ns)}"
        if use.copy_ns is not None and use.blocked_ns is not None:
            inside = f"copy {_ms(use.copy_ns)}, blocked {_ms(use.blocked_ns)}"
        calls = f"{use.calls} call{'s' if use.calls != 1 else ''}"
        text = f"{_bytes(use.bytes)} in {calls}: {inside}, between {_ms(use.between_ns)}"
        yield _figure(use.role, use.in_call_ns + use.between_ns, text)
    if len(carriers) > MAX_SOCKETS:
        yield Row(Text(f"... {len(carriers) - MAX_SOCKETS} more sockets", "dim"))


def _in_flight(breakdown: Breakdown) -> Iterator[Row]:
    """The longest stretch on the wire, if it matters, and the longest waits, where they were measured."""
    share = (breakdown.window_ns or 0) // 20
    told = [wire for wire in breakdown.wire or [] if wire.in_flight_ns >= share]
    for wire in sorted(told, key=lambda w: -w.in_flight_ns)[:1]:
        why = f"{printable(wire.reason)} ({printable(wire.evidence)})"
        yield _figure("in flight", wire.in_flight_ns, f"{_bytes(wire.bytes)}, {why}")
    waits: dict[tuple[str, str, str], list[int]] = {}
    for wait in breakdown.waits or []:
        waits.setdefault((wait.phase, wait.thread, _stack(wait)), []).append(wait.duration_ns)
    for (phase, thread, stack), durations in sorted(waits.items(), key=lambda w: (-sum(w[1]), w[0]))[:MAX_WAITS]:
        times = f" ({len(durations)} times)" if len(durations) > 1 else ""
        yield _figure(
            f"wait in {phase}", sum(durations), f"{printable(thread)}{times}" + (f": {stack}" if stack else "")
        )


def _stack(wait: Wait) -> str:
    """The innermost functions that tell something, as many as fit on the line beside the thread's name."""
    frames = [frame for frame in wait.stack if not frame.startswith("schedule")] or wait.stack
    shown = ""
    for frame in frames[:3]:
        name = printable(frame).split(".")[0]
        longer = f"{shown} < {name}" if shown else name
        if shown and len(longer) + len(wait.thread) > _STACK_ROOM:
            break
        shown = longer
    return shown


def _witnesses(witnesses: list[Witness]) -> Iterator[Row]:
    for witness in witnesses:
        ours = witness.value_ns - witness.difference_ns
        why = f": {printable(witness.explanation, 400)}" if witness.explanation else ""
        text = f"ours {_ms(ours)}, {witness.difference_ns / 1e6:+.3f}{why}"
        yield _figure(witness.name, witness.value_ns, text)


def _trust(breakdown: Breakdown) -> Iterator[Row]:
    """How far the figures can be relied on: the verdict, losses, clocks, doubts."""
    state = breakdown.completeness
    facts = [_counts("lost", state.lost) or "nothing lost", _counts("unpaired", state.unpaired)]
    yield _remark(state.verdict, "; ".join(filter(None, facts)), _VERDICTS.get(state.verdict, ""))
    cost = "cost not measured" if state.observer_ns is None else f"{_ms(state.observer_ns)} ms in all"
    by = f", attached by {', '.join(_tiers(state.attach))}" if state.attach else ""
    yield _remark("  observer", cost + by)
    for reason in state.reasons:
        yield _remark("  because", printable(reason, 400))
    if breakdown.clock.bound_ns or breakdown.clock.offset_ns:
        offset = f"{breakdown.clock.offset_ns / 1e6:+.3f} ms"
        yield _remark("clock of destination", f"{offset}, known to ± {_ms(breakdown.clock.bound_ns)} ms")
    for note in breakdown.notes[:MAX_LISTED]:
        yield _remark("note", printable(note, 400))
    if len(breakdown.notes) > MAX_LISTED:
        yield Row(Text(f"... {len(breakdown.notes) - MAX_LISTED} more notes, all in --format json", "dim"))


def _tiers(attach: dict[str, str]) -> Iterable[str]:
    """`fentry (dirty-log, socket)`: the signals of one tier together, their names only where tiers differ."""
    tiers: dict[str, list[str]] = {}
    for signal, tier in sorted(attach.items()):
        tiers.setdefault(tier, []).append(signal)
    if len(tiers) == 1:
        return [printable(tier) for tier in tiers]
    return [f"{printable(tier)} ({printable(', '.join(signals))})" for tier, signals in sorted(tiers.items())]


def _counts(word: str, counts: dict[str, int]) -> str:
    seen = [f"{printable(probe)} {count}" for probe, count in sorted(counts.items()) if count]
    return f"{word} {', '.join(seen)}" if seen else ""


def _figure(label: str, ns: int, text: str, style: str = "") -> Row:
    """A duration in the same column as those of the phases, and what belongs to it."""
    name = (f"{printable(label, _LABEL):{_LABEL}}", style or "dim")
    return Row(Text.assemble(name, (f"{_ms(ns):>9} ms  ", style), text), _FIGURE_TEXT_AT)


def _remark(label: str, text: str, style: str = "") -> Row:
    return Row(Text.assemble((f"{printable(label, _LABEL):{_TEXT_AT}}", style or "dim"), text), _TEXT_AT)


def _ms(ns: int | None) -> str:
    return "-" if ns is None else f"{ns / 1e6:.3f}"


def _bytes(count: int) -> str:
    """`count` in the largest binary unit that keeps it at 1 or above."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 4)
    return f"{count / (1 << 10 * power):.1f} {'KMGT'[power - 1]}iB"
