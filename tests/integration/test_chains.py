# SPDX-License-Identifier: Apache-2.0
"""Migrations that follow each other at once, as `watch` sees them: each is there, with its own blackout.

EBPF_MIG_CHAINS is the number of rounds. The witness of a blackout is QEMU itself: the guest stopped between the change
of the run state, which QEMU traces before its kicks, and QMP STOP; it started between QMP RESUME and the first exit
from KVM_RUN that QEMU traces. STOP to RESUME alone is no witness on a busy machine: the thread that stops the guest may
lose the CPU before it says so, for 130 ms in one run with three more runnable threads on two CPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.collector import analyse
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import TRACING, requires
from tests.integration.exporters import NAMED, OURS, PROGRAM, SETTLED_S, running
from tests.integration.migrations import TraceLine, parse_trace
from tests.integration.test_results import Qmp

pytestmark = [requires(*TRACING), pytest.mark.long]
ROUNDS = int(os.environ.get("EBPF_MIG_CHAINS", "2"))
SMALL = Scenario(memory_bytes=128 * MIB, working_set_bytes=2 * MIB, pages_per_s=1000)
SLOW = 16 << 20
TRACED = [*NAMED, "-trace", "runstate_set", "-trace", "kvm_run_exit", "-D", "{dir}/{role}.trace"]
PAUSING = "finish-migrate"
"""The run state that QEMU sets before it kicks the vCPUs."""
NEEDED = [PAUSING], [PAUSING, "kvm_run_exit"], ["kvm_run_exit"]
"""What QEMU's trace of A, B and C must have before it is read."""
FLUSHED_S = 5.0
"""QEMU writes its trace from many threads; a line that is not there by then never comes."""
SLACK_NS = 200_000
"""QEMU's stamps are of the wall clock, in us; the clocks drift a little."""


