# SPDX-License-Identifier: Apache-2.0
"""`report --explain PHASE`: everything that the recording has on one phase.

In: an `Analysis` and a phase. Out: text of 80 to 100 columns: what the phase is, when it was, which causes lie in it
with their evidence, each wait with its whole stack, the KVM ioctls by name, the sends and receives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from rich.text import Text

from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.result import Analysis
from ebpf_mig.analysis.spans import Cover
from ebpf_mig.breakdown import PHASES, Phase, PhaseName, Side
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import SEND
from ebpf_mig.report.canvas import PLAIN, Canvas
from ebpf_mig.report.rows import Row, percent, phase_rows, words_for
from ebpf_mig.report.schema import field_docs
from ebpf_mig.report.text import printed
from ebpf_mig.text import ms, printable, size

_MOST = 10
"""Rows of a kind."""
_LABEL_AT = 13


def render(analysis: Analysis, phase: PhaseName, canvas: Canvas = PLAIN) -> str:
    """The page on one phase, with a final newline."""
    return printed(_lines(analysis, phase), canvas)


def _lines(analysis: Analysis, name: PhaseName) -> Iterator[tuple[Text, int]]:
    none = Phase(phase=name, side=dict(PHASES)[name], duration_ns=0, spans=[])
    phase = next((p for p in analysis.breakdown.phases if p.phase == name), none)
    yield Text(f"{name}: {words_for(name, analysis.breakdown.migration.mode)}", "bold"), 2
    yield Text(field_docs(PhaseName)[name.name]), 0
    yield Text(), 0
    before = ""
    for row in _rows(analysis, phase):
        label = "" if row.label == before else row.label
        before = row.label
        yield Text.assemble((f"{label:{_LABEL_AT}}", "dim"), row.text), _LABEL_AT


def _rows(analysis: Analysis, phase: Phase) -> Iterator[Row]:
    b = analysis.breakdown
    if phase.duration_ns is None:
        yield Row("time", "not measured")
        return
    if not phase.spans:
        yield Row("time", "not seen")
        return
    for part in phase_rows(b):
        if part.phase == phase.phase:
            where = f"{part.where} of the downtime" if part.share is not None else f"{part.place} the downtime".strip()
            yield Row("time", f"{part.took} ms, {where}")
    yield from _listed("from, until", (f"{ms(begin)} to {ms(end)} ms" for begin, end in phase.spans))
    for cause in b.diagnosis.because if b.diagnosis else ():
        if cause.phase == phase.phase:
            known = "" if cause.known else "not known; "
            yield Row("because", f"{known}{printable(cause.what)}: {ms(cause.duration_ns)} ms, {percent(cause.share)}")
            yield from (Row("because", f"  {printable(line, 400)}") for line in cause.evidence)
    for wait in b.waits or ():
        if wait.phase == phase.phase:
            stack = " < ".join(map(printable, [*wait.stack, *wait.user_stack])) or "no stack"
            yield Row("wait", f"{ms(wait.duration_ns)} ms {printable(wait.thread)}: {stack}")
    cover = Cover((begin + analysis.origin_ns, end + analysis.origin_ns) for begin, end in phase.spans)
    for side, process in ((Side.SOURCE, analysis.traced.source), (Side.DESTINATION, analysis.traced.destination)):
        if process is not None and phase.side in (side, Side.BOTH):
            yield from _listed(f"{side} calls"[: _LABEL_AT - 1], _calls(process, cover))
            yield from _listed("sockets", _transfers(analysis, process, side, cover))


def _listed(label: str, texts: Iterable[str]) -> Iterator[Row]:
    every = list(texts)
    yield from (Row(label, text) for text in every[:_MOST])
    if len(every) > _MOST:
        yield Row(label, f"... {len(every) - _MOST} more")


def _calls(process: Process, cover: Cover) -> Iterator[str]:
    """KVM ioctls by name, those that took longest first; only their part in the phase counts."""
    sums: dict[str, list[int]] = defaultdict(list)
    for ioctl in process.ioctls:
        if inside := cover.within(ioctl.begin_ns, ioctl.end_ns):
            sums[kvm.name_of(ioctl.cmd)].append(inside)
    for name, parts in sorted(sums.items(), key=lambda item: (-sum(item[1]), item[0])):
        yield f"{printable(name)}: {len(parts)} in {ms(sum(parts))} ms, the longest {ms(max(parts))}"


def _transfers(analysis: Analysis, process: Process, side: Side, cover: Cover) -> Iterator[str]:
    """Sends and receives on the migration's sockets that lie in the phase."""
    channels = analysis.traced.channels
    own = channels.source if side == Side.SOURCE else channels.destination
    sums: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0, 0])
    for transfer in process.transfers:
        inside = cover.within(transfer.begin_ns, transfer.end_ns)
        if transfer.socket in own and inside:
            found = sums[transfer.direction, transfer.socket]
            found[0] += transfer.calls
            found[1] += transfer.bytes
            found[2] += inside
    for (direction, _), (calls, count, took) in sorted(sums.items()):
        word = "sent" if direction == SEND else "received"
        yield f"{side} {word} {size(count)} in {calls} call{'s' if calls != 1 else ''} of {ms(took)} ms"
