# SPDX-License-Identifier: Apache-2.0
"""The HTML report in a real browser: no script errors, the breakdown's numbers, nothing loaded, nothing injected."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ebpf_mig.analysis.lanes import View, view
from ebpf_mig.breakdown import Breakdown, Logging, Rearm, Split, Stretch, VcpuShare, Wait
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import AnyEvent, Header, Ioctl, Mark, Target, Thread
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.report import html, html_tables
from tests.conftest import requires
from tests.unit import breakdowns
from tests.unit.report.browser import Browser, browser
from tests.unit.report.test_replay import COMPLETED, RECORDINGS

needs_browser = requires("chromium and chromedriver")
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\x1b[31m\u202e"
EMPTY = View(0, 0, 1, [], [], 0)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


def page(directory: Path, breakdown: Breakdown, seen: View) -> Path:
    file = directory / "report.html"
    file.write_text(html.render(breakdown, seen))
    return file


def load(path: Path) -> tuple[Breakdown, View]:
    found = analyse(read_recording(path))
    return found.breakdown, view(found)


def cells(chromium: Browser, table: str) -> list[list[str]]:
    script = (
        f"return [...document.querySelectorAll('#{table} tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    found: list[list[str]] = chromium.run(script)
    return found


@needs_browser
@pytest.mark.parametrize("path", RECORDINGS[::3], ids=lambda path: path.stem)
def test_numbers_are_those_of_the_breakdown(path: Path, chromium: Browser, tmp_path: Path) -> None:
    b, seen = load(path)
    chromium.open(page(tmp_path, b, seen))
    assert chromium.complaints() == []
    assert chromium.run("return document.title") == html_tables.headline(b)
    if b.window_ns is not None:
        rows = cells(chromium, "phases")
        for p in b.phases:
            shown = [row[3] for row in rows if row[0] == p.phase]
            if p.duration_ns or p.phase == "unattributed":
                assert round(sum(map(float, shown)) * 1e6) == pytest.approx(p.duration_ns, abs=1500)
            else:
                assert shown == ["not seen"]
        ends = {row[0]: row[3] for row in rows if row[0] in ("downtime", "window")}
        dark = {} if b.blackout_ns is None else {"downtime": f"{b.blackout_ns / 1e6:.3f}"}
        assert ends == dark | {"window": f"{b.window_ns / 1e6:.3f}"}
        assert [row[0] for row in cells(chromium, "vcpus")] == [str(v.vcpu) for v in b.vcpus]
        assert len(cells(chromium, "fetch")) == sum(len(fetch.ioctls) for fetch in b.dirty_log.fetches)
    assert len(cells(chromium, "passes")) == len(b.dirty_log.passes)
    assert [row[1] for row in cells(chromium, "witnesses")] == [f"{w.value_ns / 1e6:.3f}" for w in b.witnesses]
    chromium.run("document.getElementById('show-all').click()")
    chromium.drawn()
    total = sum(len(lane.slices) for lane in seen.lanes) + sum(len(p.spans) for p in b.phases) + len(b.dirty_log.passes)
    assert chromium.run("return document.getElementById('count').textContent").startswith(f"{total} calls in view")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_fits_its_screen_in_both_schemes(width: int, scheme: str, chromium: Browser, tmp_path: Path) -> None:
    b, seen = load(next(p for p in COMPLETED if "3vcpus" in p.stem))
    chromium.open(page(tmp_path, b, seen), width, scheme=scheme)
    assert chromium.complaints() == []
    assert chromium.run("return document.documentElement.scrollWidth") <= width, "no sideways scrolling of the page"
    dark = chromium.run("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")
    script = """const c = document.querySelector('#timeline canvas');
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        const seen = new Set();
        for (let i = 0; i < d.length; i += 4) seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]);
        return [c.getBoundingClientRect().width, [...seen]]"""
    drawn, colours = chromium.run(script)
    assert drawn <= width
    assert {0x46C463, 0x59A9FF, 0xBD93FF} if dark else {0x2DA44E, 0x0A66C2, 0x8A3FFC} <= set(colours)


@needs_browser
def test_zoom_shows_less_and_tells_what_is_under_the_pointer(chromium: Browser, tmp_path: Path) -> None:
    b, seen = load(COMPLETED[0])
    chromium.open(page(tmp_path, b, seen))

    def count() -> int:
        chromium.drawn()
        return int(chromium.run("return document.getElementById('count').textContent").split()[0])

    whole = count()
    for _ in range(4):
        chromium.run("document.getElementById('zoom-in').click()")
    assert 0 < count() < whole
    chromium.run("document.getElementById('show-window').click()")
    assert count() == whole
    chromium.run("""const c = document.querySelector('#timeline canvas'), a = c.getBoundingClientRect();
        c.dispatchEvent(new PointerEvent('pointermove', {clientX: a.left + a.width * 0.6, clientY: a.top + 28}))""")
    assert re.match(
        r"phases: [a-z.]+ from [\d.]+ ms for [\d.]+ ms",
        chromium.run("return document.getElementById('tip').textContent"),
    )
    assert chromium.complaints() == []


@needs_browser
def test_hostile_names_do_nothing(chromium: Browser, tmp_path: Path) -> None:
    header = Header(
        host=HOSTILE, begin_ns=1, targets=[Target(pid=7, role="source", comm=HOSTILE, vmm=HOSTILE)], notes=[HOSTILE]
    )
    events: list[AnyEvent] = [
        Ioctl(10, 50, 7, 8, 3, 0x4010AE42, 0),
        Thread(7, 8, HOSTILE),
        Mark(20, 7, HOSTILE, HOSTILE),
    ]
    found = analyse(Recording(header=header, events=events))
    b = msgspec.structs.replace(
        found.breakdown, waits=[Wait(phase=HOSTILE, thread=HOSTILE, duration_ns=1, stack=[HOSTILE])]
    )
    text = html.render(b, view(found))
    assert text.count("</script>") == 3 and "\x1b" not in text and "\u202e" not in text and "<img" not in text
    chromium.open(page(tmp_path, b, view(found)))
    chromium.run("document.getElementById('show-all').click()")
    chromium.drawn()
    assert chromium.complaints() == [] and chromium.run("return window.hacked") is None
    assert "window.hacked=1" in chromium.run("return document.querySelector('#calls').textContent")


@pytest.mark.parametrize(
    "b", [breakdowns.precopy(), breakdowns.many_vcpus(), breakdowns.cancelled_early(), breakdowns.aborted()]
)
def test_every_kind_of_ending_renders(b: Breakdown) -> None:
    text = html.render(b, EMPTY)
    assert text == html.render(b, EMPTY)
    assert "http:" not in text and "https:" not in text and "src=" not in text, "nothing to load"
    assert html_tables.headline(b) in text and b.completeness.verdict in text


def split_by(split: Split) -> Breakdown:
    """A breakdown whose final fetch's first ioctl, of 0.9 ms, and the fetch as a whole have the split."""
    whole = breakdowns.precopy()
    (fetch,) = whole.dirty_log.fetches
    ioctl = msgspec.structs.replace(fetch.ioctls[0], split=split)
    fetches = [msgspec.structs.replace(fetch, ioctls=[ioctl])]
    assert whole.dirty_log.final is not None
    final = msgspec.structs.replace(whole.dirty_log.final, split=split)
    log = msgspec.structs.replace(whole.dirty_log, fetches=fetches, final=final)
    return msgspec.structs.replace(whole, dirty_log=log)


