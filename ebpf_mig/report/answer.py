# SPDX-License-Identifier: Apache-2.0
"""The first lines of every report: the downtime, what was migrated, and the diagnosis.

In: a breakdown. Out: words, and rows labelled `mostly`, `because`, `not`, `help`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ebpf_mig.analysis import diagnosis
from ebpf_mig.breakdown import Breakdown, Cause, Diagnosis, Endpoint, Mode, PairedBy, Result, Transport, Verdict
from ebpf_mig.report.rows import Row, percent, words_for
from ebpf_mig.text import ms, printable, size

_MOST_LINES = 3
"""Causes and evidence that are listed; all are in the JSON."""
_ALSO = 0.1
"""Where the largest cause is not known, others of at least this share are listed, too."""
_MODES = {
    Mode.PRECOPY: "pre-copy",
    Mode.POSTCOPY: "post-copy",
    Mode.CPR: "live update (cpr)",
    Mode.UNKNOWN: "unknown mode",
}
_CARRIERS = {
    Transport.TCP: "TCP",
    Transport.UNIX: "a UNIX socket",
    Transport.PIPE: "a pipe",
    Transport.FILE: "a file",
    Transport.UNKNOWN: "an unknown transport",
}


def headline(b: Breakdown) -> str:
    """The downtime with its error bound, or why there is none."""
    return b.diagnosis.headline if b.diagnosis else diagnosis.headline(b)


def verdict(b: Breakdown) -> str:
    """How far the report can be relied upon, in a few words."""
    state = b.completeness
    if state.verdict == Verdict.COMPLETE and state.lost is not None:
        return f"{state.verdict}: no event lost"
    return printable(state.verdict)


def migration(b: Breakdown) -> str:
    """`qemu 7.2.22, pre-copy over TCP, 1 vCPU; completed after 106 ms`."""
    m = b.migration
    known = " ".join(name for name in (m.vmm, m.vmm_version) if name and name != "unknown")
    way = "" if m.transport == Transport.NONE else f" over {_CARRIERS.get(m.transport, printable(m.transport))}"
    if m.through:
        way += f" through {', '.join(map(printable, m.through))}"
    if m.connections is not None and m.connections > 1:
        way += f" ({m.connections} {'files' if m.transport == Transport.FILE else 'connections'})"
    count = len(b.vcpus)
    vcpus = f", {count} vCPU{'s' if count > 1 else ''}" if count else ""
    result = {Result.UNKNOWN: "result unknown"}.get(m.result, printable(m.result))
    after = "" if m.total_ns is None else f" after {ms(m.total_ns)} ms"
    paused = [when for when, was in (("before", m.paused_before), ("after", m.paused_after)) if was]
    after += f"; the guest was paused {' and '.join(paused)}" if paused else ""
    return f"{printable(known) or 'unknown VMM'}, {_MODES.get(m.mode, printable(m.mode))}{way}{vcpus}; {result}{after}"


def ends(b: Breakdown) -> str:
    """`source pid 1 on alpha -> destination pid 2 on beta`."""
    m = b.migration
    if m.mode == Mode.RESTORE and m.source is not None and m.destination is None:
        return f"{_end('', m.source)}, which loaded another guest in place of its own"
    return " -> ".join([_end("source", b.migration.source), _end("destination", b.migration.destination)]) + paired(b)


def paired(b: Breakdown) -> str:
    """How the two sides were found to belong together, if no connection shows it."""
    found = b.migration.pairing
    if found is None or found.by == PairedBy.CONNECTION:
        return ""
    if found.by == PairedBy.REQUEST:
        return ", not seen to be connected"
    moved = size(found.bytes or 0)
    return f", paired by {moved} equal to the byte" if found.by == PairedBy.STREAM else f", likely: {moved} fit in time"


def _end(side: str, end: Endpoint | None) -> str:
    if end is None:
        return f"{side} not traced"
    return f"{side} pid {end.pid}".strip() + (f" on {printable(end.host)}" if end.host else "")


def rows(b: Breakdown) -> Iterator[Row]:
    """The diagnosis; nothing without a downtime."""
    found = b.diagnosis
    if found is None or found.mostly is None:
        return
    most = found.mostly
    words = words_for(most.phase, b.migration.mode)
    yield Row("mostly", f"{most.phase} ({words}): {ms(most.duration_ns)} ms, {percent(most.share)}", style="bold")
    yield from _because(found)
    if found.not_:
        yield Row("not", "; ".join(f"{one.what} ({printable(one.why)})" for one in found.not_))
    for at, text in enumerate(found.help):
        yield Row("help" if not at else "", text)


def _because(found: Diagnosis) -> Iterator[Row]:
    causes = found.because
    if not causes:
        yield Row("because", "not known: nothing was traced that shows a cause")
    elif found.single:
        first = causes[0]
        yield Row("because", ("" if first.known else "not known; ") + _cause(first), style="bold")
        for line in first.evidence[:_MOST_LINES]:
            yield Row("", printable(line, 400))
        if not first.known:
            yield from (Row("", _cause(cause)) for cause in causes[1:_MOST_LINES] if cause.share >= _ALSO)
    else:
        yield Row("because", "no single cause; the largest:", style="bold")
        for cause in causes[:_MOST_LINES]:
            yield Row("", _cause(cause))


def _cause(cause: Cause) -> str:
    return f"{printable(cause.what)}: {ms(cause.duration_ns)} ms, {percent(cause.share)}"


def see(b: Breakdown) -> str:
    """The option that shows more of the largest phase; empty if there is none."""
    return f"--explain {b.diagnosis.mostly.phase}, -v" if b.diagnosis and b.diagnosis.mostly else ""
