# SPDX-License-Identifier: Apache-2.0
"""SECURITY.md: each defence in its tables names a test, and every file that the page names exists."""

from __future__ import annotations

import re

from tests.unit.commands.test_cli import ROOT
from tests.unit.test_docs import LINK

TEXT = (ROOT / "SECURITY.md").read_text()
ROW = re.compile(r"^\| (?!attack)[^-].*\|$", re.MULTILINE)


def test_each_defence_names_its_test() -> None:
    rows = ROW.findall(TEXT)
    assert len(rows) > 20
    for row in rows:
        assert any(target.startswith("tests/") for target in LINK.findall(row.split(" | ")[-1])), row


def test_every_file_it_names_exists() -> None:
    named = [target.partition("#")[0] for target in LINK.findall(TEXT)]
    assert [target for target in named if not (ROOT / target).is_file()] == []


def test_a_name_in_a_link_is_that_of_its_file() -> None:
    for name, target in re.findall(r"\[(test_\w+\.py)\]\(([^)]+)\)", TEXT):
        assert target.endswith(f"/{name}")
