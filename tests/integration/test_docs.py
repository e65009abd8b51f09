# SPDX-License-Identifier: Apache-2.0
"""The commands in docs/ that migrate real VMs, run as a reader would type them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest

from tests.conftest import TRACING, requires
from tests.unit.test_docs import LIVE, PAGES, place, typed

pytestmark = requires(*TRACING)
SHOWN = [page for page in PAGES if LIVE.search(page.read_text())]


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_live_commands_do_what_the_page_says(page: Path, tmp_path: Path) -> None:
    """Each exits with 0. For each line that the page shows, a line with the same first word is printed."""
    place(tmp_path)
    try:
        for block in LIVE.findall(page.read_text()):
            shown = ""
            for line in block.splitlines():
                if line.startswith("$ "):
                    done = typed(line.removeprefix("$ "), tmp_path)
                    assert done.returncode == 0, f"{line}\n{done.stdout}"
                    shown = done.stdout
                else:
                    word = line.split()[0]
                    assert re.search(rf"^{re.escape(word)}(?=\s|$)", shown, re.MULTILINE), f"{line}\nis not in\n{shown}"
    finally:
        for file in tmp_path.glob("?.pid"):
            # A QEMU that is about to end removes its file.
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL)
