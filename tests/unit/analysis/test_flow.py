# SPDX-License-Identifier: Apache-2.0
"""Two flows of bytes: when they can be the two ends of one stream, although a forwarder lies between them."""

from __future__ import annotations

import dataclasses

import pytest
from msgspec.structs import replace

from ebpf_mig.analysis import flow
from ebpf_mig.analysis.flow import Fit, Flow
from ebpf_mig.breakdown import PairedBy, Pairing
from ebpf_mig.recording.events import RECEIVE, SEND, Transfer
from ebpf_mig.report import text
from tests.unit import scripts
from tests.unit.script import UNIX

MS = 1_000_000
KIB = 1 << 10
SENT = [(0, 100), (100, 100), (200, 100), (1000, 40), (1010, 30)]
"""(ms, KiB) of each send; each takes a millisecond."""


def a_flow(calls: list[tuple[float, float]], *, late_ms: float = 0, unseen: int = 0, split: int = 1) -> Flow:
    """`late_ms`: all of it comes later. `unseen`: KiB at the begin that were not seen. `split`: smaller calls."""
    until, begin, end, total = [], [], [], 0
    for at, size in calls:
        for part in range(split):
            total += round(size * KIB / split)
            if total > unseen * KIB:
                until.append(total - unseen * KIB)
                begin.append(round((at + late_ms) * MS) + part)
                end.append(round((at + late_ms + 1) * MS) + part)
    return Flow(1, 1, [0, *until[:-1]], until, begin, end)


def test_a_forwarder_may_delay_and_cut_the_stream_anew() -> None:
    fit = flow.fits(a_flow(SENT), a_flow(SENT, late_ms=3, split=4))
    assert fit == Fit(370 * KIB, True, 3 * MS + 3)


def test_bytes_that_only_one_side_saw_are_at_the_begin() -> None:
    fit = flow.fits(a_flow(SENT), a_flow(SENT, late_ms=3, unseen=150))
    assert fit is not None and not fit.whole and fit.bytes == 220 * KIB
    fit = flow.fits(a_flow(SENT, unseen=150), a_flow(SENT, late_ms=3))
    assert fit is not None and not fit.whole


@pytest.mark.parametrize("at", range(len(SENT) - 1))
@pytest.mark.parametrize("side", ["sent", "received"])
def test_calls_that_are_not_recorded_were_made_all_the_same(side: str, at: int) -> None:
    """Their bytes are in the positions of the calls after them."""
    sides = {"sent": a_flow(SENT), "received": a_flow(SENT, late_ms=3)}
    whole = sides[side]
    lists = (whole.since, whole.until, whole.begin, whole.end)
    sides[side] = Flow(1, 1, *([*values[:at], *values[at + 1 :]] for values in lists))
    fit = flow.fits(**sides)
    assert fit is not None and fit.whole


def test_a_send_that_was_under_way_when_tracing_began() -> None:
    """Only its end is known. Some of its bytes were received before."""
    first = Transfer(90 * MS, 90 * MS, 1, 1, -1, SEND, 1, 1, 100 * KIB, 0, 0, 0, 0, hidden=1)
    then = Transfer(500 * MS, 501 * MS, 1, 1, 7, SEND, 1, 1, 200 * KIB, MS, MS, 0, 100 * KIB)
    (sent,) = flow.flows([first, then], SEND)
    fit = flow.fits(sent, a_flow([(10, 50), (91, 50), (502, 200)]))
    assert fit is not None and fit.whole


def test_a_few_bytes_more_were_looked_at_before_they_were_read() -> None:
    received = a_flow(SENT)
    fit = flow.fits(a_flow(SENT), dataclasses.replace(received, until=[until + 4 for until in received.until]))
    assert fit is not None and fit.whole


@pytest.mark.parametrize(
    ("what", "received"),
    [
        ("it was received before it was sent", a_flow([(0, 100), (50, 200), (1000, 40), (1010, 30)])),
        ("the end came more than a second later", a_flow(SENT, late_ms=1500)),
        ("the end came before", a_flow(SENT, late_ms=-500)),
        ("bytes were on their way for more than a second", a_flow([(0, 100), (1200, 200), (1201, 40), (1202, 30)])),
    ],
)
def test_what_cannot_be_the_same_stream(what: str, received: Flow) -> None:
    sent = a_flow([*SENT[:3], (201, 40), (1010, 30)]) if "way" in what else a_flow(SENT)
    assert flow.fits(sent, received) is None, what


