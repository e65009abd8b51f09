# SPDX-License-Identifier: Apache-2.0
"""The rows of a drawn timeline: the phases, the passes, then the recording's lanes by side. HTML and SVG draw the same.

In: a breakdown and the recording's lanes. Out: `Band`s, with times in ns from the window's begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ebpf_mig.analysis.lanes import Args, Lane, View
from ebpf_mig.breakdown import Breakdown, PhaseName, Side
from ebpf_mig.text import ms, printable

SIDES = {Side.SOURCE: "src", Side.DESTINATION: "dst"}
KINDS = {
    "vcpu": "vCPU runs the guest",
    "slot": "dirty-log call on a memslot",
    "ioctl": "KVM ioctl",
    "socket": "send or receive",
    "segment": "TCP segment arrives",
    "wait": "off the CPU",
    "mark": "reported by the VMM",
}
"""Each kind of lane in the order of the rows, and what its slices mean."""
_ORDER, _SIDES = tuple(KINDS), (Side.SOURCE, Side.DESTINATION, Side.UNKNOWN)


class Stroke(NamedTuple):
    """An activity in a row."""

    begin: int
    end: int
    name: str
    note: str = ""
    """Its arguments in words."""
    colour: str = ""
    """The name of its colour, if that is not its row's kind."""


class Band(NamedTuple):
    """A row. Its strokes are in order and do not overlap."""

    label: str
    kind: str
    """`phase`, or one of `KINDS`."""
    strokes: list[Stroke]


def bands(b: Breakdown, view: View) -> Iterator[Band]:
    """The rows from the top; only those that have strokes."""
    spans = sorted((*span, p.phase, p.side) for p in b.phases for span in p.spans)
    if spans:
        yield Band(
            "phases", "phase", [Stroke(begin, end, phase, "", _hue(phase, side)) for begin, end, phase, side in spans]
        )
    if b.dirty_log.passes:
        fetched = [Stroke(p.begin, p.begin + p.kernel_ns + p.user_ns, "fetch") for p in b.dirty_log.passes]
        yield Band("pre-copy passes", "slot", fetched)
    for lane in sorted(view.lanes, key=lambda one: (_SIDES.index(one.side), _ORDER.index(one.kind))):
        yield Band(_label(lane), lane.kind, [_stroke(s.begin_ns, s.end_ns, s.name, s.args, view) for s in lane.slices])


def _hue(phase: str, side: str) -> str:
    return "warn" if phase == PhaseName.UNATTRIBUTED else side


def _label(lane: Lane) -> str:
    return f"{SIDES.get(lane.side, '?')} {printable(lane.name)}"


def _stroke(begin: int, end: int, name: str, args: Args, view: View) -> Stroke:
    shown = (
        (key, ms(value) + " ms") if key.endswith("_ns") and isinstance(value, int) else (key, value)
        for key, value in args.items()
        if key != "in"
    )
    # Where there is room for one word, the function in which a thread slept says more than that it did.
    name = str(args.get("in") or name)
    note = ", ".join(f"{key.removesuffix('_ns').replace('_', ' ')} {value}" for key, value in shown)
    return Stroke(begin - view.origin_ns, end - view.origin_ns, name, note)
