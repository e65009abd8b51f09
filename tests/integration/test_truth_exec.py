# SPDX-License-Identifier: Apache-2.0
"""A VMM that replaces itself by execve(2): a delay in each phase lands there. The truth is the machine's own clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import requires
from tests.truth.execs import PHASES
from tests.truth.parts import Plan
from tests.truth.replaced import replaced

pytestmark = [requires("root", "/dev/kvm", "bcc", "kernel BTF", "private mount namespaces")]

MS = 1_000_000


@pytest.mark.parametrize(
    "chosen", [PHASES, *(pytest.param((name,), marks=pytest.mark.long) for name in PHASES)], ids="-".join
)
def test_delays_land_in_their_phase(chosen: tuple[str, ...], tmp_path: Path) -> None:
    delays = {name: (20 + 5 * PHASES.index(name)) * MS for name in chosen}
    seen = replaced(Plan(delays=delays, address=str(tmp_path), vcpus=2))
    assert not seen.wrong()
    assert seen.sound(), seen.breakdown
    b = seen.breakdown
    assert b.blackout_ns and b.blackout_ns >= sum(ns for name, ns in seen.injected.items() if name != "pause")
    assert b.completeness.verdict == "complete", b.completeness.reasons
