# SPDX-License-Identifier: Apache-2.0
"""The HTML report: one self-contained file with a zoomable timeline and all figures as tables.

In: a breakdown and the recording's lanes. Out: a page that loads nothing and may load nothing (its content security
policy forbids it). All text from the recording is escaped, and the embedded data cannot end its script element.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from ebpf_mig.analysis.lanes import View
from ebpf_mig.breakdown import Breakdown
from ebpf_mig.report import html_charts as charts
from ebpf_mig.report import html_dirty_log, terms, timeline, whatif
from ebpf_mig.report import html_frame as frame
from ebpf_mig.report import html_tables as tables
from ebpf_mig.report.html_markup import escaped
from ebpf_mig.text import printable

_KEYS = (
    ("W S", "zoom in, zoom out, at the pointer"),
    ("A D", "move to the left, to the right"),
    ("+ -", "zoom in, zoom out"),
    ("← →", "move"),
    ("Home", "show the window"),
    ("?", "show this list"),
    ("Esc", "close this list, or an explanation"),
)
"""As in Perfetto, where it has the same."""


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
    return f"{head}{terms.plain(''.join(parts))}</div>"


def _page(b: Breakdown, view: View) -> Iterator[str]:
    body = [*tables.facts(b), *tables.diagnosis(b)]
    for name, section in (
        ("Where it went", tables.waterfall(b)),
        ("At a glance", tables.glance(b)),
        ("What if", whatif.html(b)),
        ("Timeline", _timeline(b)),
        ("vCPUs", tables.vcpus(b)),
        ("Page faults after the start", tables.page_faults(b)),
        ("Final dirty-log fetch", itertools.chain(charts.split(b), html_dirty_log.fetch(b))),
        ("Pre-copy passes", itertools.chain(charts.convergence(b), html_dirty_log.passes(b))),
        ("Sockets", tables.sockets(b)),
        ("In flight", tables.wire(b)),
        ("Waits", tables.waits(b)),
        ("Witnesses", tables.witnesses(b)),
        ("Completeness", tables.completeness(b)),
    ):
        body += frame.section(name, "".join(section))
    data = f"<script type='application/json' id='data'>{_data(b, view)}</script>\n"
    return frame.page(tables.headline(b), body, data, ("report.js",))


def _timeline(b: Breakdown) -> Iterator[str]:
    yield "<div id='tools'><button id='zoom-in'>Zoom in</button> <button id='zoom-out'>Zoom out</button> "
    yield "<button id='show-window'>Window</button> <button id='show-all'>Whole recording</button> "
    yield "<button id='show-keys' aria-haspopup='dialog'>Keys (?)</button></div>\n"
    yield "<p class='soft'>Drag to move; W, S or Ctrl and wheel to zoom, A and D to move, ? for all keys. "
    yield f"0 is the {'pause request' if b.window_ns is not None else 'beginning of the migration'}.</p>\n"
    yield "<div id='timeline'></div>\n<div id='tip' role='status' hidden></div>\n<p id='legend'>"
    for kind, what in timeline.KINDS.items():
        yield f"<span><i style='background:var(--{kind})'></i>{what}</span>"
    yield "</p>\n<dialog id='keys' aria-labelledby='keys-title'><h3 id='keys-title'>Keys</h3>\n<dl>"
    for keys, what in _KEYS:
        yield f"<dt>{''.join(f'<kbd>{key}</kbd>' for key in keys.split())}</dt><dd>{what}</dd>"
    yield "</dl>\n<form method='dialog'><button>Close</button></form></dialog>\n"
    yield "<details><summary id='count'>Calls in view</summary>\n<div class='scroll'><table id='calls'>"
    yield "<thead><tr><th>lane</th><th>call</th><th class='n'>at ms</th><th class='n'>ms</th><th>details</th></tr>"
    yield "</thead><tbody></tbody></table></div></details>\n"


def _data(b: Breakdown, view: View) -> str:
    """The data that the script draws: each name and note once, slices as flat numbers, ns from the window's begin."""
    names, notes = _Interned(), _Interned()
    notes.of("")
    lanes: list[dict[str, Any]] = []
    sides: dict[int, str] = {}
    for band in timeline.bands(b, view):
        v: list[int] = []
        for stroke in band.strokes:
            v += (stroke.begin, stroke.end, names.of(stroke.name), notes.of(stroke.note))
            if stroke.colour:
                sides[names.of(stroke.name)] = stroke.colour
        lanes.append({"label": band.label, "kind": band.kind, "v": v})
    data = {
        "window": b.window_ns,
        "blackout": b.blackout,
        "range": [view.begin_ns - view.origin_ns, view.end_ns - view.origin_ns],
        "names": names.all,
        "notes": notes.all,
        "sides": sides,
        "lanes": lanes,
    }
    return (
        json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    )


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
