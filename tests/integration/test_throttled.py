# SPDX-License-Identifier: Apache-2.0
"""Auto-converge: the window begins at the stop request, not when the throttle holds the guest.

Witnesses: the change of the run state, which QEMU traces directly before its kicks, and QMP's STOP.
`python -m bench.throttled` runs it 20 times.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.throttled import BOUND_NS, stop_after_request, without_cpu
from tests.conftest import TRACING, requires
from tests.integration.migrations import CONVERGING, THROTTLE_AT_ONCE, first, migrate

pytestmark = requires(*TRACING)


@pytest.mark.parametrize("number", range(3))
def test_the_window_begins_with_the_pause_request(tmp_path: Path, number: int) -> None:
    run = migrate(tmp_path, CONVERGING, extra=THROTTLE_AT_ONCE)
    assert run.outcome.result == run.breakdown.migration.result == "completed"
    assert run.breakdown.throttled is not None and run.breakdown.throttled.dark_ns > 100_000_000
    changed = first(run.source_trace, "runstate_set", "finish-migrate")
    assert abs(run.origin_ns - changed.at_ns) < BOUND_NS
    # QEMU sends STOP after its devices have stopped. That is `quiesce`, which takes longer on a busy machine.
    assert (
        0
        <= stop_after_request(run)
        < (run.breakdown.phase_ns("pause") or 0) + (run.breakdown.phase_ns("quiesce") or 0) + BOUND_NS
    )
    # STOP's stamp is late by the time in which the threads that stop the guest could run and had no CPU.
    assert stop_after_request(run) - without_cpu(run) < BOUND_NS
    assert all(fetch.begin >= 0 for fetch in run.breakdown.dirty_log.fetches)
