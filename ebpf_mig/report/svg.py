# SPDX-License-Identifier: Apache-2.0
"""The timeline of the window as an SVG picture, for a comment or a document beside the markdown report.

In: a breakdown and the recording's lanes. Out: an SVG file that loads nothing, runs nothing, and follows the reader's
light or dark scheme. It shows the window; without one, the whole recording. Text from the recording is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from ebpf_mig.analysis.lanes import View
from ebpf_mig.breakdown import Breakdown, Span
from ebpf_mig.report import answer
from ebpf_mig.report.embedded import asset
from ebpf_mig.report.timeline import KINDS, Band, Stroke, bands
from ebpf_mig.text import printable

_WIDTH, _GUTTER, _ROW, _TOP = 960, 230, 18, 58
_PLOT = _WIDTH - _GUTTER - 10
_LETTER = 6.9
"""Pixels that a letter needs, on average."""
_MOST_ROWS = 24
_IMPORTANCE = ("phase", "vcpu", "slot", "ioctl", "socket", "segment", "mark", "wait")
_STYLE = """text { font: 12px system-ui, sans-serif; fill: var(--text) } .soft { fill: var(--soft) }
.page { fill: var(--page) } .band { fill: var(--band) } .dark { fill: var(--blackout) } line { stroke: var(--line) }
.on { fill: var(--page); pointer-events: none }
"""
_HUES = ("source", "destination", "both", "unknown", "warn", *KINDS)


def render(b: Breakdown, view: View) -> str:
    """The picture with a final newline; the same input gives the same bytes."""
    return "".join(_picture(b, view))


def _picture(b: Breakdown, view: View) -> Iterator[str]:
    window = (0, b.window_ns) if b.window_ns else (view.begin_ns - view.origin_ns, view.end_ns - view.origin_ns)
    around = max(window[1] - window[0], 1) // 33
    shown = (window[0] - around, max(window[1], window[0] + 1) + around)
    rows, left_out = _chosen(b, view, shown)
    height = _TOP + _ROW * len(rows) + 30
    title = escape(printable(answer.headline(b)))
    yield f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' width='{_WIDTH}' role='img' "
    yield f"aria-labelledby='title'>\n<title id='title'>{title}: timeline</title>\n"
    yield f"<style>\n{asset('palette.css')}{_STYLE}"
    yield "".join(f".{name} {{ fill: var(--{name}) }} " for name in _HUES)
    yield f"\n</style>\n<rect class='page' width='{_WIDTH}' height='{height}'/>\n"
    yield f"<text x='8' y='20' style='font-size: 15px'>{title}</text>\n"
    yield from (
        f"<rect class='band' x='0' y='{_TOP + at * _ROW}' width='{_WIDTH}' height='{_ROW}'/>\n"
        for at in range(1, len(rows), 2)
    )
    yield from _scale(b, shown, height - 30)
    for at, band in enumerate(rows):
        yield from _row(band, shown, _TOP + at * _ROW)
    yield from _legend(rows, height - 10)
    if left_out:
        more = f"{left_out} more rows are in the HTML report"
        yield f"<text class='soft' x='{_WIDTH - 10}' y='20' text-anchor='end'>{more}</text>\n"
    yield "</svg>\n"


def _chosen(b: Breakdown, view: View, shown: Span) -> tuple[list[Band], int]:
    """The rows in which something happens, and how many of them there is no room for."""
    found = []
    for band in bands(b, view):
        strokes = [s for s in band.strokes if s.end >= shown[0] and s.begin <= shown[1]]
        idle = band.kind == "wait" and len(strokes) == 1 and strokes[0].begin <= shown[0] and strokes[0].end >= shown[1]
        if strokes and not idle:
            found.append(band._replace(strokes=strokes))
    first = sorted(range(len(found)), key=lambda at: _IMPORTANCE.index(found[at].kind))[:_MOST_ROWS]
    return [found[at] for at in sorted(first)], len(found) - len(first)


def _x(at: int, shown: Span) -> float:
    inside = min(max(at, shown[0]), shown[1])
    return _GUTTER + _PLOT * (inside - shown[0]) / (shown[1] - shown[0])


def _scale(b: Breakdown, shown: Span, bottom: int) -> Iterator[str]:
    """The blackout's band and the axis in ms."""
    if b.blackout is not None:
        left, right = (_x(at, shown) for at in b.blackout)
        yield f"<rect class='dark' x='{left:.1f}' y='30' width='{right - left:.1f}' height='{bottom - 30}'>"
        yield "<title>no vCPU runs</title></rect>\n"
    step = _step(shown[1] - shown[0])
    digits = max(0, 6 - (len(str(step)) - 1))
    for at in range(-(-shown[0] // step) * step, shown[1] - step // 2, step):
        left = _x(at, shown)
        yield f"<line x1='{left:.1f}' x2='{left:.1f}' y1='30' y2='{bottom}'/>"
        yield f"<text class='soft' x='{left + 3:.1f}' y='44'>{at / 1e6:.{digits}f} ms</text>\n"


def _step(span: int) -> int:
    """1, 2 or 5 times a power of ten ns, so that the span has at most eight steps."""
    power = 1
    while True:
        for times in (1, 2, 5):
            if span // (power * times) <= 8:
                return power * times
        power *= 10


def _row(band: Band, shown: Span, top: int) -> Iterator[str]:
    label = _fitted(printable(band.label), int((_GUTTER - 14) / _LETTER))
    yield f"<text x='8' y='{top + 13}'>{escape(label)}</text>\n"
    for stroke, count in _drawable(band.strokes, (shown[1] - shown[0]) // _PLOT):
        left, right = _x(stroke.begin, shown), _x(stroke.end, shown)
        width = max(right - left, 1)
        name = escape(printable(stroke.name))
        hue = stroke.colour if stroke.colour in _HUES else band.kind if band.kind in _HUES else "both"
        yield f"<rect class='{hue}' x='{left:.1f}' y='{top + 2}' width='{width:.1f}' height='{_ROW - 4}'>"
        yield f"<title>{name}, {escape(_about(stroke, count))}</title></rect>\n"
        if width > _LETTER * len(stroke.name) + 6:
            yield f"<text class='on' x='{left + 3:.1f}' y='{top + 13}'>{name}</text>\n"


def _about(stroke: Stroke, count: int) -> str:
    took = f"{(stroke.end - stroke.begin) / 1e6:.3f} ms"
    if count > 1:
        return f"{count} times within {took}"
    return f"{took}: {printable(stroke.note, 400)}" if stroke.note else took


def _fitted(label: str, room: int) -> str:
    """A label too long for its place loses its middle: what tells rows apart is at its ends."""
    return label if len(label) <= room else f"{label[: room // 2 - 1]}…{label[-(room // 2) :]}"


def _drawable(strokes: Sequence[Stroke], pixel: int) -> Iterator[tuple[Stroke, int]]:
    """The strokes and how many each stands for: those of one name nearer than a pixel are drawn as one.

    One of another name that would only paint over the last pixel is left out: there can be thousands.
    """
    last, count = strokes[0], 1
    for stroke in strokes[1:]:
        if stroke.name == last.name and stroke.begin - last.end < pixel:
            last, count = last._replace(end=max(last.end, stroke.end)), count + 1
        elif stroke.end - last.end >= pixel:
            yield last, count
            last, count = stroke, 1
    yield last, count


def _legend(rows: Sequence[Band], y: int) -> Iterator[str]:
    x = 8.0
    for kind in (kind for kind in KINDS if any(row.kind == kind for row in rows)):
        yield f"<rect class='{kind}' x='{x:.1f}' y='{y - 9}' width='10' height='10'/>"
        yield f"<text class='soft' x='{x + 14:.1f}' y='{y}'>{KINDS[kind]}</text>\n"
        x += 28 + 5.9 * len(KINDS[kind])
