# SPDX-License-Identifier: Apache-2.0
"""`bench` and `diff` as HTML pages: the rows of the text, and every run in the distributions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ebpf_mig.compare.benchmark import Benchmark, Run, encode
from ebpf_mig.report.compare_html import render
from ebpf_mig.report.compare_rows import Sheet, of_bench
from tests.conftest import npm_package, requires
from tests.unit.commands.test_cli import run
from tests.unit.compare.test_diff import bench
from tests.unit.report.browser import browser
from tests.unit.report.test_compare_markdown import EVIL, GATE, SHEETS, compared
from tests.unit.report.test_html_reading import CUT

EVIL_BENCH = Benchmark(scenario=EVIL, kernel=EVIL, runs=[*bench(4, 1).runs, Run(breakdown=None, error=EVIL)])


def plain(page: str) -> str:
    """The text of the page's body."""
    return re.sub(r"<[^>]+>", " ", page[page.index("<body>") :]).replace("&gt;", ">")


@pytest.mark.parametrize("name", SHEETS)
def test_it_has_every_row(name: str) -> None:
    sheet = SHEETS[name]
    page = render(sheet)
    assert page == render(sheet) and "http:" not in page and "https:" not in page
    words = set(plain(page).split())
    for line in sheet.lines:
        assert set(" ".join(line.cells).split()) <= words, line
    for gate in sheet.gate:
        assert set(f"{gate.outcome} {gate.condition} {gate.why}".split()) <= words
    assert set(" ".join((*sheet.notes, *sheet.results, *sheet.about)).split()) <= words


def test_names_do_nothing() -> None:
    for page in (render(of_bench(EVIL_BENCH)), render(compared(EVIL_BENCH, EVIL_BENCH, names=(EVIL, EVIL)))):
        assert "<img" not in page and "\x1b" not in page and "<c" not in page.replace("<circle", "")


def dots(sheet: Sheet, figure: str) -> list[tuple[str, float]]:
    """The circles of a figure's row."""
    row = next(part for part in render(sheet).split("<tr>") if part.startswith("<td") and f">{figure}</button>" in part)
    return [(side, float(x)) for side, x in re.findall(r"<circle class='(\w+)' cx='([\d.]+)'", row)]


def test_every_run_is_a_dot_at_its_place() -> None:
    a, b = bench(12, 1), bench(7, 2, by_ms=5)
    found = dots(compared(a, b), "blackout")
    values = [*a.sample("blackout"), *b.sample("blackout")]
    low, high = min(values), max(values)
    for side, wanted in (("source", a), ("destination", b)):
        places = sorted(3.5 + 393 * (v - low) / (high - low) for v in wanted.sample("blackout"))
        assert [x for name, x in found if name == side] == pytest.approx(places, abs=0.06)
    assert {side for side, _ in dots(of_bench(a), "blackout")} == {"source"}


@requires("chromium and chromedriver")
def test_in_a_browser(tmp_path: Path) -> None:
    axe = npm_package("axe-core")
    with browser() as chromium:
        for name, sheet in (("gate", compared(bench(12, 1), bench(12, 2, by_ms=5), *GATE)), ("b", SHEETS["bench"])):
            file = tmp_path / f"{name}.html"
            file.write_text(render(sheet))
            for width in (360, 768, 1280, 2560):
                chromium.open(file, width, scheme="dark" if width == 768 else "light")
                chromium.run("document.querySelector('details').open = true")
                chromium.drawn()
                assert chromium.complaints() == [] and chromium.run(CUT) == []
                if axe is not None:
                    assert chromium.violations(axe / "axe.min.js") == []


def test_the_command_prints_it(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(encode(bench(8, 1)))
    b.write_text(encode(bench(8, 2, by_ms=5)))
    done = run("diff", str(a), str(b), "--format", "html", "--fail-if", "blackout.p50>+5%")
    assert done.returncode == 6 and done.stdout.startswith("<!doctype html>") and done.stdout.endswith("</html>\n")
    assert "<title>Gate failed: 1 of 1 condition</title>" in done.stdout
