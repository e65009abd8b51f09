# SPDX-License-Identifier: Apache-2.0
"""`bench`, `diff` and its gate as markdown: the rows of the text, few visible lines, tables that a renderer accepts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from ebpf_mig.compare.benchmark import Benchmark, Run, encode
from ebpf_mig.compare.diff import judge, parse_condition
from ebpf_mig.report.compare import render as text_of
from ebpf_mig.report.compare_markdown import render
from ebpf_mig.report.compare_rows import Sheet, of_bench, of_diff
from ebpf_mig.report.markdown import VISIBLE
from tests.unit.commands.test_cli import run
from tests.unit.compare.test_diff import bench
from tests.unit.report.test_markdown import visible

EVIL = "<img src=x> [a](http://b) **c** | @everyone `d` \n# e \x1b[31m"
GATE = ("blackout.p50>+5%", "fetch.p50>+5%", "blackout.max>1s")


def compared(a: Benchmark, b: Benchmark, *conditions: str, names: tuple[str, str] = ("a.json", "b.json")) -> Sheet:
    return of_diff(names, (a, b), *judge(a, b, [parse_condition(text) for text in conditions]))


def tables(page: str) -> list[list[list[str]]]:
    """The cells of each table as a renderer of markdown finds them, also of folded ones."""
    html = MarkdownIt("commonmark").enable("table").render(page)
    found = re.findall(r"<table>.*?</table>", html, re.DOTALL)
    rows = [re.findall(r"<tr>.*?</tr>", table, re.DOTALL) for table in found]
    return [[re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table] for table in rows]


SHEETS = {
    "equal": compared(bench(12, 1), bench(12, 2)),
    "slower": compared(bench(12, 1), bench(12, 2, by_ms=5)),
    "gate": compared(bench(12, 1), bench(12, 2, by_ms=5), *GATE),
    "many conditions": compared(
        bench(12, 1), bench(12, 2, by_ms=5), *GATE, *(f"blackout.max>{n}ms" for n in range(40))
    ),
    "few runs": compared(bench(2, 1), bench(12, 2, by_ms=5)),
    "bench": of_bench(bench(12, 1)),
    "failed runs": of_bench(Benchmark(scenario="s", runs=[Run(breakdown=None, error=f"no {n}") for n in range(20)])),
}


@pytest.mark.parametrize("name", SHEETS)
def test_it_has_every_row_of_the_text_and_few_visible_lines(name: str) -> None:
    sheet = SHEETS[name]
    page = render(sheet)
    assert len(visible(page)) <= VISIBLE and page == render(sheet)
    for table in tables(page):
        assert len({len(row) for row in table}) == 1 and len(table) > 1
    plain = " ".join(re.sub(r"\\(.)", r"\1", page).replace("&gt;", ">").replace("|", " ").split())
    text = text_of(sheet)
    for word in text.replace(":", " ").split():
        assert word.lower() in plain.lower(), word


def test_a_whole_comment() -> None:
    shown = render(SHEETS["gate"]).splitlines()
    assert shown[:6] == [
        "### Gate failed: 1 of 3 conditions",
        "",
        "; ".join(f"{name} is slower by 4.744 ms (large effect)" for name in ("blackout", "window", "handover")),
        "",
        "| gate | fails if | what was found |",
        "|---|---|---|",
    ]
    assert shown[6].startswith("| **FAIL** | blackout.p50&gt;+5% | 42.724 -&gt; 47.468 ms, +11.1 %")
    assert shown[8] == "| pass | blackout.max&gt;1s | B is 48.869 ms |"
    assert shown[10:12] == ["- A  a.json: test, 12 runs, 6.1", "- B  b.json: test, 12 runs, 6.1"]
    assert shown[13].startswith("| figure | A ms | B ms |") and shown[15].startswith("| **blackout** | 42.724 |")


def test_where_there_is_no_room_the_headline_figures_and_the_differences_are_visible() -> None:
    page = render(SHEETS["many conditions"])
    seen = "\n".join(visible(page))
    assert "| **handover** |" in seen and "| fetch |" in seen and "| quiesce |" not in seen and "| quiesce |" in page
    assert seen.count("**FAIL**") == 6 and page.count("**FAIL**") == 41, "those that failed come first"


def test_without_a_gate_the_headline_is_the_result() -> None:
    assert render(SHEETS["equal"]).startswith("### No median differs\n\n- A  a.json")
    assert render(SHEETS["bench"]).startswith("### test: 12 runs\n\n| figure |")


def test_names_cannot_format_link_or_break_a_table() -> None:
    evil = Benchmark(scenario=EVIL, kernel=EVIL, runs=[*bench(4, 1).runs, Run(breakdown=None, error=EVIL)])
    for page in (render(of_bench(evil)), render(compared(evil, evil, names=(EVIL, EVIL)))):
        html = MarkdownIt("commonmark").enable("table").render(page)
        assert not re.search(r"<(img|a|code|em)\b", html) and "\x1b" not in html and "@" not in page
        assert len({len(row) for table in tables(page) for row in table}) == 1


def test_the_command_prints_it(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(encode(bench(8, 1)))
    b.write_text(encode(bench(8, 2, by_ms=5)))
    done = run("diff", str(a), str(b), "--format", "markdown", "--fail-if", "blackout.p50>+5%")
    assert done.returncode == 6 and done.stdout.startswith("### Gate failed: 1 of 1 condition\n")
    assert run("bench", "--format", "pdf", "idle").returncode == 2
