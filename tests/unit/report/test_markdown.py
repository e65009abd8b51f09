# SPDX-License-Identifier: Apache-2.0
"""The markdown report: the same figures as the text, few visible lines, and no text that could format anything."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from ebpf_mig import breakdown as b
from ebpf_mig.report import markdown, text
from ebpf_mig.report.markdown import VISIBLE, escaped, render
from tests.unit import breakdowns
from tests.unit.report.test_replay import RECORDINGS, load
from tests.unit.report.test_text import diagnosed

FOLDED = re.compile(r"<details>.*?</details>\n?", re.DOTALL)


def visible(shown: str) -> list[str]:
    """What a reader sees before opening anything; lines that `<br>` makes count, too."""
    return FOLDED.sub("", shown).replace("<br>", "\n").splitlines()


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_it_says_what_the_text_says(path: Path) -> None:
    _, breakdown = load(path)
    shown = render(breakdown)
    assert len(visible(shown)) <= VISIBLE
    plain = re.sub(r"\\(.)", r"\1", shown)
    for figure in re.findall(r"\d+\.\d{3}", text.render(breakdown)):
        assert figure in plain, figure
    assert render(breakdown) == shown


def test_a_whole_report() -> None:
    assert visible(render(diagnosed())) == [
        "### Downtime 32.510 ms",
        "",
        r"QEMU 10.0.13, pre-copy over TCP, 1 vCPU; completed after 1534.200 ms; complete: no event lost",
        "",
        r"- **Mostly** state.load (load VM state): 24.477 ms, 75 %",
        r"- **Because** KVM waits in synchronize\_srcu: 19.400 ms, 60 %",
        r"19.400 ms in 6 sleeps of main 2 in synchronize\_srcu (kvm\_swap\_active\_memslots)",
        r"- **Not** the final dirty-log fetch (0.069 ms)",
        "- **Help** fewer memslots",
        "",
        "| phase | what happens | ms | share |",
        "|---|---|--:|--:|",
        "| pause | stop the vCPUs | 0.412 | before |",
        "| quiesce | settle devices | 0.310 | 1 % |",
        "| fetch.kernel | read the dirty log | 1.200 | 3 % |",
        "| fetch.user | scan its bitmap | 0.545 | 1 % |",
        "| memory.send | send the last pages | 30.001 | 70 % |",
        "| state.save | save VM state | 1.532 | 4 % |",
        "| state.send | send VM state | 0.112 | &lt;1 % |",
        "| handover | destination waits | 2.000 | 5 % |",
        "| state.load | load VM state | 5.500 | 13 % |",
        "| resume | start the vCPUs | 1.000 | 2 % |",
        "| unattributed | not explained | 0.500 | 1 % |",
        "| **downtime** | | **42.700** | **100 %** |",
        "",
    ]


def test_without_a_downtime_there_is_no_table_of_phases() -> None:
    shown = render(breakdowns.cancelled_early())
    assert shown.startswith("### No downtime: the migration ended before the vCPUs stopped\n")
    assert "| phase |" not in shown


def test_each_vcpu_is_folded_in() -> None:
    shown = render(breakdowns.many_vcpus())
    assert "| 5 | - | - | 0.350 | - |" in shown and "| 5 |" not in "\n".join(visible(shown))


def test_losses_are_visible() -> None:
    assert any(line.startswith("> incomplete: lost socket 12") for line in visible(render(breakdowns.aborted())))


def test_names_cannot_format_link_or_mention() -> None:
    evil = "<img src=x> [a](http://b) **c** | @everyone `d` \n# e \x1b[31m https://evil.example"
    shown = escaped(evil)
    assert "<" not in shown and "\n" not in shown and "\x1b" not in shown
    assert "://" not in shown and "@" not in shown
    assert not re.search(r"(?<!\\)[*`|\[\]]", shown)
    whole = breakdowns.precopy()
    wait = b.Wait(phase="state.save", thread=evil, duration_ns=10_000_000, stack=[evil])
    page = render(msgspec.structs.replace(whole, waits=[wait], notes=[evil]))
    assert "<img" not in page and not re.search(r"(?<!\\)\]\(", page) and page.count("</details>") == 1
    assert markdown.render(whole) != page
