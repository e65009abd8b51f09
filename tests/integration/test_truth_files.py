# SPDX-License-Identifier: Apache-2.0
"""A delay in each phase of a snapshot and of a restore lands there. The truth is the machine's own clock."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from ebpf_mig.breakdown import Breakdown
from tests.conftest import requires
from tests.truth.files import PHASES
from tests.truth.parts import SLOWNESS, Plan
from tests.truth.restores import saved_and_loaded

pytestmark = [requires("root", "/dev/kvm", "bcc", "kernel BTF")]

MS = 1_000_000
REST_NS = int(4 * MS * SLOWNESS)
"""What a phase takes without a delay, if no thread waits for a CPU; a wait for the caller needs no more around it."""


def handed_over(plan: Plan, wait_ns: int) -> tuple[Breakdown, dict[str, int], dict[str, int]]:
    """The breakdown, the delays as they were, and what else took time."""
    breakdown, left, right, waits = saved_and_loaded(plan, wait_ns)
    assert left["checksum"] == right["checksum"]
    injected = {**left["injected"], **right["injected"], "management": sum(waits)}
    whole = {**left["whole"], **right["whole"], "waited": left["waited"] + right["waited"]}
    requests = [*left["requests"].values(), *right["requests"].values()]
    whole["management"] = sum(there - answer for (_, answer, _), (there, _, _) in itertools.pairwise(requests))
    return breakdown, injected, whole


@pytest.mark.parametrize(
    "one", [pytest.param(False, marks=pytest.mark.everywhere("tiers"), id="all"), pytest.param(True, id="each")]
)
def test_delays_land_in_their_phase(one: bool, tmp_path: Path) -> None:
    for number, chosen in enumerate([(name,) for name in PHASES[::4]] if one else [PHASES]):
        directory = tmp_path / str(number)
        directory.mkdir()
        delays = {name: (10 + 3 * PHASES.index(name)) * MS for name in chosen}
        b, injected, whole = handed_over(Plan(delays=delays, address=str(directory)), 20 * MS)
        assert (b.migration.mode, b.migration.result, b.migration.transport) == ("snapshot", "completed", "file")
        assert b.phase_ns("unattributed") == 0 and sum(p.duration_ns or 0 for p in b.phases) == b.window_ns
        for name in PHASES:
            least = injected.get(name, 0)
            most = whole.get(name, least) + whole["waited"] + REST_NS
            assert 0.98 * least <= b.phase_ns(name) <= most, (name, least, b.phase_ns(name))
        assert 0.9 * injected["sync"] - MS <= b.phase_ns("sync") <= whole["sync"]
        most = whole["management"] + 3 * REST_NS + whole["waited"]
        assert 0.98 * injected["management"] <= b.phase_ns("management") <= most
