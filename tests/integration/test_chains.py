# SPDX-License-Identifier: Apache-2.0
"""Migrations that follow each other at once, as `watch` sees them: each is there, with its own blackout.

EBPF_MIG_CHAINS is the number of rounds. The witness of a blackout is QEMU's own trace: see `stop_and_start.py`.
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
from tests.integration.shapes import OPTIONS
from tests.integration.stop_and_start import StopAndStart, stop_and_start
from tests.integration.test_results import Qmp

pytestmark = [requires(*TRACING), pytest.mark.long]
ROUNDS = int(os.environ.get("EBPF_MIG_CHAINS", "2"))
SMALL = Scenario(memory_bytes=128 * MIB, working_set_bytes=2 * MIB, pages_per_s=1000)
SLOW = 16 << 20


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
    """One migration as QEMU saw it."""

    pids: tuple[int, int]
    truth: StopAndStart

    def holds(self, found: TracedMigration, offset: int) -> str:
        """Empty if the blackout lies where QEMU says; else what is wrong. `offset`: wall clock minus monotonic."""
        switchover = found.switchover
        if switchover is None or switchover.first_start is None:
            return "no blackout"
        return self.truth.off(switchover.stop + offset, switchover.first_start + offset)


def chain() -> list[Hop]:
    """A to B to C, B migrated on as soon as its guest runs."""
    with QemuPair(SMALL, None, OPTIONS) as one, QemuPair(SMALL, None, OPTIONS) as other:
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
        at = one.directory / "source", one.directory / "destination", other.directory / "destination"
        near, middle, far = (path.with_suffix(".trace") for path in at)
        return [
            Hop((one.source.pid, one.destination.pid), stop_and_start(near, middle, one.destination.pid)),
            Hop((one.destination.pid, other.destination.pid), stop_and_start(middle, far, other.destination.pid)),
        ]


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
