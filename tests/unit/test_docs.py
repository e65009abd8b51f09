# SPDX-License-Identifier: Apache-2.0
"""What the docs show is what a reader gets: their console blocks are run, their links lead somewhere.

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

from tests.unit.test_cli import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^```\w+\n((?:--|#) (\w+\.\w+)\n.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SHOWN = [page for page in PAGES if BLOCK.search(page.read_text())]


def session(text: str, directory: Path) -> str:
    """The block as it would read if its commands were typed now."""
    commands = re.findall(r"^\$ (.*)$", text, re.MULTILINE)
    assert commands, "a block without a command"
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "80", "TZ": "UTC"}
    shown = ""
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command], cwd=directory, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=120,
        )  # fmt: skip
        shown += f"$ {command}\n{done.stdout}"
    return shown


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_commands_print_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    if "duckdb" in text:
        pytest.importorskip("duckdb", reason="missing: duckdb (PyPI)")
        pytest.importorskip("pyarrow", reason="missing: pyarrow (PyPI)")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "data").symlink_to(ROOT / "tests" / "data")
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
