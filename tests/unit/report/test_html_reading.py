# SPDX-License-Identifier: Apache-2.0
"""Reading an HTML page: on any screen, on paper, with a keyboard, and without knowing the words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_mig.breakdown import OF_FILES, PhaseName
from ebpf_mig.report import html
from tests.conftest import npm_package, requires
from tests.unit import breakdowns
from tests.unit.report.browser import Browser, browser
from tests.unit.report.test_html import EMPTY, load
from tests.unit.report.test_replay import DATA

pytestmark = requires("chromium and chromedriver")
OPEN_ALL = "for (const one of document.querySelectorAll('details')) one.open = true"
CUT = """const wide = document.documentElement.clientWidth;
    return [...document.querySelectorAll('main *')].filter((e) => e.checkVisibility() && !e.closest('canvas, svg') &&
        (e.getBoundingClientRect().right > wide + 1 || e.getBoundingClientRect().left < -1 ||
         e.id !== 'timeline' && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== 'visible'))
        .map((e) => e.outerHTML.slice(0, 100))"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a real migration."""
    file = tmp_path_factory.mktemp("html") / "report.html"
    file.write_text(html.render(*load(DATA / "qemu-10.0-3vcpus.rec")))
    return file


@pytest.mark.parametrize("width", [360, 480, 700, 768, 1024, 1240, 1280, 1920, 2560])
def test_nothing_is_clipped(width: int, chromium: Browser, page: Path) -> None:
    chromium.open(page, width)
    chromium.run(OPEN_ALL)
    chromium.drawn()
    assert chromium.run(CUT) == [] and chromium.run("return document.documentElement.scrollWidth") <= width
    assert chromium.complaints() == []


def test_paper_has_all_of_it_and_is_light(chromium: Browser, page: Path) -> None:
    chromium.open(page, 718, scheme="dark")  # what A4 leaves between margins of 1 cm
    folded = "return [...document.querySelectorAll('details')].filter((one) => !one.open).length"
    assert chromium.run(folded) > 0
    chromium.paper()
    assert chromium.run(folded) == 0 and chromium.run(CUT) == []
    assert chromium.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    script = """const c = document.querySelector('#timeline canvas'), d = c.getContext('2d');
        return [[...d.getImageData(c.width - 2, 1, 1, 1).data], c.getBoundingClientRect().bottom <=
            document.getElementById('timeline').getBoundingClientRect().bottom + 1]"""
    assert chromium.run(script) == [[255, 255, 255, 255], True], "the timeline is drawn again, and whole"
    chromium.run("window.dispatchEvent(new Event('afterprint'))")
    assert chromium.run(folded) > 0


@requires("axe-core (npm -g)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing(width: int, scheme: str, chromium: Browser, page: Path) -> None:
    folder = npm_package("axe-core")
    assert folder is not None
    chromium.open(page, width, scheme=scheme)
    chromium.run(OPEN_ALL)
    chromium.drawn()
    assert chromium.violations(folder / "axe.min.js") == []
    chromium.run("document.getElementById('show-keys').click()")
    assert chromium.violations(folder / "axe.min.js") == [], "with the list of keys"


def hint(chromium: Browser) -> str:
    """The explanation that is shown; empty if none is."""
    shown: str = chromium.run("const h = document.getElementById('hint'); return h.hidden ? '' : h.textContent")
    return shown


def test_each_phase_is_explained_to_the_pointer_and_to_the_keyboard(chromium: Browser, page: Path) -> None:
    chromium.open(page, 1280, 3000)
    words = chromium.run("return [...document.querySelectorAll('#phases tbody .term')].map((t) => t.textContent)")
    assert set(words) >= {str(name) for name in PhaseName if name not in OF_FILES}
    for at, word in enumerate(words[:4]):
        term = f"document.querySelectorAll('#phases tbody .term')[{at}]"
        chromium.run(f"{term}.focus()")
        focused = hint(chromium)
        assert len(focused) > 20, word
        chromium.press("Escape")
        assert hint(chromium) == ""
        x, y = chromium.run(f"const r = {term}.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]")
        chromium.move(x, y)
        assert hint(chromium) == focused
        left, top = chromium.run(
            "const h = document.getElementById('hint').getBoundingClientRect(); return [h.x, h.top]"
        )
        assert abs(left - x) < 100 and 0 < top - y < 40, "beside the word"
        chromium.move(1200, 5)
        assert hint(chromium) == ""


def test_every_explained_word_is_in_the_list_of_terms() -> None:
    for b in (breakdowns.precopy(), breakdowns.many_vcpus(), breakdowns.cancelled_early(), breakdowns.aborted()):
        text = html.render(b, EMPTY)
        used, known = (
            set(re.findall(pattern, text)) for pattern in (r"describedby='(term-[^']+)'", r"id='(term-[^']+)'")
        )
        assert used == known and len(known) == len(re.findall(r"id='term-", text))
        assert "class='term'" not in html.summary(b), "a notebook has no list of terms"


def test_the_tooltip_is_beside_the_pointer(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    chromium.run("document.getElementById('timeline').scrollIntoView()")
    chromium.drawn()
    box = chromium.run(
        "const r = document.querySelector('#timeline canvas').getBoundingClientRect(); return [r.x, r.y, r.width]"
    )
    tip = """const t = document.getElementById('tip'), r = t.getBoundingClientRect();
        return t.hidden ? null : [t.textContent, r.left, r.top, r.right]"""
    for share in (0.5, 0.99):
        x, y = box[0] + share * box[2], box[1] + 31
        chromium.move(x, y)
        text, left, top, right = chromium.run(tip)
        assert text.startswith("phases") and 0 < top - y < 30 and right <= 1280
        assert abs(left - x) < 30 or share > 0.9
    chromium.move(5, 5)
    assert chromium.run(tip) is None


def test_keys_are_those_of_perfetto(chromium: Browser, page: Path) -> None:
    chromium.open(page)

    def count() -> int:
        return int(chromium.run("return document.getElementById('count').textContent").split()[0])

    whole = count()
    chromium.press("w")
    chromium.press("W")
    near = count()
    assert near < whole
    for _ in range(25):
        chromium.press("d")
    assert count() < near, "moved to where nothing happens"
    for _ in range(25):
        chromium.press("a")
    for _ in range(2):
        chromium.press("s")
    assert count() == pytest.approx(whole, rel=0.1)
    opened = "return document.getElementById('keys').open"
    assert not chromium.run(opened)
    chromium.press("?")
    assert chromium.run(opened)
    chromium.run("document.querySelector('#keys button').click()")
    assert not chromium.run(opened) and chromium.complaints() == []
