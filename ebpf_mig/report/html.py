# SPDX-License-Identifier: Apache-2.0
"""The HTML report: one self-contained file with a zoomable timeline and all figures as tables.

In: a breakdown and the recording's lanes. Out: a page that loads nothing and may load nothing (its content security
policy forbids it). All text from the recording is escaped, and the embedded data cannot end its script element.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from ebpf_mig.analysis.lanes import Lane, View
from ebpf_mig.breakdown import Breakdown, PhaseName, Side
from ebpf_mig.report import html_charts as charts
from ebpf_mig.report import html_tables as tables
from ebpf_mig.report import whatif
from ebpf_mig.report.html_tables import escaped, milliseconds
from ebpf_mig.text import printable

_ORDER = ("vcpu", "slot", "ioctl", "socket", "segment", "wait", "mark")
_LEGEND = {
    "vcpu": "vCPU runs the guest",
    "slot": "dirty-log call on a memslot",
    "ioctl": "KVM ioctl",
    "socket": "send or receive",
    "segment": "TCP segment arrives",
    "wait": "off the CPU",
    "mark": "reported by the VMM",
}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(breakdown: Breakdown, view: View) -> str:
    """The page; the same input gives the same bytes."""
    return "".join(_page(breakdown, view))


_SUMMARY_STYLE = """.ebpf-mig table { border-collapse: collapse; width: 100%; max-width: 60rem }
.ebpf-mig td.n, .ebpf-mig th.n { text-align: right } .ebpf-mig td.bars { width: 45% }
.ebpf-mig svg.bar { display: block; width: 100%; height: 1.1em }
.ebpf-mig .source { fill: #0a66c2 } .ebpf-mig .destination { fill: #8a3ffc } .ebpf-mig .both { fill: #5f6b7a }
.ebpf-mig .unattributed { fill: #b35900 }
"""


def summary(breakdown: Breakdown) -> str:
    """The headline, the facts and the waterfall as a fragment, to embed in other pages (a notebook)."""
    parts = (*tables.facts(breakdown), *tables.diagnosis(breakdown), *tables.waterfall(breakdown))
    head = f"<div class='ebpf-mig'>\n<style>{_SUMMARY_STYLE}</style>\n<h3>{escaped(tables.headline(breakdown))}</h3>\n"
    return f"{head}{''.join(parts)}</div>"


def _page(b: Breakdown, view: View) -> Iterator[str]:
    title = escaped(tables.headline(b))
    yield "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
    yield f"<title>{title}</title>\n<style>\n{_asset('report.css')}</style>\n</head>\n<body>\n"
    yield f"<h1>{title}</h1>\n"
    yield from tables.facts(b)
    yield from tables.diagnosis(b)
    for name, section in (
        ("Where it went", tables.waterfall(b)),
        ("At a glance", tables.glance(b)),
        ("What if", whatif.html(b)),
        ("Timeline", _timeline(b)),
        ("vCPUs", tables.vcpus(b)),
        ("Final dirty-log fetch", itertools.chain(charts.split(b), tables.fetch(b))),
        ("Pre-copy passes", itertools.chain(charts.convergence(b), tables.passes(b))),
        ("Sockets", tables.sockets(b)),
        ("In flight", tables.wire(b)),
        ("Waits", tables.waits(b)),
        ("Witnesses", tables.witnesses(b)),
        ("Completeness", tables.completeness(b)),
    ):
        body = "".join(section)
        if body:
            yield f"<section>\n<h2>{name}</h2>\n{body}</section>\n"
    yield f"<script type='application/json' id='data'>{_data(b, view)}</script>\n"
    yield f"<script>\n{_asset('report.js')}</script>\n</body>\n</html>\n"


def _timeline(b: Breakdown) -> Iterator[str]:
    yield "<div id='tools'><button id='zoom-in'>Zoom in</button> <button id='zoom-out'>Zoom out</button> "
    yield "<button id='show-window'>Window</button> <button id='show-all'>Whole recording</button></div>\n"
    yield "<p class='soft'>Drag to move; Ctrl and wheel, pinch, or + and - to zoom. "
    yield f"0 is the {'pause request' if b.window_ns is not None else 'beginning of the migration'}.</p>\n"
    yield "<div id='timeline'></div>\n<p id='tip' class='soft' aria-live='polite'></p>\n<p id='legend'>"
    for kind, what in _LEGEND.items():
        yield f"<span><i style='background:var(--{kind})'></i>{what}</span>"
    yield "</p>\n<details><summary id='count'>Calls in view</summary>\n<div class='scroll'><table id='calls'>"
    yield "<thead><tr><th>lane</th><th>call</th><th class='n'>at ms</th><th class='n'>ms</th><th>details</th></tr>"
    yield "</thead><tbody></tbody></table></div></details>\n"


def _data(b: Breakdown, view: View) -> str:
    """The data that the script draws: each name and note once, slices as flat numbers, ns from the window's begin."""
    names, notes = _Interned(), _Interned()
    notes.of("")
    origin = view.origin_ns
    phases: list[int] = []
    sides: dict[int, str] = {}
    for begin, end, phase, side in sorted((*span, p.phase, p.side) for p in b.phases for span in p.spans):
        sides[names.of(phase)] = "warn" if phase == PhaseName.UNATTRIBUTED else side
        phases += [begin, end, names.of(phase), 0]
    lanes: list[dict[str, Any]] = [{"label": "phases", "kind": "phase", "v": phases}] if phases else []
    fetches = [
        number
        for p in b.dirty_log.passes
        for number in (p.begin, p.begin + p.kernel_ns + p.user_ns, names.of("fetch"), 0)
    ]
    if fetches:
        lanes.append({"label": "pre-copy passes", "kind": "slot", "v": fetches})
    sides_order = (Side.SOURCE, Side.DESTINATION, Side.UNKNOWN)
    for lane in sorted(view.lanes, key=lambda one: (sides_order.index(one.side), _ORDER.index(one.kind))):
        v = [
            number
            for s in lane.slices
            for number in (s.begin_ns - origin, s.end_ns - origin, names.of(s.name), notes.of(_note(s.args)))
        ]
        lanes.append({"label": _label(lane), "kind": lane.kind, "v": v})
    data = {
        "window": b.window_ns,
        "blackout": b.blackout,
        "range": [view.begin_ns - origin, view.end_ns - origin],
        "names": names.all,
        "notes": notes.all,
        "sides": sides,
        "lanes": lanes,
    }
    return (
        json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    )


def _label(lane: Lane) -> str:
    return f"{tables.SIDES.get(lane.side, '?')} {printable(lane.name)}"


def _note(args: dict[str, int | str]) -> str:
    shown = (
        (name, milliseconds(v) + " ms") if name.endswith("_ns") and isinstance(v, int) else (name, v)
        for name, v in args.items()
    )
    return ", ".join(f"{name.removesuffix('_ns').replace('_', ' ')} {value}" for name, value in shown)


class _Interned:
    """Each text once, by number."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._known: dict[str, int] = {}

    def of(self, text: str) -> int:
        """The text's number."""
        found = self._known.get(text)
        if found is None:
            found = self._known[text] = len(self.all)
            self.all.append(printable(text, 400))
        return found


def _asset(name: str) -> str:
    return (files("ebpf_mig.report") / "assets" / name).read_text("utf-8")
