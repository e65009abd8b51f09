# SPDX-License-Identifier: Apache-2.0
"""The drawings of the HTML report that are not the timeline: convergence of the passes, parts of the final fetch.

In: a breakdown. Out: HTML fragments with SVG, empty if there is nothing to show. Every drawing also has
a table with its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

from ebpf_mig.breakdown import Breakdown, Split
from ebpf_mig.report import html_markup as markup

_WIDTH, _HEIGHT = 1000, 100


def convergence(b: Breakdown) -> Iterator[str]:
    """The passes as bars on a time axis: width is duration, height is bytes sent; the last bar is the blackout."""
    passes = b.dirty_log.passes
    sent = [p.bytes for p in passes if p.bytes is not None]
    if not passes or len(sent) < len(passes):
        return
    begins = [p.begin for p in passes]
    stop = b.blackout[0] if b.blackout else None
    end = b.blackout[1] if b.blackout else max(p.begin + p.kernel_ns + p.user_ns + (p.send_ns or 0) for p in passes)
    bars = [
        (begin, following, size, "source", f"pass {number}")
        for number, (size, begin, following) in enumerate(
            zip(sent, begins, [*begins[1:], end if stop is None else stop], strict=True), 1
        )
    ]
    final = b.dirty_log.final
    if final is not None and stop is not None:
        bars.append((stop, end, final.bytes or 0, "unattributed", "in the blackout"))
    first, span = begins[0], max(1, end - begins[0])
    most = max(size for _, _, size, _, _ in bars) or 1
    yield f"<svg class='chart' viewBox='0 0 {_WIDTH} {_HEIGHT}' preserveAspectRatio='none' role='img' "
    yield "aria-label='What each pass sent; the numbers are in the table'>"
    for begin, following, size, name, label in bars:
        x, width = _WIDTH * (begin - first) / span, max(_WIDTH * (following - begin) / span, 2)
        height = max(_HEIGHT * size / most, 1)
        yield f"<rect class='{name}' x='{x:.2f}' y='{_HEIGHT - height:.2f}' width='{width:.2f}' height='{height:.2f}'>"
        yield f"<title>{label}: {markup.size(size)}</title></rect>"
    yield "</svg>\n<p class='soft'>Bars are as wide as a pass took and as high as what it sent"
    if final is not None and stop is not None:
        yield f"; the last is the blackout. {markup.size(sent[0])} in the first pass, "
        yield f"{markup.size(sent[-1])} in the last, {markup.size(final.bytes)} left for the blackout"
    yield ".</p>\n"


def split(b: Breakdown) -> Iterator[str]:
    """What the final fetch did on the CPU, part by part, with error bars where it is estimated from samples."""
    whole = _whole(b)
    if whole is None:
        return
    parts, errors = whole.parts, whole.errors
    total = sum(parts.values())
    if not total:
        return
    scale = max(ns + (errors[name] or 0) for name, ns in parts.items())
    rows = [
        f"<td>{name}</td><td class='n'>{markup.milliseconds(ns)}</td>"
        f"<td class='n'>{markup.milliseconds(errors[name])}</td>"
        f"<td class='n'>{100 * ns / total:.1f} %</td><td class='bars'>{_bar(ns, errors[name], scale)}</td>"
        for name, ns in parts.items()
    ]
    yield markup.table("split", ("inside the ioctls", "#ms", "#± ms", "#share", ""), rows)
    samples = whole.samples
    yield "<p class='soft'>"
    yield (
        "Measured at each call's begin and end." if samples == "exact" else f"From {samples} samples; ± holds at 95 %."
    )
    yield "</p>\n"


def _whole(b: Breakdown) -> Split | None:
    """The parts of all ioctls of the final fetch together; None if none is known."""
    return b.dirty_log.final.split if b.dirty_log.final is not None else None


def _bar(ns: int, error: int | None, scale: int) -> str:
    """A bar with its confidence interval."""
    at, drawn = _WIDTH * ns / scale, ""
    if error is not None:
        low, high = max(0.0, at - _WIDTH * error / scale), at + _WIDTH * error / scale
        drawn = f"<path class='error' d='M{low:.1f} 5H{high:.1f}M{low:.1f} 2V8M{high:.1f} 2V8'/>"
    return (
        f"<svg class='bar' viewBox='0 0 {_WIDTH} 10' preserveAspectRatio='none' aria-hidden='true'>"
        f"<rect class='source' x='0' y='0' height='10' width='{max(at, 1):.1f}'/>{drawn}</svg>"
    )
