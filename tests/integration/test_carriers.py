# SPDX-License-Identifier: Apache-2.0
"""What carries a migration: sockets, pipes and files, through processes in between, beside busy monitors and disks.

Each is a real migration between two QEMUs, driven by QMP without any code of ours. Witnesses: QMP's events and figures,
and the size of the file that was written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.companion import Companion
from tests.conftest import TRACING, requires
from tests.integration.exporters import running
from tests.integration.live_updates import NEWER
from tests.integration.migrations import QUICK
from tests.integration.test_results import Qmp

pytestmark = requires(*TRACING)

PACED = {"max-bandwidth": 4 << 20}
"""Fast enough for a guest that dirties 1 MiB."""
SLOWLY = {"max-bandwidth": 1 << 20, "downtime-limit": 2000}
"""So that a recorder that waits for a CPU meets the processes in between, too."""
GUEST = replace(QUICK, working_set_bytes=1 << 20, pages_per_s=2000)
PIPED = subprocess.PIPE
Act = Callable[[QemuPair, Qmp, Qmp], None]


def recorded(
    path: Path,
    act: Act,
    *,
    both: bool = True,
    extra: tuple[str, ...] = (),
    binary: str | None = None,
    pace: dict[str, int] = PACED,
) -> Breakdown:
    """What `record` says of what `act` does."""
    with QemuPair(GUEST, binary, extra=extra) as pair:
        source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
        for end in (source, destination):
            end("migrate-set-parameters", **pace)
        pids = ["--pid", str(pair.source.pid), *(["--pid", str(pair.destination.pid)] if both else [])]
        command = [sys.executable, "-m", "ebpf_mig", "record", *pids, "-o", str(path)]
        with running(*command, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None and "tracing" in process.stderr.readline()
            act(pair, source, destination)
            said = process.communicate(timeout=30)[1]
        assert process.returncode == 0, said
    return analyse(read_recording(path)).breakdown


def whole(b: Breakdown, transport: str, *, connections: int = 1, begun: bool = True) -> None:
    """One migration with one blackout, all of it attributed, and nothing in doubt. `begun`: its begin was seen."""
    assert (b.migration.result, b.migration.transport) == ("completed", transport)
    assert b.migration.connections == connections
    assert (b.completeness.verdict, b.completeness.reasons) == ("complete", [])
    assert b.blackout_ns and b.window_ns and b.blackout_ns <= b.window_ns
    assert left(b) <= 0.02 * b.window_ns
    assert b.migration.paused_before is (False if begun else None)
    sent = [s for s in b.sockets if s.role == "source migration"]
    received = [s for s in b.sockets if s.role == "destination migration"]
    assert len(sent) == connections and received
    for row in sent:
        assert row.bytes > 4096 and row.copy_ns is not None and row.copy_ns > 0 and row.blocked_ns is not None
        assert row.copy_ns + row.blocked_ns == row.in_call_ns


def left(b: Breakdown) -> int:
    return next(p.duration_ns or 0 for p in b.phases if p.phase == "unattributed")


def done(source: Qmp, destination: Qmp | None = None) -> None:
    assert source.reaches("completed", "failed") == "completed"
    assert destination is None or destination.reaches("completed", "failed") == "completed"


def give(end: Qmp, descriptor: int, name: str = "carrier") -> None:
    """getfd, with the descriptor beside the command."""
    request = json.dumps({"execute": "getfd", "arguments": {"fdname": name}})
    socket.send_fds(end._socket, [request.encode()], [descriptor])
    while "return" not in (answer := json.loads(end._file.readline())):
        assert "event" in answer, answer


def fifo_of_two_commands(directory: Path) -> Act:
    def act(_pair: QemuPair, source: Qmp, destination: Qmp) -> None:
        os.mkfifo(directory / "fifo")
        destination("migrate-incoming", uri=f"exec:cat {directory}/fifo")
        source("migrate", uri=f"exec:cat > {directory}/fifo")
        done(source, destination)

    return act


def given(make: Callable[[], tuple[int, int]]) -> Act:
    def act(_pair: QemuPair, source: Qmp, destination: Qmp) -> None:
        read_end, write_end = make()
        give(destination, read_end)
        give(source, write_end)
        os.close(read_end)
        os.close(write_end)
        destination("migrate-incoming", uri="fd:carrier")
        source("migrate", uri="fd:carrier")
        done(source, destination)

    return act


def socket_pair() -> tuple[int, int]:
    left, right = socket.socketpair()
    return left.detach(), right.detach()


def proxied(directory: Path) -> Act:
    """UNIX socket, socat, UNIX socket."""

    def act(_pair: QemuPair, source: Qmp, destination: Qmp) -> None:
        destination("migrate-incoming", uri=f"unix:{directory}/in")
        proxy = ["socat", f"UNIX-LISTEN:{directory}/out", f"UNIX-CONNECT:{directory}/in"]
        with Companion(proxy) as process:
            while not (directory / "out").exists():
                time.sleep(0.01)
            source("migrate", uri=f"unix:{directory}/out")
            done(source, destination)
            process.wait(10)

    return act


def test_exec_on_both_sides(tmp_path: Path) -> None:
    b = recorded(tmp_path / "x.rec", fifo_of_two_commands(tmp_path), pace=SLOWLY)
    whole(b, "pipe")
    assert [re.sub(r"\d+", "N", who) for who in b.migration.through] == ["cat N", "cat N"]


def test_a_pipe_given_to_both(tmp_path: Path) -> None:
    b = recorded(tmp_path / "x.rec", given(os.pipe))
    whole(b, "pipe")
    assert b.migration.through == []


def test_a_socket_given_to_both(tmp_path: Path) -> None:
    whole(recorded(tmp_path / "x.rec", given(socket_pair)), "unix")


@pytest.mark.skipif(not shutil.which("socat"), reason="missing feature: socat")
def test_a_proxy_between_unix_sockets(tmp_path: Path) -> None:
    """The shape of KubeVirt and Proxmox."""

    b = recorded(tmp_path / "x.rec", proxied(tmp_path), pace=SLOWLY)
    whole(b, "unix")
    assert len(b.migration.through) == 1 and b.migration.through[0].startswith("socat ")


@pytest.mark.skipif(not shutil.which("socat"), reason="missing feature: socat")
@pytest.mark.parametrize("both", [True, False])
def test_exec_through_a_forwarder(both: bool, tmp_path: Path) -> None:
    def act(_pair: QemuPair, source: Qmp, destination: Qmp) -> None:
        destination("migrate-incoming", uri=f"unix:{tmp_path}/in")
        source("migrate", uri=f"exec:socat - UNIX-CONNECT:{tmp_path}/in")
        done(source, destination)

    b = recorded(tmp_path / "x.rec", act, both=both, pace=SLOWLY)
    if both:
        whole(b, "pipe")
    else:  # it went on to somebody, and nobody said that it was saved
        assert (b.migration.result, b.migration.transport) == ("completed", "pipe")
        assert "the destination was not traced" in " ".join(b.completeness.reasons)
    assert any(who.startswith("socat ") for who in b.migration.through)


def test_a_command_that_writes_a_file(tmp_path: Path) -> None:
    def act(_pair: QemuPair, source: Qmp, _destination: Qmp) -> None:
        source("migrate", uri=f"exec:cat > {tmp_path}/state")
        done(source)

    b = recorded(tmp_path / "x.rec", act, both=False, pace=SLOWLY)
    assert (b.migration.result, b.migration.transport, b.blackout_ns) == ("saved", "pipe", None)
    assert b.migration.mode == "snapshot"
    assert [re.sub(r"\d+", "N", who) for who in b.migration.through] == ["cat N"]
    assert b.window_ns and left(b) <= 0.02 * b.window_ns


def test_a_file_given_to_the_source(tmp_path: Path) -> None:
    """Bytes are those of the file, but for what the kernel half leaves out as too small for a stream."""

    def act(_pair: QemuPair, source: Qmp, _destination: Qmp) -> None:
        with (tmp_path / "state").open("wb") as file:
            give(source, file.fileno())
        said = source("migrate", uri="fd:carrier")
        if "Use file: instead" in str(said):
            pytest.skip("missing feature: a QEMU older than 11, whose `fd:` takes a file")
        done(source)

    b = recorded(tmp_path / "x.rec", act, both=False)
    assert (b.migration.result, b.migration.transport, b.blackout_ns) == ("saved", "file", None)
    assert b.window_ns and left(b) <= 0.02 * b.window_ns
    passes = sum(p.bytes or 0 for p in b.dirty_log.passes)
    final = sum(s.bytes for s in b.sockets if s.role == "source migration")
    size = (tmp_path / "state").stat().st_size
    assert size * 0.9 <= passes + final <= size


def needs_newer() -> None:
    """QEMU knows `file:` since 8.2, mapped-ram since 9.0."""
    said = subprocess.run([NEWER, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"version (\d+)", said)
    if version is None or int(version[1]) < 9:
        pytest.skip("missing feature: QEMU 9 (in PATH, EBPF_MIG_QEMU or EBPF_MIG_NEWER_QEMU)")


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("capabilities", [(), ("mapped-ram",), ("mapped-ram", "multifd")], ids="-".join)
def test_a_file_that_a_destination_loads_or_nobody(capabilities: tuple[str, ...], taken: bool, tmp_path: Path) -> None:
    def act(_pair: QemuPair, source: Qmp, destination: Qmp) -> None:
        for end in (source, destination):
            end.capability(*capabilities)
        source("migrate", uri=f"file:{tmp_path}/state")
        done(source)
        if taken:
            destination("migrate-incoming", uri=f"file:{tmp_path}/state")
            done(source, destination)

    needs_newer()
    b = recorded(tmp_path / "x.rec", act, both=taken, binary=NEWER)
    if taken:
        whole(b, "file")
        return
    assert (b.migration.result, b.migration.transport, b.blackout_ns) == ("saved", "file", None)
    assert b.window_ns and left(b) <= 0.02 * b.window_ns


class Polled:
    """A second monitor, polled as fast as it answers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._over = threading.Event()
        self.bytes = 0

    def __enter__(self) -> Polled:
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _poll(self) -> None:
        monitor = Qmp(str(self._path))
        while not self._over.is_set():
            self.bytes += len(json.dumps(monitor("query-migrate"))) + len(json.dumps(monitor("query-qmp-schema")))