def test_short_streams_are_not_proven_by_their_length() -> None:
    short = [(0.0, 30.0), (10.0, 10.0)]
    fit = flow.fits(a_flow(short), a_flow(short, late_ms=1))
    assert fit is not None and not fit.whole


def test_monitors_and_files_are_no_flow() -> None:
    def transfer(socket: int, calls: int, size: int) -> Transfer:
        return Transfer(1, 2, 1, 1, 7, SEND, socket, calls, size, 1, 1, 0, 0)

    moved = [transfer(5, 100, 20_000), transfer(6, 1, 10_000), transfer(0, 1, 1 << 20), transfer(7, 2, 1 << 20)]
    assert [(f.socket, f.bytes) for f in flow.flows(moved, SEND)] == [(7, 1 << 20)]
    assert flow.flows(moved, RECEIVE) == []


def test_the_best_pair_of_several_connections() -> None:
    main, other = a_flow(SENT), a_flow([(0, 1000), (1010, 1000)])
    found = flow.best([main, other], [a_flow(SENT, late_ms=1), a_flow([(1, 1000), (1011, 1000)])])
    assert found is not None and found[0] is other and found[2].whole


def test_more_connections_that_fit_are_more_alike() -> None:
    """Two migrations by multifd at the same time: of another one's connections, one fits by chance."""
    second = [(0, 1000), (1010, 1000)]
    ours = [a_flow(SENT), a_flow(second)]
    own = [a_flow(SENT, late_ms=1), a_flow([(1, 1000), (1011, 1000)])]
    others = [a_flow(SENT, late_ms=2), a_flow([(-9, 1000), (1001, 1000)])]
    missed = [a_flow([(0.0, 70.0), *SENT[1:]], late_ms=1), own[1]]
    assert flow.likeness(ours, own) == (2, 2)
    assert flow.likeness(ours, others) == (1, 1)
    assert flow.likeness(ours, missed) == (1, 2)
    assert flow.likeness(ours, others[1:]) == (0, 0)


def through_a_forwarder(*, unseen: int = 0) -> Pairing | None:
    """QEMU 7.2 where each side has a connection to a forwarder. The destination missed some bytes at the begin."""
    script = scripts.qemu_7_2()
    source, destination = script.vms
    for vm, inode in ((source, 70), (destination, 80)):
        vm.events = [e for e in vm.events if type(e).__name__ != "Socket"]
        vm.socket(inode, family=UNIX, peer=inode + 500)
    destination.receive(-1900, -1800, 20_000_000 - unseen, socket=80, calls=500)
    earlier = [e for e in destination.events if isinstance(e, Transfer) and e.bytes != 20_000_000 - unseen]
    moved = {id(e): replace(e, position=e.position + 20_000_000 - unseen) for e in earlier}
    first = [replace(e, position=0) for e in destination.events if isinstance(e, Transfer) and id(e) not in moved]
    rest = [e for e in destination.events if not isinstance(e, Transfer)]
    destination.events = [*rest, *first, *moved.values()]
    found = script.result().breakdown
    assert found.blackout_ns is not None
    shown = " ".join(text.render(found).split())
    assert (", likely: 34.0 MiB fit in time" if unseen else "paired by 34.4 MiB equal to the byte") in shown
    return found.migration.pairing


def test_the_report_says_how_sure_the_pairing_is() -> None:
    assert scripts.qemu_7_2().result().breakdown.migration.pairing == Pairing(by=PairedBy.CONNECTION)
    assert through_a_forwarder() == Pairing(by=PairedBy.STREAM, bytes=36_113_000)
    assert through_a_forwarder(unseen=500_000) == Pairing(by=PairedBy.FLOW, bytes=35_613_000)


def test_two_processes_that_share_nothing_were_only_named_together() -> None:
    script = scripts.qemu_7_2()
    for vm in script.vms:
        vm.events = [e for e in vm.events if type(e).__name__ != "Socket"]
    destination = script.vms[1]
    destination.events = [e for e in destination.events if not isinstance(e, Transfer) or e.begin_ns < 10_041_000_000]
    found = script.result().breakdown
    assert found.migration.pairing == Pairing(by=PairedBy.REQUEST)
    assert ", not seen to be connected" in " ".join(text.render(found).split())
