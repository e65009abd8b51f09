# SPDX-License-Identifier: Apache-2.0
"""The timeline as a picture: well-formed, to scale, safe to show, and beside the markdown report."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from ebpf_mig.analysis.lanes import Lane, Slice, View, view
from ebpf_mig.breakdown import Side
from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import read_recording
from ebpf_mig.report import markdown, svg
from tests.conftest import requires
from tests.unit import breakdowns
from tests.unit.commands.test_cli import run
from tests.unit.report.browser import browser
from tests.unit.report.test_replay import DATA, RECORDINGS

QEMU = DATA / "qemu-10.0-tcp.rec"
SVG = "{http://www.w3.org/2000/svg}"


def drawn(picture: str) -> list[tuple[str, float, float, str]]:
    """(class, x, width, title) of each rectangle with a title. The parser refuses what is not well-formed."""
    root = ElementTree.fromstring(picture)  # noqa: S314
    found = [(r, r.findtext(f"{SVG}title")) for r in root.iter(f"{SVG}rect")]
    return [(r.attrib["class"], float(r.attrib["x"]), float(r.attrib["width"]), t) for r, t in found if t]


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_phases_are_drawn_to_scale(path: Path) -> None:
    found = analyse(read_recording(path))
    b = found.breakdown
    picture = svg.render(b, view(found))
    assert picture == svg.render(b, view(found))
    assert len(picture.encode()) < 100_000, "it goes into a comment"
    shown = drawn(picture)
    dark = [rect for rect in shown if rect[0] == "dark"]
    assert len(dark) == (b.blackout is not None)
    if b.blackout is None or b.window_ns is None:
        return
    scale = dark[0][2] / (b.blackout[1] - b.blackout[0])
    for phase in b.phases:
        rects = [r for r in shown if r[3].startswith(f"{phase.phase}, ")]
        for begin, end in phase.spans:
            if (end - begin) * scale > 2:
                left, right = (dark[0][1] + (at - b.blackout[0]) * scale for at in (begin, end))
                assert any(x <= left + 0.3 and x + width >= right - 0.3 for _, x, width, _ in rects), phase.phase
        assert sum(r[2] for r in rects) <= (phase.duration_ns or 0) * scale + 2.2 * len(rects)


HOSTILE = "</svg><script>window.hacked=1</script>&\x1b\0\ud800 \u202e"


def hostile() -> str:
    lane = Lane(Side.SOURCE, 1, 1, "ioctl", HOSTILE, [Slice(1, 40_000_000, HOSTILE, {HOSTILE: HOSTILE})])
    strange = Lane(Side.UNKNOWN, 2, 0, "wait", HOSTILE, [Slice(5, 5, "", {})])
    b = msgspec.structs.replace(breakdowns.precopy(), diagnosis=None)
    return svg.render(b, View(0, 0, 50_000_000, [lane, strange], [], 0))


def test_names_cannot_end_the_picture() -> None:
    picture = hostile()
    ElementTree.fromstring(picture)  # noqa: S314
    assert "<script" not in picture and "\x1b" not in picture and "\u202e" not in picture
    assert not re.search(r"(href|src=|url\(|@import)", picture), "it loads nothing"


def test_rows_that_there_is_no_room_for_are_counted() -> None:
    lanes = [Lane(Side.SOURCE, 1, n, "wait", f"t {n}", [Slice(1000, 2000, "sleep")]) for n in range(1, 31)]
    lanes.append(Lane(Side.DESTINATION, 2, 99, "ioctl", "last ioctls", [Slice(5000, 6000, "GET_REGS")]))
    lanes.append(Lane(Side.DESTINATION, 2, 98, "wait", "idle", [Slice(-(10**10), 10**10, "sleep")]))
    picture = svg.render(breakdowns.precopy(), View(0, 0, 50_000_000, lanes, [], 0))
    assert "dst last ioctls" in picture and ">8 more rows are in the HTML report<" in picture and "idle" not in picture


@requires("chromium and chromedriver")
def test_a_browser_shows_it_in_both_schemes(tmp_path: Path) -> None:
    file = tmp_path / "p.svg"
    found = analyse(read_recording(QEMU))
    file.write_text(svg.render(found.breakdown, view(found)))
    with browser() as chromium:
        for scheme, page in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")):
            chromium.open(file, scheme=scheme)
            assert chromium.complaints() == []
            script = "return getComputedStyle(document.querySelector('.page')).fill"
            assert chromium.run(script) == page
        width = chromium.run("return Math.max(...[...document.querySelectorAll('text')].map(t => t.getBBox().x + "
                             "t.getBBox().width))")  # fmt: skip
        assert width <= 960, "no text is cut off"


def test_markdown_shows_the_picture_beside_it(tmp_path: Path) -> None:
    report = tmp_path / "a b.md"
    done = run("report", str(QEMU), "--format", "markdown", "-o", str(report))
    assert done.returncode == 0, done.stderr
    page = report.read_text()
    assert "\n![Timeline of the window](a%20b.svg)\n" in page
    assert len(re.sub(r"<details>.*?</details>\n?", "", page, flags=re.DOTALL).splitlines()) <= markdown.VISIBLE
    assert (tmp_path / "a b.svg").read_text() == run("report", str(QEMU), "--format", "svg").stdout
    assert "![" not in run("report", str(QEMU), "--format", "markdown").stdout


def test_no_picture_of_the_users_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("mine")
    report = str(tmp_path / "a.md")
    done = run("report", str(QEMU), "--format", "markdown", "-o", report)
    assert done.returncode == 2 and "a.svg exists" in done.stderr and not Path(report).exists()
    assert (tmp_path / "a.svg").read_text() == "mine"
    assert run("report", str(QEMU), "--format", "markdown", "-o", report, "--force").returncode == 0
    done = run("report", str(QEMU), "--format", "markdown", "-o", str(tmp_path / "b.svg"))
    assert done.returncode == 2 and "use --format svg" in done.stderr
