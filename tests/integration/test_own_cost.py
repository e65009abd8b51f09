# SPDX-License-Identifier: Apache-2.0
"""What tracing took in the window, against the kernel's run statistics read all the time during a real migration."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import time
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_mig.analysis.spans import common
from ebpf_mig.collector import analyse
from ebpf_mig.commands import run
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.linux import bpf, clock
from ebpf_mig.probes.run_statistics import BpfStatistics
from ebpf_mig.probes.tables import own_runs
from ebpf_mig.probes.tracer import CALIBRATION_NS, Tracer
from ebpf_mig.recording.events import AnyEvent, OwnCost, OwnRuns
from ebpf_mig.recording.file import read_recording
from ebpf_mig.tracing.session import Session
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.vmm.qemu.migration import QemuMigration
from tests.conftest import TRACING, requires

pytestmark = requires(*TRACING)

PRECOPY = Scenario(memory_bytes=64 * MIB, working_set_bytes=2 * MIB, pages_per_s=5_000, transport="unix")
POSTCOPY = Scenario(
    memory_bytes=256 * MIB, working_set_bytes=96 * MIB, pages_per_s=None, bandwidth_bytes=200 * MIB, postcopy=True
)
SHARE, LEAST_NS = 0.05, 50_000
"""The figure may be off by this share of the window, or by this, whichever is larger."""
APART_S = 0.0005


class Witness:
    """A process that reads the run time of all programs of a session all the time: `bpf_prog_info.run_time_ns`.

    It makes the kernel count all that time; the session itself does so only in the beginning.
    """

    def __init__(self) -> None:
        self.readings: list[tuple[int, int, int]] = []
        """(instant before, instant after, ns of all programs so far)."""
        self.process_ns = 0
        """CPU time of this process while it recorded."""
        self.recorded = (0, 0)
        """When that was."""

    @contextlib.contextmanager
    def over(self, programs: list[int]) -> Iterator[None]:
        (asked, ask), (answered, answer) = os.pipe(), os.pipe()
        counting = BpfStatistics()
        pid = os.fork()
        if not pid:
            os.setpriority(os.PRIO_PROCESS, 0, -10)
            os.close(ask)
            found = []
            while not select.select([asked], [], [], APART_S)[0]:
                before = clock.monotonic_ns()
                ran = sum(bpf.run_time(fd)[0] for fd in programs)
                found.append((before, clock.monotonic_ns(), ran))
            with os.fdopen(answer, "w") as there:
                json.dump(found, there)
            os._exit(0)
        os.close(answer)
        try:
            yield
        finally:
            os.close(ask)
            with os.fdopen(answered) as here:
                self.readings = [(before, after, ran) for before, after, ran in json.load(here)]
            os.waitpid(pid, 0)
            os.close(asked)
            counting.close()

    def within(self, begin: int, end: int) -> tuple[int, int]:
        """(at least, at most) ns of all programs between two instants."""
        befores, afters = [r[0] for r in self.readings], [r[1] for r in self.readings]
        ran = [r[2] for r in self.readings]
        first_in, last_in = bisect_right(befores, begin), bisect_right(afters, end) - 1
        before, after = bisect_right(afters, begin) - 1, bisect_right(befores, end)
        return max(0, ran[last_in] - ran[first_in]), ran[after] - ran[before]


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Witness]:
    found, stack = Witness(), contextlib.ExitStack()
    arm, finish = Session.arm, Session.finish

    def armed(session: Session, *given: object) -> object:
        header = arm(session, *given)  # type: ignore[arg-type]
        found.recorded, found.process_ns = (clock.monotonic_ns(), 0), -time.process_time_ns()
        stack.enter_context(found.over(list(session._tracer._program._fds.values())))  # type: ignore[attr-defined]
        return header

    def finished(session: Session, *given: object, **named: object) -> None:
        found.process_ns += time.process_time_ns()
        found.recorded = found.recorded[0], clock.monotonic_ns()
        stack.close()
        finish(session, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "arm", armed)
    monkeypatch.setattr(Session, "finish", finished)
    yield found


@pytest.mark.parametrize("guest", [PRECOPY, POSTCOPY], ids=["precopy", "postcopy"])
def test_programs_cost_what_the_kernel_counted(guest: Scenario, witness: Witness, tmp_path: Path) -> None:
    file = str(tmp_path / "x.rec")
    with QemuPair(guest) as pair:
        time.sleep(0.3)
        migration = QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options())
        with contextlib.closing(migration):
            writer = functools.partial(run.open_recording, file, "test", force=True)
            outcome, _ = run.trace_migration(migration, 60, writer)
    assert outcome.result == "completed", outcome.error
    analysis = analyse(read_recording(file))
    window, cost = analysis.breakdown.window_ns, analysis.breakdown.completeness.tracing
    assert window is not None and cost is not None and cost.process_ns is not None
    least, most = witness.within(analysis.origin_ns, analysis.origin_ns + window)
    bound = max(SHARE * window, LEAST_NS)
    said = f"window {window}, {cost}, the kernel: {least} to {most}, {len(witness.readings)} readings"
    assert least - bound <= cost.programs_ns <= most + bound, said
    assert cost.programs_ns > 0 and cost.doubt_ns <= bound, said
    assert cost.process_ns <= window * (analysis.traced.material.header.cpus or 1), said
    parts = cost.phases.values()
    assert sum(part.programs_ns for part in parts) == cost.programs_ns
    turns = sum(common((t.begin_ns, t.end_ns), witness.recorded) for t in analysis.traced.material.own_turns)
    # Its own clock leaves out what interrupts and the hypervisor took from it while it had the CPU.
    assert 0.95 * witness.process_ns <= turns <= 1.5 * witness.process_ns, f"{turns} of {witness.process_ns}"


def makes_the_kernel_count() -> bool:
    """Whether this process holds a descriptor of BPF_ENABLE_STATS: the kernel calls it `bpf-stats`."""
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return Path("anon_inode:bpf-stats") in links


def test_the_kernel_counts_in_the_beginning_only() -> None:
    """It need not count while the programs run on. What it counted is recorded beside their sums."""

    def poll(seconds: float) -> list[AnyEvent]:
        end, events = time.monotonic() + seconds, list[AnyEvent]()
        while time.monotonic() < end:
            events += tracer.poll(20)
        return events

    def runs() -> int:
        return sum(found.runs + found.other_runs for found in own_runs(tracer._program, 0))

    with QemuPair(PRECOPY) as pair, Tracer([pair.source.pid]) as tracer:
        tracer.arm()
        assert makes_the_kernel_count()
        events = poll(CALIBRATION_NS / 1e9 + 0.4)
        assert not makes_the_kernel_count()
        before, later, after = runs(), poll(0.3), runs()
    assert before < after and not any(isinstance(event, OwnCost) for event in later)
    cost = [event for event in events if isinstance(event, OwnCost)][-1]
    sums = [event for event in events if isinstance(event, OwnRuns) and event.at_ns == cost.at_ns]
    summed = sum(found.runs + found.other_runs for found in sums)
    assert summed > 0 and abs(cost.runs - summed) < 0.05 * summed + 50
