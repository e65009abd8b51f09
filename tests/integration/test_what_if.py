# SPDX-License-Identifier: Apache-2.0
"""Predictions checked by measurement: the same guest over a link that `tc` limits to either of two rates."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from pathlib import Path

import pytest

from ebpf_mig.analysis.whatif import predict
from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.commands import run
from ebpf_mig.commands.changes import parse_changes
from ebpf_mig.lab.netns import Link
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.vmm.qemu.migration import QemuMigration
from tests.conftest import TRACING, requires

pytestmark = requires(*TRACING, "tc with tbf and veth")

GUEST = Scenario(memory_bytes=64 * MIB, working_set_bytes=8 * MIB, pages_per_s=None, downtime_ms=2000)
"""Dirties its whole working set in each pass over either link, so that the blackout moves the same pages."""
SLOW, FAST = 100, 200
"""Link rates, Mbit/s."""


def migrate(rate_mbit: int, file: Path) -> tuple[Recording, Breakdown]:
    with Link(rate_mbit * 125_000) as link, QemuPair(GUEST, link=link) as pair:
        time.sleep(0.2)
        migration = QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options())
        with contextlib.closing(migration):
            writer = functools.partial(run.open_recording, str(file), "test", force=True)
            outcome, _ = run.trace_migration(migration, 60, writer)
    assert outcome.result == "completed", outcome.error
    return analyse(read_recording(str(file)))


@pytest.mark.timeout(300)
def test_another_bandwidth_is_predicted_within_15_per_cent(tmp_path: Path) -> None:
    runs = {rate: [migrate(rate, tmp_path / f"{rate}-{n}.rec") for n in range(3)] for rate in (SLOW, FAST)}
    measured = {rate: statistics.median(run.breakdown.blackout_ns or 0 for run in runs[rate]) for rate in runs}
    assert measured[SLOW] > 1.5 * measured[FAST], "tc limits the link, and the link the migration"
    for here, there in ((SLOW, FAST), (FAST, SLOW)):
        wishes = parse_changes([f"bandwidth={there}Mbit"])
        predicted = [predict(run, wishes).blackout_ns or 0 for run in runs[here]]
        off = statistics.median(predicted) / measured[there] - 1
        said = f"{here} -> {there} Mbit/s: {statistics.median(predicted) / 1e6:.1f} ms predicted, "
        said += f"{measured[there] / 1e6:.1f} measured, {100 * off:+.1f} %"
        assert abs(off) < 0.15, said
