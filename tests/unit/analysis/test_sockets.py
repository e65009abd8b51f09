# SPDX-License-Identifier: Apache-2.0
"""Which sockets carry the migration."""

from __future__ import annotations

import pytest

from ebpf_mig.analysis.carrier import choose
from ebpf_mig.analysis.material import split
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.sockets import Channels, normal
from ebpf_mig.linux.descriptors import PLACED
from ebpf_mig.recording.events import AF_VSOCK, FILE, PIPE
from tests.unit.script import BASE, UNIX, Script, Vm

FETCHER = frozenset({1001})


def chosen(script: Script, *, alone: bool = False, fetchers: frozenset[int] = FETCHER) -> Channels:
    processes = split(script.recording).processes
    destination: Process | None = None if alone else processes[2000]
    return choose(processes[1000], destination, BASE, fetchers)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:4444", "127.0.0.1:4444"),
        ("::ffff:127.0.0.1:4444", "127.0.0.1:4444"),
        ("[::ffff:10.0.0.1]:1", "10.0.0.1:1"),
        ("[fe80::1]:9", "fe80::1:9"),
        ("", ":"),
    ],
)
def test_one_spelling_for_an_address(address: str, expected: str) -> None:
    assert normal(address) == expected


def test_the_connection_between_the_two_wins_over_the_bulk_elsewhere() -> None:
    script = Script()
    source, destination = script.pair()
    source.socket(75, "10.0.0.1:5900", "10.0.0.9:40000")
    source.send(100, 200, 5000)
    source.send(100, 200, 900_000, socket=75)
    destination.receive(150, 250, 5000, socket=80)
    assert chosen(script) == Channels(frozenset({70}), frozenset({80}), "tcp")


def test_unix_sockets_meet_by_their_peers() -> None:
    script = Script()
    source, destination = script.pair(unix=True)
    source.socket(75, family=UNIX, peer=12345)
    source.send(100, 200, 5000)
    source.send(100, 200, 900_000, socket=75)
    destination.receive(150, 250, 5000, socket=80)
    assert chosen(script) == Channels(frozenset({70}), frozenset({80}), "unix")


@pytest.mark.parametrize(
    ("near", "far"),
    [
        (("1:9999", "1:5000"), ("1:5000", "1:9999")),
        (("*:9999", "2:5000"), ("2:5000", "1:9999")),  # by the host's CID, on the host
        (("*:9999", "42:5000"), ("42:5000", "1:9999")),  # by a guest's own CID, in the guest
        (("2:5000", "1:9999"), ("*:9999", "2:5000")),  # the side that listened sends
    ],
)
def test_vsocks_meet_by_their_addresses(near: tuple[str, str], far: tuple[str, str]) -> None:
    script = Script()
    source, destination = script.vm(1000, "source"), script.vm(2000, "destination")
    source.socket(70, *near, family=AF_VSOCK)
    source.socket(71, "1:9998", "1:6000", family=AF_VSOCK)
    destination.socket(80, *far, family=AF_VSOCK)
    source.send(100, 200, 5000)
    source.send(100, 200, 900_000, socket=71)
    destination.receive(150, 250, 5000, socket=80)
    found = chosen(script)
    assert found == Channels(frozenset({70}), frozenset({80}), "vsock")
    assert found.ends == ((70, 80),)


def test_further_vsocks_of_a_migration_lead_to_the_same_port() -> None:
    """Multifd, of which only the source was traced. The console's vsock has as many bytes."""
    script = Script()
    source = script.vm(1000, "source")
    for inode, remote in ((70, "1:5000"), (71, "1:5000"), (75, "42:7000")):
        source.socket(inode, f"*:{inode}", remote, family=AF_VSOCK)
    source.send(100, 200, 5000)
    source.send(100, 200, 900_000, socket=71, tid=5)
    source.send(100, 200, 900_000, socket=75, tid=9)
    assert chosen(script, alone=True) == Channels(frozenset({70, 71}), frozenset(), "vsock")


def test_an_unknown_peer_is_found_through_the_other_end() -> None:
    script = Script()
    source, destination = script.vm(1000, "source"), script.vm(2000, "destination")
    source.socket(70, family=UNIX, peer=0)
    destination.socket(80, family=UNIX, peer=70)
    source.send(100, 200, 5000)
    destination.receive(150, 250, 5000, socket=80)
    assert chosen(script).destination == {80}


def test_storage_migrates_over_another_port() -> None:
    script = Script()
    source, _ = script.pair()
    script.join(75, 85, port=10809)
    source.send(100, 200, 50_000)
    source.send(100, 200, 9_000_000, socket=75, tid=2)
    assert chosen(script).source == {70}


