# SPDX-License-Identifier: Apache-2.0
"""The line that shows a migration while it runs, at a real terminal and without one, beside QEMU's own figures."""

from __future__ import annotations

import os
import pty
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import SEND, AnyEvent, Ioctl, Transfer
from ebpf_mig.recording.file import read_recording
from ebpf_mig.tracing.lifecycle import MigrationWatch
from ebpf_mig.tracing.progress import Progress
from tests.companion import Companion
from tests.conftest import TRACING, requires
from tests.integration.migrations import CONVERGING, THROTTLE_AT_ONCE, migrate

pytestmark = requires(*TRACING)
SLOW = [
    "demo", "--memory", "128MiB", "--working-set", "64MiB", "--dirty-rate", "4000", "--bandwidth", "200Mbit",
    "--downtime-limit", "20ms", "--output",
]  # fmt: skip
LINE = re.compile(r"(\d+\.\d) s, pass (\d+); ([\d.]+) MiB/s sent(?:, ([\d.]+) [KM]iB/s dirtied)?")


ROUNDED = 0.051
"""Half of the last digit of a rate that is shown, MiB/s."""
BUFFER = 1 / 32
"""What QEMU sends before it looks at its quota again: 32 KiB (`IO_BUF_SIZE`, migration/qemu-file.c), in MiB."""
S = 1_000_000_000


def sent(events: Sequence[AnyEvent], at_ns: int) -> list[float]:
    """MiB that went out in each second that ended shortly before a line was shown.

    QEMU sends its quota at the begin of each 100 ms (`migration_rate_limit`, migration/migration.c). One that lost its
    CPU ends late: a second can hold 11 quotas.
    """
    sends = [event for event in events if isinstance(event, Transfer) and event.direction == SEND]
    ends = [event.end_ns for event in events if isinstance(event, Transfer | Ioctl)]
    found = []
    for end in (end for end in ends if at_ns - S // 2 < end <= at_ns):
        within = [(s, min(s.end_ns, end) - max(s.begin_ns, end - S)) for s in sends]
        found.append(sum(s.bytes * part / max(1, s.end_ns - s.begin_ns) for s, part in within if part > 0) / (1 << 20))
    return found


def at_terminal(recording: Path) -> list[tuple[int, str]]:
    """(when, text) of what the command writes to its terminal: CLOCK_MONOTONIC in ns."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "ebpf_mig", *SLOW, str(recording)]
    with Companion(command, stdout=subprocess.DEVNULL, stderr=slave) as process:
        os.close(slave)
        written = []
        while True:
            try:
                data = os.read(master, 4096)
            except OSError:
                break  # nobody holds the terminal any more
            written.append((time.monotonic_ns(), data.decode()))
    os.close(master)
    assert process.returncode == 0, written
    return written


def test_a_terminal_shows_the_passes_and_nothing_while_the_guest_is_stopped(tmp_path: Path) -> None:
    written = at_terminal(tmp_path / "live.rec")
    shown = [(at, found) for at, text in written if (found := LINE.search(text))]
    recording = read_recording(tmp_path / "live.rec")
    analysis = analyse(recording)
    passes = analysis.breakdown.dirty_log.passes
    assert {int(found[2]) for _, found in shown} >= {1, 2}
    assert max(int(found[2]) for _, found in shown) <= len(passes)
    steady = [(at, float(found[3])) for at, found in shown if float(found[1]) > 1.2]
    limit = 200e6 / 8 / (1 << 20)  # what QEMU was told
    assert statistics.median(rate for _, rate in steady) == pytest.approx(limit, rel=0.05)
    assert max(rate for _, rate in steady) < 11 * (limit / 10 + BUFFER) + ROUNDED
    for at, rate in steady:  # calls that the kernel half still coalesces are missing, so it can be less
        really = sent(recording.events, at)
        assert rate <= max(really) + ROUNDED, (at, rate, max(really))
    assert analysis.breakdown.window_ns is not None
    window = (analysis.origin_ns, analysis.origin_ns + analysis.breakdown.window_ns)
    assert not [text for at, text in written if window[0] + 1_000_000 < at < window[1]]  # 1 ms: it was on its way
    assert any(at < window[0] for at, _ in shown)
    rest = "".join(text for at, text in written if at > window[1])
    assert "\r\x1b[K" in rest.partition("recording:")[0]  # the line is cleared before the next message


def test_no_rate_is_wrong_while_the_guest_is_throttled(tmp_path: Path) -> None:
    """Threads of a throttled vCPU end their batches late. The line after each record, beside what QEMU was told."""
    events = list(migrate(tmp_path, CONVERGING, extra=THROTTLE_AT_ONCE).recording.events)
    watch = MigrationWatch({event.pid for event in events if isinstance(event, Ioctl)})
    progress, steady = Progress(watch), []
    for event in events:
        watch.saw([event])
        progress.saw([event])
        if isinstance(event, Transfer) and (text := progress.line()):
            found = LINE.match(text)
            assert found or re.match(r"0\.\d s, pass 1; [\d.]+ (K?i?B)/s sent; ", text), text
            if found and float(found[1]) > 1.2:
                steady.append(float(found[3]))
    limit = CONVERGING.bandwidth_bytes / (1 << 20)
    assert statistics.median(steady) == pytest.approx(limit, rel=0.1)
    assert max(steady) < 11 * (limit / 10 + BUFFER) + ROUNDED


def test_without_a_terminal_there_is_a_line_every_two_seconds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ebpf_mig", *SLOW, str(tmp_path / "plain.rec")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in result.stderr.splitlines() if LINE.match(line)]
    assert 1 <= len(lines) <= 10 and "\x1b" not in result.stderr
