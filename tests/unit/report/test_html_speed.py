# SPDX-License-Identifier: Apache-2.0
"""The HTML report of a long recording opens fast. Measured with the CPUs to itself."""

from __future__ import annotations

import time
from pathlib import Path

from ebpf_mig.analysis.lanes import view
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import AnyEvent, Header, Ioctl, Target
from ebpf_mig.recording.file import Recording
from tests.conftest import requires
from tests.unit.report.browser import browser
from tests.unit.report.test_html import page


@requires("chromium and chromedriver")
def test_a_hundred_thousand_events_open_fast(tmp_path: Path) -> None:
    header = Header(begin_ns=1, targets=[Target(pid=7, role="source")])
    events: list[AnyEvent] = [
        Ioctl(1000 + i * 5000, 1000 + i * 5000 + 3000, 7, 8 + i % 20, 3, 0x4010AE42, 0, slot=i % 5)
        for i in range(50_000)
    ]
    found = analyse(Recording(header=header, events=events))
    file = page(tmp_path, found.breakdown, view(found))
    with browser() as chromium:
        begin = time.monotonic()
        chromium.open(file)
        chromium.run("document.getElementById('show-all').click()")
        chromium.drawn()
        assert time.monotonic() - begin < 10, "about a second on an idle machine"
        shown = chromium.run("return document.getElementById('count').textContent")
        assert shown.startswith("110000 calls in view"), "each in two lanes, its thread's and its memslot's, and passes"
        assert chromium.complaints() == []