def test_sampled_split_carries_its_error() -> None:
    text = html.render(
        split_by(Split(walk=450_000, flush=0, copy=450_000, other=0, samples=9, walk_error=294_000)), EMPTY
    )
    assert "walk 0.450 ± 0.294, flush 0.000, copy 0.450, other 0.000 (9 samples)" in text


@needs_browser
def test_split_is_drawn_with_its_error_bars(chromium: Browser, tmp_path: Path) -> None:
    parts = {"walk": 600_000, "flush": 200_000, "copy": 80_000, "other": 20_000}
    errors = {"walk_error": 100_000, "flush_error": 50_000, "copy_error": 9_000, "other_error": 1}
    chromium.open(page(tmp_path, split_by(Split(**parts, samples=31, **errors)), EMPTY))
    rows = cells(chromium, "split")
    assert [row[:4] for row in rows[:2]] == [
        ["walk", "0.600", "0.100", "66.7 %"],
        ["flush", "0.200", "0.050", "22.2 %"],
    ]
    script = """return [...document.querySelectorAll('#split tr svg')].map(s => {
        const bar = s.querySelector('rect').getBBox(), error = s.querySelector('.error').getBBox();
        return [bar.width, error.x, error.x + error.width]})"""
    drawn = chromium.run(script)
    assert drawn[0] == pytest.approx([1000 * 6 / 7, 1000 * 5 / 7, 1000], abs=0.2), "0.6 ± 0.1 ms, 0.7 being the width"
    assert drawn[1] == pytest.approx([1000 * 2 / 7, 1000 * 1.5 / 7, 1000 * 2.5 / 7], abs=0.2)
    assert "31 samples" in chromium.run("return document.body.textContent")
    chromium.open(page(tmp_path, split_by(Split(**parts, samples="exact")), EMPTY))
    assert [row[2] for row in cells(chromium, "split")] == ["-"] * 4
    assert chromium.run("return document.querySelectorAll('#split .error').length") == 0