@contextlib.contextmanager
def watching(state: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    command = [*PROGRAM, "watch", "--format", "json", "--vm", f"{OURS}*", "--state-directory", str(state), *more]
    with running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None and "watching" in process.stderr.readline()
        yield process


def seen(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """All that was printed, once it has settled."""
    time.sleep(4)
    process.terminate()
    return [json.loads(line) for line in process.communicate(timeout=30)[0].splitlines()]


def start(source: Qmp, destination: Qmp, uri: str) -> None:
    destination("migrate-incoming", uri=uri)
    source("migrate", uri=uri)


@dataclass(frozen=True)
class Hop:
    """One migration as QEMU saw it; instants of the wall clock."""

    pids: tuple[int, int]
    stop: int
    resume: int
    source: list[TraceLine]
    destination: list[TraceLine]

    def holds(self, found: TracedMigration, offset: int) -> str:
        """Empty if the blackout lies where QEMU says; else what is wrong. `offset`: wall clock minus monotonic."""
        switchover = found.switchover
        if switchover is None or switchover.first_start is None:
            return "no blackout"
        stop, start = switchover.stop + offset, switchover.first_start + offset
        asked = next((line.at_ns for line in self.source if PAUSING in line.text), None)
        if asked is None:
            return f"QEMU's trace has no {PAUSING}, which is needed as the witness"
        left = max((e.at_ns for e in self.source if e.name == "kvm_run_exit" and e.at_ns < self.stop), default=asked)
        exits = [e.at_ns for e in self.destination if e.name == "kvm_run_exit"]
        earliest, latest = min(asked, left), min(exits, default=start)
        if not earliest - SLACK_NS <= stop <= self.stop + SLACK_NS:
            return f"stopped {(stop - earliest) / 1e6:.3f} ms after the earliest, {(self.stop - stop) / 1e6:.3f} before"
        if not self.resume - SLACK_NS <= start <= latest + SLACK_NS:
            return f"started {(start - self.resume) / 1e6:.3f} ms after RESUME, {(latest - start) / 1e6:.3f} before"
        return ""


def traced(path: Path, *needed: str) -> list[TraceLine]:
    """QEMU's trace, once it has a line with each of `needed`, or after FLUSHED_S."""
    deadline = time.monotonic() + FLUSHED_S
    while True:
        lines = parse_trace(path, 0)
        if (
            all(any(text in f"{line.name} {line.text}" for line in lines) for text in needed)
            or time.monotonic() > deadline
        ):
            return lines
        time.sleep(0.05)


def chain() -> list[Hop]:
    """A to B to C, B migrated on as soon as its guest runs."""
    with QemuPair(SMALL, None, TRACED) as one, QemuPair(SMALL, None, TRACED) as other:
        time.sleep(SETTLED_S)
        a, b, c = Qmp(one.source.qmp), Qmp(one.destination.qmp), Qmp(other.destination.qmp)
        for source in (a, b):
            source("migrate-set-parameters", **{"max-bandwidth": SLOW})
        start(a, b, one.uri)
        while not b.runs():
            pass
        start(b, c, other.uri)
        while not c.runs():
            time.sleep(0.01)
        time.sleep(0.3)
        files = (one.directory / "source", one.directory / "destination", other.directory / "destination")
        traces = [traced(path.with_suffix(".trace"), *needed) for path, needed in zip(files, NEEDED, strict=True)]
        first = Hop((one.source.pid, one.destination.pid), a.at("STOP"), b.at("RESUME"), *traces[:2])
        return [first, Hop((one.destination.pid, other.destination.pid), b.at("STOP"), c.at("RESUME"), *traces[1:])]


def test_a_chain_without_a_rest(tmp_path: Path) -> None:
    offset = time.time_ns() - time.monotonic_ns()
    with watching(tmp_path) as process:
        hops = [hop for _ in range(ROUNDS) for hop in chain()]
        found = seen(process)
    recordings = [analyse(read_recording(tmp_path / o["recording"])).traced for o in found]
    by_pids = {(t.source and t.source.pid, t.destination and t.destination.pid): t for t in recordings}
    far = [wrong for hop in hops if (wrong := hop.holds(by_pids[hop.pids], offset) if hop.pids in by_pids else "none")]
    right = [o for o in found if (o["role"], o["result"]) == ("both", "completed")]
    told = f"{len(right)} of {len(hops)} migrations, {len(found)} lines; blackouts elsewhere: {far}"
    assert len(right) == len(found) == len(hops) and not far, told


def test_no_more_lines_than_were_asked_for(tmp_path: Path) -> None:
    """The migrations that are still traced then are recorded, but not printed."""
    with watching(tmp_path, "--count", "1") as process:
        chain()
        assert process.wait(30) == 0 and process.stdout is not None
        assert len(process.stdout.read().splitlines()) == 1


class Sink:
    """Takes whatever is sent and never answers: no VMM."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.uri = f"tcp:127.0.0.1:{self._server.getsockname()[1]}"
        self._peers: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._peers.append(self._server.accept()[0])
                threading.Thread(target=self._drain, args=self._peers[-1:], daemon=True).start()

    @staticmethod
    def _drain(peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while peer.recv(1 << 20):
                pass

    def close(self) -> None:
        for one in (self._server, *self._peers):
            one.close()


def tries() -> int:
    """Two tries that are cancelled, and one that is not, each at once after the one before. The source's pid."""
    with QemuPair(SMALL, None, NAMED) as pair, contextlib.closing(Sink()) as sink:
        time.sleep(SETTLED_S)
        a, b = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
        a("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
        for _ in range(2):
            a("migrate", uri=sink.uri)
            time.sleep(0.5)
            a("migrate_cancel")
            while a.status() != "cancelled":
                pass
        a("migrate-set-parameters", **{"max-bandwidth": SLOW})
        start(a, b, pair.uri)
        while not b.runs():
            time.sleep(0.01)
        time.sleep(0.3)
        return pair.source.pid


def test_tries_that_are_cancelled_and_repeated_at_once(tmp_path: Path) -> None:
    with watching(tmp_path) as process:
        driven = [tries() for _ in range(ROUNDS)]
        found = seen(process)
    by_source: dict[int, list[dict[str, Any]]] = {}
    for o in found:
        for target in read_recording(tmp_path / o["recording"]).header.targets:
            by_source.setdefault(target.pid, []).append(o)
    # Without the VMM's word, a try that was cancelled while the guest ran has no known result, and no blackout.
    expected = [("unknown", False)] * 2 + [("completed", True)]
    told = [
        [(o["result"].replace("failed", "unknown"), o["blackout_ns"] is not None) for o in by_source.get(pid, [])]
        for pid in driven
    ]
    wrong = [one for one in told if one != expected]
    assert not wrong, f"{len(driven) - len(wrong)} of {len(driven)} with each of three tries: {wrong}"


def test_a_try_that_is_cancelled_and_repeated_at_once(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        state = tmp_path / str(number)
        with watching(state) as process, QemuPair(SMALL, None, NAMED) as one, QemuPair(SMALL, None, NAMED) as other:
            time.sleep(SETTLED_S)
            a, b, c = Qmp(one.source.qmp), Qmp(one.destination.qmp), Qmp(other.destination.qmp)
            a("migrate-set-parameters", **{"max-bandwidth": 1 << 18})
            start(a, b, one.uri)
            time.sleep(0.5)
            a("migrate_cancel")
            while a.status() != "cancelled":
                pass
            a("migrate-set-parameters", **{"max-bandwidth": SLOW})
            start(a, c, other.uri)
            while not c.runs():
                time.sleep(0.01)
            found = seen(process)
        tries = [o for o in found if o["role"] != "destination"]
        assert [o["result"] for o in tries[1:]] == ["completed"], (number, found)
        assert tries[0]["result"] in ("unknown", "failed") and tries[0]["blackout_ns"] is None, tries[0]
