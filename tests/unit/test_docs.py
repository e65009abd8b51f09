# SPDX-License-Identifier: Apache-2.0
"""The docs are correct: their console blocks are run, and their links have targets.

A block marked `console` holds commands after `$ ` and exactly what they print; they run one after the other in a new
directory that has the recordings under `tests/data`. `UPDATE_DOCS=1` writes what they print now; the difference belongs
into the review. A block of another kind whose first line is a comment with a file's name is that file. Blocks marked
`console live` migrate real VMs; the integration tests run them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ebpf_mig.cli import COMMANDS
from tests.unit.commands.test_cli import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^```\w+\n((?:--|#) (\w+\.\w+)\n.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SHOWN = [page for page in PAGES if BLOCK.search(page.read_text())]


LIVE = re.compile(r"^```console live\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def session(text: str, directory: Path) -> str:
    """The block as it would read if its commands were typed now."""
    commands = re.findall(r"^\$ (.*)$", text, re.MULTILINE)
    assert commands, "a block without a command"
    return "".join(f"$ {command}\n{typed(command, directory).stdout}" for command in commands)


def typed(command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """What a terminal shows of a command, stderr included."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "80", "TZ": "UTC"}
    return subprocess.run(
        ["bash", "-c", command], cwd=directory, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False, timeout=120,
    )  # fmt: skip


def place(directory: Path) -> None:
    """The recordings, where the pages say that they are."""
    (directory / "tests").mkdir()
    (directory / "docs").mkdir()
    (directory / "tests" / "data").symlink_to(ROOT / "tests" / "data")
    (directory / "docs" / "cases").symlink_to(ROOT / "docs" / "cases")


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_commands_print_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    if "duckdb" in text:
        pytest.importorskip("duckdb", reason="missing: duckdb (PyPI)")
        pytest.importorskip("pyarrow", reason="missing: pyarrow (PyPI)")
    place(tmp_path)
    for content, name in FILE.findall(text):
        (tmp_path / name).write_text(content)
    blocks = BLOCK.findall(text)
    now = [session(block, tmp_path) for block in blocks]
    if os.environ.get("UPDATE_DOCS"):
        fresh = iter(now)
        page.write_text(BLOCK.sub(lambda _: f"```console\n{next(fresh)}```", text))
    assert now == blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        file, _, anchor = target.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        found = page.parent / file if file else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, target


WRAPPED = [*PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY"))]


@pytest.mark.parametrize("page", WRAPPED, ids=lambda page: page.stem)
def test_lines_wrap_at_100_columns(page: Path) -> None:
    """Tables, links and code may be longer: they cannot wrap. So may the list that a run of the matrix writes."""
    prose = re.sub(r"^```.*?^```$|<!-- table:.*?<!-- end", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    free = re.compile(r"\|| {4}|!\[")
    assert not [line for line in prose.splitlines() if len(line) > 100 and not free.match(line) and " " in line.strip()]


def test_the_contents_name_every_page() -> None:
    named = set(LINK.findall((ROOT / "docs" / "README.md").read_text()))
    assert {page.name for page in PAGES[1:]} - {"README.md"} <= named


def test_every_command_has_its_place_in_the_docs() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    for command in COMMANDS:
        assert f"\n## ebpf-mig {command}\n" in text, f"docs/commands.md says nothing of {command}"


WALK = re.compile(r"^\d\. .*?(?=^\d\. |\Z)", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"`([^`]+)`")


def steps() -> list[str]:
    """The numbered steps of the walk in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return WALK.findall(text[text.index("## A new probe") :])


@pytest.mark.parametrize("step", steps(), ids=lambda step: re.sub(r"\W+", "-", step[3:16]))
def test_the_walk_of_a_new_probe_names_what_is_there(step: str) -> None:
    """Each file that a step links to exists, and has what the step names."""
    files = [ROOT / target for target in LINK.findall(step)]
    assert files and all(file.is_file() for file in files), files
    text = "\n".join(file.read_text() for file in files)
    for name in NAME.findall(step):
        assert re.search(rf"\b{re.escape(name)}\b", text), f"none of {files} has {name}"


def test_the_walk_has_all_its_steps() -> None:
    assert len(steps()) == 8
