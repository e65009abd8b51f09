# SPDX-License-Identifier: Apache-2.0
"""Who holds the other end of a pipe or a UNIX socket, with real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

from ebpf_mig.linux import descriptors
from ebpf_mig.recording.events import AF_UNIX, FORWARDER, HOP, KEEPER, NEIGHBOUR, PIPE, Mark, Socket, Transfer
from ebpf_mig.tracing import neighbours
from ebpf_mig.tracing.lifecycle import MigrationWatch
from ebpf_mig.tracing.witness import Witness

OURS = os.getpid()


def marks_of(descriptor: int) -> list[Mark]:
    """Of a pipe of which this process has one end."""
    key = descriptors.carrier_key(OURS, descriptor)
    assert key is not None
    return neighbours.marks([Socket(1, OURS, descriptor, key, PIPE, "", "")], [OURS], 9)[0]


def ended(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(10)


def test_a_command_that_writes_a_file(tmp_path: Path) -> None:
    with (tmp_path / "state").open("wb") as file:
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
    assert process.stdin is not None
    (found,) = marks_of(process.stdin.fileno())
    assert (found.name, found.detail, found.at_ns, found.pid) == (KEEPER, f"cat {process.pid}", 9, OURS)
    assert found.value == descriptors.carrier_key(OURS, process.stdin.fileno())
    ended(process)


def test_a_command_that_writes_to_no_regular_file(tmp_path: Path) -> None:
    """A device keeps nothing, and anybody may read a named pipe."""
    os.mkfifo(tmp_path / "fifo")
    for place in (os.devnull, str(tmp_path / "fifo")):
        descriptor = os.open(place, os.O_RDWR)
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=descriptor)
        os.close(descriptor)
        assert process.stdin is not None
        assert [mark.name for mark in marks_of(process.stdin.fileno())] == [NEIGHBOUR], place
        ended(process)


def test_a_pipeline_that_ends_in_a_file(tmp_path: Path) -> None:
    with (tmp_path / "state").open("wb") as file:
        last = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
    first = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=last.stdin)
    assert first.stdin is not None and last.stdin is not None
    last.stdin.close()
    (found,) = marks_of(first.stdin.fileno())
    assert (found.name, found.detail) == (KEEPER, f"cat {first.pid}, cat {last.pid}")
    ended(first)
    last.wait(10)


def test_a_pipeline_that_ends_in_a_socket() -> None:
    """Only the last of them could pass the bytes on to another host."""
    near, far = socket.socketpair()
    with near, far:
        last = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=near)
        first = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=last.stdin)
    assert first.stdin is not None and last.stdin is not None
    last.stdin.close()
    (found,) = marks_of(first.stdin.fileno())
    assert (found.name, found.detail) == (FORWARDER, f"cat {first.pid}, cat {last.pid}")
    ended(first)
    last.wait(10)


def test_a_pipeline_that_feeds_us_under_a_shell() -> None:
    """The shell holds the end as well; its commands started later."""
    process = subprocess.Popen(["sh", "-c", "cat | cat; true"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    deadline, names = time.monotonic() + 10, list[str]()
    while names != ["cat", "cat"]:  # each is a copy of the shell at first
        assert time.monotonic() < deadline, names
        names = [name.split()[0] for name in marks_of(process.stdout.fileno())[0].detail.split(", ")]
    ended(process)


def test_complaints_over_a_socket_are_no_way_out() -> None:
    """As under systemd, where standard error leads to the journal."""
    near, far = socket.socketpair()
    with near, far:
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=near)
        assert process.stdin is not None
        assert [mark.name for mark in marks_of(process.stdin.fileno())] == [NEIGHBOUR]
        ended(process)


def test_the_other_end_of_a_unix_socket() -> None:
    near, far = socket.socketpair()
    peer = descriptors.carrier_key(OURS, far.fileno())
    assert peer is not None
    with near:
        with far:
            process = subprocess.Popen(["cat"], stdin=far, stdout=far)
        (found,) = neighbours.marks([Socket(1, OURS, near.fileno(), 5, AF_UNIX, "", "", peer)], [OURS], 9)[0]
        assert (found.name, found.detail, found.value) == (FORWARDER, f"cat {process.pid}", 5)
    process.wait(10)


def test_a_destination_that_is_traced_later_is_not_on_the_way() -> None:
    near, far = socket.socketpair()
    key, peer = (descriptors.carrier_key(OURS, end.fileno()) for end in (near, far))
    assert key is not None and peer is not None
    watch, witness = MigrationWatch([OURS]), Witness([OURS])
    with near:
        with far:
            process = subprocess.Popen(["cat"], stdin=far, stdout=far)
        watch.saw([Socket(1, OURS, near.fileno(), key, AF_UNIX, "", "", peer)])
        watch.saw([Transfer(2, 3, OURS, OURS, near.fileno(), 0, key, 1, 1 << 20, 1, 1, 0, 0)])
        witness.meet(watch, 9)
        assert {mark.name for mark in witness.marks() if isinstance(mark, Mark)} == {FORWARDER, HOP}
        witness.joined(process.pid)
        assert witness.marks() == []
    process.wait(10)


def test_what_nobody_else_holds() -> None:
    read_end, write_end = os.pipe()
    assert marks_of(write_end) == []
    os.close(read_end)
    os.close(write_end)
    assert neighbours.marks([], [OURS], 9) == ([], set())