SECOND_MONITOR = ("-qmp", "unix:{dir}/{role}.second,server=on,wait=off")


@pytest.mark.parametrize("carrier", ["pipe", "unix"])
def test_a_monitor_that_is_polled_never_becomes_the_carrier(carrier: str, tmp_path: Path) -> None:
    """Its replies have more bytes than the migration."""
    inner = given(os.pipe if carrier == "pipe" else socket_pair)
    moved = 0

    def act(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
        nonlocal moved
        with Polled(pair.directory / "source.second") as polled:
            time.sleep(0.5)
            inner(pair, source, destination)
        moved = polled.bytes

    b = recorded(tmp_path / "x.rec", act, extra=SECOND_MONITOR)
    whole(b, carrier)
    assert moved > sum(s.bytes for s in b.sockets if s.role == "source migration")


@pytest.fixture(params=["threads", "io_uring"])
def disks(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    """Options for a disk of 32 MiB on each side."""
    for role in ("source", "destination"):
        with (tmp_path / f"{role}.raw").open("wb") as file:
            file.write(os.urandom(1 << 20) * 32)
    yield (
        "-blockdev", f"driver=file,filename={tmp_path}/{{role}}.raw,node-name=disk0,discard=unmap,aio={request.param}",
        "-device", "virtio-blk-pci,drive=disk0,share-rw=on",
    )  # fmt: skip


@pytest.mark.parametrize("carrier", ["pipe", *(pytest.param(one, marks=pytest.mark.long) for one in ("tcp", "unix"))])
def test_a_disk_that_is_copied_over_nbd_never_becomes_the_carrier(
    carrier: str, disks: tuple[str, ...], tmp_path: Path
) -> None:
    """As `virsh migrate --copy-storage-all` does: more bytes than the memory has, between the same two processes."""

    def act(pair: QemuPair, source: Qmp, destination: Qmp) -> None:
        server = {"type": "unix", "data": {"path": f"{tmp_path}/nbd"}}
        if carrier == "tcp":
            server = {"type": "inet", "data": {"host": "127.0.0.1", "port": "10999"}}
        destination("nbd-server-start", addr=server)
        destination("block-export-add", type="nbd", id="e", **{"node-name": "disk0"}, writable=True)
        flat = {"type": server["type"], **server["data"]}  # type: ignore[dict-item]
        source("blockdev-add", driver="nbd", server=flat, export="disk0", **{"node-name": "copy"})
        source("blockdev-mirror", device="disk0", target="copy", sync="full", **{"job-id": "j"})
        deadline = time.monotonic() + 20
        while not any(job.get("ready") for job in source("query-block-jobs")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for end in (source, destination):
            end.capability("pause-before-switchover")
        uri = {"pipe": "fd:carrier", "tcp": "tcp:127.0.0.1:10998", "unix": f"unix:{tmp_path}/m"}[carrier]
        if carrier == "pipe":
            read_end, write_end = os.pipe()
            give(destination, read_end)
            give(source, write_end)
            os.close(read_end)
            os.close(write_end)
        destination("migrate-incoming", uri=uri)
        source("migrate", uri=uri)
        source.reaches("pre-switchover", "failed")
        source("block-job-cancel", device="j")
        while source("query-block-jobs"):
            time.sleep(0.01)
        source("migrate-continue", state="pre-switchover")
        done(source, destination)

    b = recorded(tmp_path / "x.rec", act, extra=disks)
    whole(b, carrier)


def test_a_way_that_leads_to_no_other_qemu_is_refused(tmp_path: Path) -> None:
    """`migrate qemu` drives both ends: they need one address."""
    for uri in ("exec:cat > state", "fd:9", "file:state", "nonsense"):
        command = [sys.executable, "-m", "ebpf_mig", "migrate", "qemu", "--source", "a", "--destination", "b"]
        refused = subprocess.run([*command, "--uri", uri], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert refused.returncode == 2 and uri in refused.stderr, refused.stderr
        assert "no URI through which one QEMU can reach another" in refused.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_tunnel_needs_a_manager(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ebpf_mig", "demo", "--tunnelled"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert refused.returncode == 2 and "QEMU has no manager here" in refused.stderr and "libvirt" in refused.stderr
