# SPDX-License-Identifier: Apache-2.0
"""Migrations through a forwarder between UNIX sockets, the shape of KubeVirt and Proxmox, seen by `watch` on one node.

The forwarders are a process of a few lines, socat, and ssh. The witness is QEMU's own trace.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from ebpf_mig.breakdown import PairedBy
from ebpf_mig.lab.netns import Link
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import TRACING, requires
from tests.integration.exporters import NAMED, OURS, PROGRAM, SETTLED_S, report, running, until
from tests.integration.migrations import LASTING
from tests.integration.shapes import ALL, OPTIONS, completed, joined, start, whole
from tests.integration.sshd import Server
from tests.integration.test_results import Qmp

pytestmark = requires(*TRACING)

SLOW = replace(LASTING, bandwidth_bytes=6 << 20)
"""Takes 3 s, in which one forwarder after the other is found, also on a busy machine."""
Forwarder = Callable[[Path, Path, Path], AbstractContextManager[object]]


def _pump(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)


def _forward(near: socket.socket, far: socket.socket) -> None:
    """Both directions of a connection, until both have ended."""
    with near, far:
        back = threading.Thread(target=_pump, args=(far, near), daemon=True)
        back.start()
        _pump(near, far)
        back.join()


@contextlib.contextmanager
def lines(listen: Path, target: Path, _: Path) -> Iterator[None]:
    """Threads of ours that copy."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(listen))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    near, far = listener.accept()[0], socket.socket(socket.AF_UNIX)
                    far.connect(str(target))
                    threading.Thread(target=_forward, args=(near, far), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield


def socat(listen: Path, target: Path, _: Path) -> AbstractContextManager[object]:
    return running("socat", f"UNIX-LISTEN:{listen},fork", f"UNIX-CONNECT:{target}")


@contextlib.contextmanager
def ssh(listen: Path, target: Path, directory: Path) -> Iterator[None]:
    with ExitStack() as stack:
        link = stack.enter_context(Link())
        server = stack.enter_context(Server(directory / "sshd", link))
        with link.inside("source"):
            command = ["ssh", "-N", "-L", f"{listen}:{target}", "far"]
            stack.enter_context(running(*command, env=server.environment))
        yield


FORWARDERS = pytest.mark.parametrize(
    "forwarder",
    [
        lines,
        pytest.param(socat, marks=[requires("socat"), pytest.mark.long]),
        pytest.param(ssh, marks=[requires("sshd", "tc with tbf and veth"), pytest.mark.timeout(120), pytest.mark.long]),
    ],
)


@FORWARDERS
def test_watch_makes_one_migration_of_both_halves(forwarder: Forwarder, tmp_path: Path) -> None:
    command = [*PROGRAM, "watch", "--format", "json", "--count", "1", "--vm", f"{OURS}*"]
    command += ["--state-directory", str(tmp_path / "state")]
    near, far = tmp_path / "near", tmp_path / "far"
    with ExitStack() as stack:
        watch = stack.enter_context(running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        assert watch.stderr is not None and watch.stdout is not None
        assert "watching" in watch.stderr.readline()
        pair = stack.enter_context(QemuPair(LASTING, None, OPTIONS))
        stack.enter_context(forwarder(near, far, tmp_path))
        source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
        time.sleep(SETTLED_S)
        until(near.exists)
        start(source, destination, f"unix:{far}", f"unix:{near}")
        took = completed(pair, source, destination)
        out = watch.stdout.readline()
    said = json.loads(out)
    found = report(tmp_path / "state" / said["recording"])
    assert said["role"] == "both" and said["result"] == "completed" and said["blackout_ns"] == found.blackout_ns
    # If the destination was found a little late, its first bytes were not counted.
    assert found.migration.pairing is not None
    assert found.migration.pairing.by in (PairedBy.STREAM, PairedBy.FLOW)
    whole(found, took)


@FORWARDERS
def test_join_makes_one_migration_of_both_halves(forwarder: Forwarder, tmp_path: Path) -> None:
    """Between two hosts, each of which sees only its own side."""
    near, far = tmp_path / "near", tmp_path / "far"
    with ExitStack() as stack:
        pair = stack.enter_context(QemuPair(LASTING, None, OPTIONS))
        stack.enter_context(forwarder(near, far, tmp_path))
        source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
        until(near.exists)
        with joined(pair, tmp_path) as found:
            start(source, destination, f"unix:{far}", f"unix:{near}")
            took = completed(pair, source, destination)
            seen = found()
    whole(seen, took)
    assert seen.migration.transport == "unix"


def encrypted(directory: Path) -> list[str]:
    """Options for TLS with a key that both ends know."""
    keys = directory / "keys.psk"
    keys.write_text(f"qemu:{os.urandom(32).hex()}\n")
    ends = {"source": "client", "destination": "server"}
    for role, end in ends.items():
        (directory / role).mkdir()
        shutil.copy(keys, directory / role)
        (directory / f"{role}.ini").write_text(
            f'[object "tls"]\nqom-type = "tls-creds-psk"\ndir = "{directory / role}"\nendpoint = "{end}"\n'
        )
    return ["-readconfig", f"{directory}/{{role}}.ini"]


def tls(ends: Sequence[Qmp]) -> None:
    for end in ends:
        end("migrate-set-parameters", **{"tls-creds": "tls"})


def zlib(ends: Sequence[Qmp]) -> None:
    """Several connections; equal guests have streams of equal length."""
    for end in ends:
        end("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])
        end("migrate-set-parameters", **{"multifd-channels": 2, "multifd-compression": "zlib"})


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize("hidden", [tls, zlib] if ALL else [tls])
def test_two_at_once(hidden: Callable[[Sequence[Qmp]], None], tmp_path: Path) -> None:
    """Two sources, two destinations, and forwarders, all at the same time: no address fits, and nothing can be read.
    Nothing is paired with the other's side.
    """
    state = tmp_path / "state"
    command = [*PROGRAM, "watch", "--format", "json", "--count", "2", "--vm", f"{OURS}*"]
    command += ["--state-directory", str(state)]
    with ExitStack() as stack:
        watch = stack.enter_context(running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        assert watch.stderr is not None and watch.stdout is not None
        assert "watching" in watch.stderr.readline()
        keys = encrypted(tmp_path)
        pairs = [stack.enter_context(QemuPair(LASTING, None, [*NAMED, *keys])) for _ in range(2)]
        time.sleep(SETTLED_S)
        ends = [(Qmp(pair.source.qmp), Qmp(pair.destination.qmp)) for pair in pairs]
        for number, (source, destination) in enumerate(ends):
            near, far = tmp_path / f"near{number}", tmp_path / f"far{number}"
            stack.enter_context(lines(near, far, tmp_path))
            hidden((source, destination))
            source("migrate-set-parameters", **{"max-bandwidth": LASTING.bandwidth_bytes, "downtime-limit": 1000})
            destination("migrate-incoming", uri=f"unix:{far}")
        for number, (source, _) in enumerate(ends):
            source("migrate", uri=f"unix:{tmp_path}/near{number}")
        for source, destination in ends:
            assert source.reaches("completed", "failed") == "completed"
            until(destination.runs)
        said = [json.loads(watch.stdout.readline()) for _ in range(2)]
    found = [report(state / one["recording"]).migration for one in said]
    assert {(m.source and m.source.pid, m.destination and m.destination.pid) for m in found} == {
        (pair.source.pid, pair.destination.pid) for pair in pairs
    }
    assert {m.pairing and m.pairing.by for m in found} <= {PairedBy.STREAM, PairedBy.FLOW}
    assert [m.result for m in found] == ["completed"] * 2


class Holding:
    """A forwarder that holds back whatever ends as QEMU's stream does, with the JSON that describes its state."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self.least_ns = self.most_ns = 0
        """From the read of the last bytes to the begin and to the end of their send, on its own clock. It can lose the
        CPU in between."""

    def pump(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                read = time.monotonic_ns()
                if data.endswith(b"]}"):
                    time.sleep(self.delay_s)
                self.least_ns = time.monotonic_ns() - read
                other.sendall(data)
                self.most_ns = time.monotonic_ns() - read
            other.shutdown(socket.SHUT_WR)

    def serve(self, listener: socket.socket, target: Path) -> None:
        near, far = listener.accept()[0], socket.socket(socket.AF_UNIX)
        far.connect(str(target))
        with near, far:
            threading.Thread(target=_pump, args=(far, near), daemon=True).start()
            self.pump(near, far)


SSH = [requires("sshd", "tc with tbf and veth"), pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    ("tool", "delay_ms", "before", "names"),
    [
        ("record", 5, None, []),
        *([("watch", 50, None, [])] if ALL else []),
        *([pytest.param("record", 50, socat, ["socat"], marks=requires("socat"))] if ALL else []),
        pytest.param("watch", 5, socat, ["socat"], marks=requires("socat")),
        pytest.param("record", 5, ssh, ["ssh", "sshd"], marks=SSH),
        pytest.param("watch", 50, ssh, ["ssh", "sshd"], marks=SSH),
    ],
)
def test_the_delay_of_a_hop(
    tool: str, delay_ms: int, before: Forwarder | None, names: list[str], tmp_path: Path
) -> None:
    """Within 5 % or 200 us of what the forwarder itself measures, also behind others, which come in their order."""
    near, middle, far, state = (tmp_path / name for name in ("near", "middle", "far", "state"))
    holding = Holding(delay_ms / 1000)
    with ExitStack() as stack:
        pair = stack.enter_context(QemuPair(SLOW, None, NAMED))
        command = [*PROGRAM, "record", "-o", str(tmp_path / "seen.rec")]
        command += ["--pid", str(pair.source.pid), "--pid", str(pair.destination.pid)]
        if tool == "watch":
            command = [*PROGRAM, "watch", "--format", "json", "--count", "1", "--vm", f"{OURS}*"]
            command += ["--state-directory", str(state)]
        tracer = stack.enter_context(running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        assert tracer.stderr is not None
        assert tracer.stderr.readline()
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(middle if before else near))
        listener.listen()
        if before:
            stack.enter_context(before(near, middle, tmp_path))
            until(near.exists)
        forwarder = threading.Thread(target=holding.serve, args=(listener, far), daemon=True)
        forwarder.start()
        source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
        destination("migrate-incoming", uri=f"unix:{far}")
        source("migrate-set-parameters", **{"max-bandwidth": SLOW.bandwidth_bytes, "downtime-limit": 1000})
        source("migrate", uri=f"unix:{near}")
        assert source.reaches("completed", "failed") == "completed"
        until(destination.runs)
        assert tracer.wait(30) == 0
    seen = report(next(state.glob("*.rec")) if tool == "watch" else tmp_path / "seen.rec")
    assert seen.hops is not None and seen.migration.result == "completed"
    *others, hop = seen.hops
    assert [other.process for other in others] == names
    for one, following in itertools.pairwise(seen.hops):
        assert following.sent == one.sent + one.delay_ns
    assert hop.pid == os.getpid() and hop.delay_ns == hop.unread_ns + hop.held_ns
    assert holding.least_ns >= delay_ms * 1_000_000
    doubt = max(200_000, holding.least_ns // 20)
    assert holding.least_ns - doubt <= hop.held_ns <= holding.most_ns + doubt, (hop, vars(holding))
    assert seen.blackout_ns is not None and seen.blackout_ns > hop.held_ns
