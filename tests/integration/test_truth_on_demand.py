# SPDX-License-Identifier: Apache-2.0
"""A restored guest waits for each page for a known time. The truth is the clock of the process that serves them, and
the kernel's own count of page faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import requires
from tests.truth.parts import Plan
from tests.truth.restores import restored

pytestmark = [requires("root", "/dev/kvm", "bcc", "kernel BTF")]

MS = 1_000_000


@pytest.mark.parametrize(
    ("backend", "interrupts"),
    [
        ("userfaultfd", False),
        pytest.param("file", False, marks=requires("private mount namespaces")),
        pytest.param("userfaultfd", True, marks=requires("x86-64")),
    ],
    ids=["userfaultfd", "file", "interrupts"],
)
def test_waits_for_pages(backend: str, interrupts: bool, tmp_path: Path) -> None:
    plan = Plan(
        delays={"page": 4 * MS}, address=str(tmp_path), backend=backend, interrupts=interrupts, dirty_pages=32, slots=1
    )
    seen = restored(plan)
    assert not seen.wrong(), seen
