# SPDX-License-Identifier: Apache-2.0
"""Runs one traced migration of the lab's VMs and collects all independent witnesses."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.commands import run
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.vmm.base import Migration, Outcome
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.vmm.qemu.migration import QemuMigration

TRACED = (
    "runstate_set", "vm_state_notify", "migration_completion_vm_stop", "migration_bitmap_sync_start",
    "migration_bitmap_sync_end", "kvm_vcpu_ioctl", "vmstate_downtime_checkpoint", "process_incoming_migration_co_end",
    "serial_write",
)  # fmt: skip
QUICK = Scenario(memory_bytes=128 * MIB, working_set_bytes=2 * MIB, pages_per_s=20_000)
"""A guest that beats every 26 ms."""
LASTING = Scenario(memory_bytes=128 * MIB, working_set_bytes=16 * MIB, pages_per_s=1000, bandwidth_bytes=16 << 20)
"""Takes a second or more, so that a watch arms its probes before the end even on a busy machine."""
CONVERGING = Scenario(
    memory_bytes=128 * MIB, working_set_bytes=48 * MIB, pages_per_s=None, bandwidth_bytes=64 * MIB, downtime_ms=100,
    auto_converge=True,
)  # fmt: skip
"""Dirties faster than the link carries until QEMU slows the guest down."""
THROTTLE_AT_ONCE = ("-global", "migration.x-cpu-throttle-initial=95")
"""The vCPU runs 10 of every 200 ms, so the switchover most likely begins while it is throttled."""

_OLD_LINE = re.compile(r"^\d+@(\d+)\.(\d{6}):(\w+) ?(.*)$")
_NEW_LINE = re.compile(r"^(\d{4}-\d\d-\d\dT[\d:]+(?:\.\d+)?Z) (\w+) ?(.*)$")


@dataclass(frozen=True)
class TraceLine:
    """One of QEMU's trace events, on our clock."""

    at_ns: int
    name: str
    text: str


@dataclass
class Traced:
    """One migration as recorded and as the witnesses saw it."""

    outcome: Outcome
    recording: Recording
    breakdown: Breakdown
    origin_ns: int
    """Instant 0 of the breakdown."""
    path: Path
    source_trace: list[TraceLine] = field(default_factory=list)
    destination_trace: list[TraceLine] = field(default_factory=list)
    source_beats: list[tuple[int, str]] = field(default_factory=list)
    destination_beats: list[tuple[int, str]] = field(default_factory=list)


def parse_trace(path: Path, wall_minus_monotonic_ns: int) -> list[TraceLine]:
    """QEMU's `log` trace back end: `TID@SECONDS.MICROSECONDS:event args` up to 10.0, ISO 8601 from 10.1."""
    found = []
    for line in path.read_text(errors="replace").splitlines():
        if match := _OLD_LINE.match(line):
            wall = int(match[1]) * 10**9 + int(match[2]) * 1000
            name, text = match[3], match[4]
        elif match := _NEW_LINE.match(line):
            moment = datetime.fromisoformat(match[1])
            wall = int(moment.timestamp()) * 10**9 + moment.microsecond * 1000
            name, text = match[2], match[3]
        else:
            continue
        found.append(TraceLine(wall - wall_minus_monotonic_ns, name, text))
    return found


def migrate(
    directory: Path,
    scenario: Scenario = QUICK,
    *,
    binary: str | None = None,
    meddle: Callable[[QemuPair, Migration], None] | None = None,
    timeout_s: float = 60,
    uri: str | None = None,
    capabilities: dict[str, bool] | None = None,
    extra: Sequence[str] = (),
) -> Traced:
    """Runs one migration with QEMU's trace on. `meddle` runs in a thread beside it, if given.

    `extra`: more arguments for both QEMUs.
    """
    path = directory / "migration.rec"
    patterns = [part for name in TRACED for part in ("-trace", name)]
    pair = QemuPair(scenario, binary, [*patterns, "-D", f"{directory}/{{role}}.trace", *extra])
    with pair:
        time.sleep(0.3)
        offset = time.time_ns() - time.monotonic_ns()
        options = pair.options()
        options = replace(options, capabilities=options.capabilities | (capabilities or {}))
        migration = QemuMigration(pair.source.qmp, pair.destination.qmp, uri or pair.uri, options)
        with contextlib.closing(migration):
            writer = functools.partial(run.open_recording, str(path), "test", force=True)
            driven: Migration = migration if meddle is None else Meddling(migration, pair, meddle)
            outcome, _ = run.trace_migration(driven, timeout_s, writer)
        time.sleep(0.3)
    recording = read_recording(str(path))
    analysis = analyse(recording)
    return Traced(
        outcome,
        recording,
        analysis.breakdown,
        analysis.origin_ns,
        path,
        parse_trace(directory / "source.trace", offset),
        parse_trace(directory / "destination.trace", offset),
        pair.source.heartbeat.beats,
        pair.destination.heartbeat.beats,
    )


class Meddling:
    """A migration with an act on the VMs at the same time."""

    def __init__(self, inner: QemuMigration, pair: QemuPair, act: Callable[[QemuPair, Migration], None]) -> None:
        self._inner, self._pair, self._act = inner, pair, act
        self.targets, self.prepare = inner.targets, inner.prepare
        self.cancel, self.close = inner.cancel, inner.close
        self.version, self.grows, self.appeared = inner.version, inner.grows, inner.appeared

    def run(self, timeout_s: float) -> Outcome:
        """Runs the real migration, and the act in a thread beside it."""
        import threading

        beside = threading.Thread(target=self._act, args=(self._pair, self._inner))
        beside.start()
        try:
            return self._inner.run(timeout_s)
        finally:
            beside.join()


def first(lines: Sequence[TraceLine], name: str, contains: str = "") -> TraceLine:
    """The first such line; StopIteration if there is none."""
    return next(line for line in lines if line.name == name and contains in line.text)


def last(lines: Sequence[TraceLine], name: str, contains: str = "") -> TraceLine:
    """The last such line."""
    return first(lines[::-1], name, contains)