def test_multifd_counts_every_connection_to_the_same_port() -> None:
    script = Script()
    source, _ = script.pair()
    script.join(72, 82)
    script.join(73, 83)
    source.send(100, 200, 5_000)
    source.send(100, 200, 9_000_000, socket=72, tid=5)
    source.send(100, 200, 1_000, socket=73, tid=6)
    found = chosen(script)
    assert (found.source, found.destination, found.connections) == ({70, 72, 73}, {80, 82, 83}, 3)


def test_without_the_destination_the_fetching_threads_socket_is_it() -> None:
    script = Script()
    source = script.vm(1000, "source")
    source.socket(70, "10.0.0.1:50000", "10.0.0.2:4444")
    source.socket(72, "10.0.0.1:50001", "10.0.0.2:4444")
    source.socket(75, "10.0.0.1:5900", "10.0.0.9:40000")
    source.send(100, 200, 5_000)
    source.send(100, 200, 90_000, socket=72, tid=5)
    source.send(100, 200, 9_000_000, socket=75, tid=3)
    assert chosen(script, alone=True) == Channels(frozenset({70, 72}), frozenset(), "tcp")


def test_events_of_a_monitor_are_too_few_bytes() -> None:
    script = Script()
    source = script.vm(1000, "source")
    source.socket(71, family=UNIX, peer=9)
    source.send(100, 200, 112, socket=71)
    assert chosen(script, alone=True) == Channels(frozenset(), frozenset(), "none")


def test_a_busy_monitor_is_not_it_although_the_fetching_thread_speaks_there() -> None:
    script = Script()
    source = script.vm(1000, "source")
    source.send(100, 200, 9_000_000, tid=5)
    source.send(100, 200, 300, socket=71)
    source.send(300, 400, 50_000, socket=71, tid=3)
    assert chosen(script, alone=True).source == {70}


def test_further_unix_connections_by_their_share() -> None:
    script = Script()
    source = script.vm(1000, "source")
    for inode in (70, 72, 75):
        source.socket(inode, family=UNIX, peer=0)
    source.send(100, 200, 1_000_000)
    source.send(100, 200, 900_000, socket=72, tid=5)
    source.send(100, 200, 5_000, socket=75, tid=3)
    assert chosen(script, alone=True).source == {70, 72}


def test_sockets_without_a_description() -> None:
    script = Script()
    source, destination = script.vm(1000, "source"), script.vm(2000, "destination")
    source.send(100, 200, 900_000)
    destination.receive(150, 250, 900_000, socket=0)
    found = chosen(script)
    assert (found.source, found.destination, found.transport) == ({70}, {-21}, "unknown")


def test_sends_before_the_migration_do_not_count() -> None:
    script = Script()
    source = script.vm(1000, "source")
    source.send(-5000, -4000, 90_000_000, socket=75)
    source.send(100, 200, 90_000)
    assert chosen(script, alone=True).source == {70}


def test_no_transfers_at_all() -> None:
    script = Script()
    script.pair()
    assert chosen(script) == Channels()


def monitor_polled(vm: Vm, inode: int, times: int) -> None:
    """The main thread answers query-migrate, and the fetching thread sends events there."""
    for at in range(times):
        for byte in range(3):
            vm.receive(at * 100 + byte, at * 100 + byte + 1, 1, socket=inode, tid=9)
        vm.send(at * 100 + 10, at * 100 + 20, 900, socket=inode, tid=9)
        vm.send(at * 100 + 30, at * 100 + 40, 90, socket=inode, tid=1)


def test_a_polled_monitor_beside_a_carrier_that_is_not_seen() -> None:
    """exec:, a pipe or a file: the replies are large, but they are not the migration."""
    script = Script()
    source = script.vm(1000, "source")
    source.socket(71, family=UNIX)
    monitor_polled(source, 71, 500)
    assert chosen(script, alone=True).source == frozenset()


def test_a_polled_monitor_is_no_further_connection() -> None:
    script = Script()
    source = script.vm(1000, "source")
    for inode in (70, 71):
        source.socket(inode, family=UNIX)
    source.gets(10, tid=1)
    source.send(100, 200, 400_000, socket=70, tid=1)
    monitor_polled(source, 71, 500)
    assert chosen(script, alone=True).source == {70}


def test_a_disk_over_nbd_beside_a_carrier_that_is_not_seen() -> None:
    """Its requests are large, and each is answered to the thread that sent it."""
    script = Script()
    source = script.vm(1000, "source")
    source.socket(72, "10.0.0.1:50000", "10.0.0.2:10809")
    for at in range(50):
        source.send(at * 100, at * 100 + 50, 1 << 20, socket=72, tid=9)
        source.receive(at * 100 + 50, at * 100 + 60, 16, socket=72, tid=9)
    assert chosen(script, alone=True).source == frozenset()