@needs_browser
def test_convergence_is_drawn_to_scale(chromium: Browser, tmp_path: Path) -> None:
    b, seen = max((load(path) for path in COMPLETED), key=lambda loaded: len(loaded[0].dirty_log.passes))
    chromium.open(page(tmp_path, b, seen))
    script = """return [...document.querySelectorAll('svg.chart rect')].map(r => { const b = r.getBBox();
        return [b.x, b.width, b.height, r.querySelector('title').textContent] })"""
    bars = chromium.run(script)
    passes, final = b.dirty_log.passes, b.dirty_log.final
    assert final is not None and b.blackout is not None and len(bars) == len(passes) + 1 > 2
    span = b.blackout[1] - passes[0].begin
    most = max(final.bytes, *(p.bytes for p in passes))
    assert bars[0][2] == pytest.approx(100 * passes[0].bytes / most, abs=1)
    assert bars[1][0] == pytest.approx(1000 * (passes[1].begin - passes[0].begin) / span, abs=0.1)
    assert bars[-1][0] + bars[-1][1] == pytest.approx(1000, abs=0.1) and "in the blackout" in bars[-1][3]


def test_passes_carry_brownout_beside_its_baseline_and_tcps_verdict() -> None:
    whole = breakdowns.precopy()
    share = VcpuShare(vcpu=0, outside_ns=500_000, longest_gap_ns=400_000, lock_wait_ns=0)
    lost = Stretch(begin=0, duration_ns=10_000_000, vcpus=[share])
    idle = msgspec.structs.replace(share, outside_ns=0, longest_gap_ns=0)
    before = msgspec.structs.replace(lost, vcpus=[idle])
    info = {"busy_us": 52_000, "rwnd_limited_us": 48_000, "sndbuf_limited_us": 0}
    info |= {"retransmits": 2, "resolution_us": 4000}
    first = msgspec.structs.replace(whole.dirty_log.passes[0], brownout=lost, baseline=before, tcp_info=info)
    rearm = Rearm(ns=3_000_000, error_ns=100_000, samples=40, pages=65_536, ns_per_page=45.776, ms_per_gib=12.0)
    assert whole.dirty_log.final is not None
    log = msgspec.structs.replace(
        whole.dirty_log,
        passes=[first],
        final=msgspec.structs.replace(whole.dirty_log.final, rearm=rearm),
        logging=[Logging(on=False, begin=0, end=9_000_000, kernel_ns=8_000_000, slots=3, in_blackout_ns=7_000_000)],
    )
    text = html.render(msgspec.structs.replace(whole, dirty_log=log), EMPTY)
    assert "5.00 %, 0.400" in text and "0.00 %, 0.000" in text
    assert "busy 52 ms, receiver's window 48, send buffer 0 (± 4), 2 retransmits" in text
    assert "Avoidable: 3.000 ± 0.100 ms" in text and "12 ms/GiB, 45.8 ns/page" in text
    assert "cloud-hypervisor/issues/8899" in text and "7.000" in text
