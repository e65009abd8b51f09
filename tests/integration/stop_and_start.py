# SPDX-License-Identifier: Apache-2.0
"""When a guest stopped and started, from QEMU's own trace. It is a witness that knows its own doubt.

In: the traces of source and destination. Out: two spans. The guest stopped after QEMU set the run state for it, or
after the last exit from KVM_RUN that QEMU traces, and before QEMU tells its devices that it has stopped. It started
after QEMU calls KVM_RUN, and the thread can only have waited for a CPU in between; its schedstat says for how long, at
most. QMP's STOP to RESUME alone is no witness on a busy machine: the thread that stops the guest may lose the CPU
before it says so, for 130 ms in one run with three more runnable threads on two CPUs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.integration.migrations import TraceLine, parse_trace

EVENTS = [
    word for name in ("runstate_set", "vm_state_notify", "kvm_run_exit", "kvm_vcpu_ioctl") for word in ("-trace", name)
]
TRACED = [*EVENTS, "-D", "{dir}/{role}.trace"]
"""Options of both QEMUs."""
FLUSHED_S = 5.0
"""QEMU writes its trace from many threads; a line that is not there by then never comes."""
SLACK_NS = 200_000
"""QEMU's stamps are of the wall clock, in us; the clocks drift a little."""
_ASKED = re.compile(r"^runstate_set .*new_state \d+ \(finish-migrate\)")
_STOPPED = re.compile(r"^vm_state_notify running 0 .*\(finish-migrate\)")
_RUNS = re.compile(r"^vm_state_notify running 1 ")
_EXIT = re.compile(r"^kvm_run_exit ")
_ENTRY = re.compile(r"^kvm_vcpu_ioctl .*type 0xae80")


@dataclass(frozen=True)
class StopAndStart:
    """Earliest and latest instant of both, ns of the wall clock."""

    stop: tuple[int, int]
    start: tuple[int, int]

    @property
    def least_ns(self) -> int:
        """The shortest time in which the guest may have been stopped."""
        return self.start[0] - self.stop[1]

    @property
    def most_ns(self) -> int:
        return self.start[1] - self.stop[0]

    def off(self, stop: int, start: int) -> str:
        """Empty if these instants of the wall clock fit; else what is wrong."""
        spans = (("stopped", stop, self.stop), ("started", start, self.start))
        return "; ".join(
            f"{what} {(at - first) / 1e6:.3f} ms after the earliest, {(last - at) / 1e6:.3f} before the latest"
            for what, at, (first, last) in spans
            if not first - SLACK_NS <= at <= last + SLACK_NS
        )


def stop_and_start(source: Path, destination: Path, pid: int) -> StopAndStart:
    """Of the last migration in both traces. Fails if a line is missing. `pid`: the destination, whose guest runs."""
    near = traced(source, lambda lines: bool(_at(lines, _STOPPED)))
    stopped = _at(near, _STOPPED)
    assert stopped, f"QEMU's trace {source} has no stop"
    asked = [at for at in _at(near, _ASKED) if at <= stopped[-1]]
    left = [at for at in _at(near, _EXIT) if at <= stopped[-1]]
    assert asked, f"QEMU's trace {source} has no run state that asks for the stop"
    far = traced(destination, lambda lines: bool(_entries(lines)))
    entries = _entries(far)
    assert entries, f"QEMU's trace {destination} has no start"
    waited = max(int(path.read_text().split()[1]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return StopAndStart((min([asked[-1], *left[-1:]]), stopped[-1]), (entries[0], entries[-1] + waited))


def traced(path: Path, enough: Callable[[Sequence[TraceLine]], bool]) -> list[TraceLine]:
    """QEMU's trace, once it has enough, or after FLUSHED_S."""
    deadline = time.monotonic() + FLUSHED_S
    while not enough(lines := parse_trace(path, 0)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return lines


def _entries(lines: Sequence[TraceLine]) -> list[int]:
    """When QEMU called KVM_RUN, from its last start to the first exit. A call can return at once for an old kick."""
    runs = _at(lines, _RUNS)[-1:]
    exits = [at for at in _at(lines, _EXIT) if runs and at >= runs[0]]
    return [at for at in _at(lines, _ENTRY) if runs and runs[0] <= at <= min(exits, default=at)]


def _at(lines: Sequence[TraceLine], pattern: re.Pattern[str]) -> list[int]:
    return sorted(line.at_ns for line in lines if pattern.match(f"{line.name} {line.text}"))