def test_without_a_send_of_the_migration_the_verdict_is_bounded() -> None:
    script = Script()
    source, destination = script.pair()
    source.logging(1000)
    source.gets(2000)
    source.interrupted(10_000)
    source.gets(11_000)
    source.ioctls("GET_REGS GET_SREGS", 11_100, 11_200)
    destination.ioctls("SET_SREGS SET_REGS", 12_000, 12_400)
    destination.entered(13_000)
    state = script.result().breakdown.completeness
    assert state.verdict == "bounded"
    assert any("its carrier is unknown (a pipe, a file, a vsock, RDMA)" in reason for reason in state.reasons)
    script.attach |= {"pipe": "tracepoint", "file": "tracepoint", "vsock": "tracepoint"}
    assert any("its carrier is unknown (RDMA)" in r for r in script.result().breakdown.completeness.reasons)


def test_a_pipe_between_the_two_has_one_key() -> None:
    script = Script()
    source, destination = script.vm(1000, "source"), script.vm(2000, "destination")
    for vm in (source, destination):
        vm.socket(70, family=PIPE)
    source.send(100, 200, 90_000)
    destination.receive(150, 250, 90_000)
    found = chosen(script)
    assert found == Channels(frozenset({70}), frozenset({70}), "pipe")
    assert found.ends == ((70, 70),)


def test_what_others_pass_on_is_recognised_by_its_bytes() -> None:
    """The destination also serves a disk, which receives more."""
    script = Script()
    source, destination = script.vm(1000, "source"), script.vm(2000, "destination")
    source.socket(70, family=PIPE)
    destination.socket(80, family=PIPE)
    destination.socket(85, "10.0.0.2:10809", "10.0.0.1:50000")
    source.send(100, 200, 900_000)
    destination.receive(150, 250, 899_936, socket=80)
    destination.receive(150, 250, 9_000_000, socket=85)
    found = chosen(script)
    assert (found.source, found.destination, found.transport) == ({70}, {80}, "pipe")
    assert found.ends == ((70, 80),)


def test_a_connection_between_the_two_is_not_it_if_the_fetching_thread_sends_elsewhere() -> None:
    """Memory goes through a pipe, and a disk over NBD between the same two processes."""
    script = Script()
    source, destination = script.vm(1000, "source"), script.vm(2000, "destination")
    script.join(75, 85, port=10809)
    source.socket(70, family=PIPE)
    destination.socket(80, family=PIPE)
    source.send(100, 200, 900_000)
    source.send(100, 200, 9_000_000, socket=75, tid=5)
    destination.receive(150, 250, 900_000, socket=80)
    destination.receive(150, 250, 9_000_000, socket=85)
    assert chosen(script) == Channels(frozenset({70}), frozenset({80}), "pipe")


def test_a_disk_over_a_unix_socket_is_no_further_connection() -> None:
    script = Script()
    source, destination = script.pair(unix=True)
    source.socket(75, family=UNIX, peer=85)
    destination.socket(85, family=UNIX, peer=75)
    source.send(100, 200, 900_000)
    source.send(100, 200, 9_000_000, socket=75, tid=5)
    source.receive(200, 210, 16, socket=75, tid=5)
    destination.receive(150, 250, 900_000, socket=80)
    assert chosen(script) == Channels(frozenset({70}), frozenset({80}), "unix")


def test_a_file_is_it_only_if_the_fetching_thread_writes_it() -> None:
    script = Script()
    source = script.vm(1000, "source")
    for inode in (PLACED | 7, PLACED | 8):
        source.socket(inode, family=FILE)
    source.send(100, 200, 9_000_000, socket=PLACED | 7, tid=5)
    assert chosen(script, alone=True).source == frozenset(), "a disk"
    assert chosen(script, alone=True, fetchers=frozenset()).source == frozenset()
    source.send(100, 200, 90_000, socket=PLACED | 8)
    assert chosen(script, alone=True) == Channels(frozenset({PLACED | 8}), frozenset(), "file")


def test_a_destination_alone_is_filled_by_what_it_does_not_answer() -> None:
    script = Script()
    script.vm(1000, "source")
    destination = script.vm(2000, "destination")
    destination.socket(80, "10.0.0.2:4444", "10.0.0.1:50000")
    destination.socket(85, "10.0.0.2:10809", "10.0.0.1:50001")
    destination.socket(PLACED | 7, family=FILE)
    destination.receive(100, 200, 900_000, socket=80)
    destination.send(200, 210, 8, socket=80)
    destination.receive(100, 200, 20_000_000, socket=PLACED | 7)
    for at in range(100, 120):
        destination.receive(at, at + 1, 1 << 20, socket=85)
        destination.send(at + 1, at + 2, 16, socket=85)
    process = split(script.recording).processes[2000]
    assert choose(None, process, BASE, ()) == Channels(frozenset(), frozenset({80}), "tcp")
