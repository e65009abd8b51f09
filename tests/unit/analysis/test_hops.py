# SPDX-License-Identifier: Apache-2.0
"""What each process between the two sides added to the last byte's way."""

from __future__ import annotations

from msgspec.structs import replace

from ebpf_mig.breakdown import Breakdown, Hop
from ebpf_mig.collector import analyse
from ebpf_mig.joining import merge
from ebpf_mig.recording import events as ev
from ebpf_mig.report.text import render
from tests.unit.script import UNIX, US, Script, Vm, at

PROXY, SSH = 3000, 3001


def migration(*forwarders: Vm, name: str = ev.HOP) -> tuple[Script, Breakdown]:
    """Source (socket 70), destination (80). The last byte leaves at 1000 us and is read at 9000 us."""
    script = Script()
    source, destination = script.vm(1000, "source"), script.vm(2000, "destination")
    source.socket(70, family=UNIX, peer=71)
    destination.socket(80, family=UNIX, peer=79)
    source.logging(-900_000)
    source.gets(-899_000)
    source.send(-800_000, -100, 50_000_000)
    source.kick(-50)
    source.interrupted(0)
    source.gets(100)
    source.send(200, 400, 100_000)
    source.ioctls("GET_REGS GET_MSRS", 500, 600)
    source.send(900, 1000, 50_000)
    destination.receive(-700_000, 9000, 50_150_000, socket=80)
    destination.ioctls("SET_REGS SET_MSRS", 9100, 9200)
    destination.entered(9500)
    events = [event for forwarder in forwarders for event in forwarder.events]
    events += [ev.Mark(at(-600_000), forwarder.pid, name, "proxy") for forwarder in forwarders]
    return script, analyse(replace(script.recording, events=[*script.events, *events])).breakdown


def forwarder(pid: int, into: tuple[int, int], out: tuple[int, int], read: int, passed: int, size: int) -> Vm:
    """`into`, `out`: its socket and that socket's other end."""
    found = Vm(pid, "", 0)
    for socket, peer in (into, out):
        found.socket(socket, family=UNIX, peer=peer)
    found.receive(-700_000, read, 50_150_000, socket=into[0])
    found.send(-700_000, passed, size, socket=out[0])
    found.send(-500_000, -400_000, 8, socket=into[0])  # an answer of the destination, passed back
    return found


def test_a_proxy_that_holds_the_last_byte_back() -> None:
    _, found = migration(forwarder(PROXY, (71, 70), (79, 80), 1200, 8200, 50_150_000))
    begin = -50
    expected = Hop(process="proxy", pid=PROXY, sent=(1000 - begin) * US, unread_ns=200 * US, held_ns=7000 * US,
                   delay_ns=7200 * US)  # fmt: skip
    assert found.hops == [expected]
    row = "proxy 3000 delayed the last byte by 7.200 ms: read it after 0.200, then held it for 7.000"
    assert row in " ".join(render(found).split())


def test_two_hops_of_which_one_changes_the_number_of_bytes() -> None:
    """As ssh and sshd do."""
    ssh = forwarder(PROXY, (71, 70), (72, 73), 1100, 3000, 60_000_000)
    sshd = forwarder(SSH, (73, 72), (79, 80), 3400, 8000, 50_150_000)
    found = migration(ssh, sshd)[1].hops or []
    assert [(hop.pid, hop.unread_ns // US, hop.held_ns // US) for hop in found] == [
        (PROXY, 100, 1900),
        (SSH, 400, 4600),
    ]


def test_what_two_hops_say_to_each_other_afterwards_is_not_the_stream() -> None:
    """ssh closes its channel; libvirtd's next calls are on the connection of the tunnel."""
    ssh = forwarder(PROXY, (71, 70), (72, 73), 1100, 3000, 60_000_000)
    sshd = forwarder(SSH, (73, 72), (79, 80), 3400, 8000, 50_150_000)
    ssh.send(90_000, 90_010, 36, socket=72)
    sshd.receive(91_000, 91_010, 36, socket=73)
    found = migration(ssh, sshd)[1].hops or []
    assert [(hop.unread_ns // US, hop.held_ns // US) for hop in found] == [(100, 1900), (400, 4600)]


def test_a_byte_that_was_read_before_its_send_returned() -> None:
    (hop,) = migration(forwarder(PROXY, (71, 70), (79, 80), 950, 1950, 50_150_000))[1].hops or []
    assert (hop.unread_ns, hop.held_ns, hop.delay_ns) == (0, 1000 * US, 1000 * US)


def test_a_process_beside_the_way_is_no_hop_and_no_side() -> None:
    script, found = migration(forwarder(PROXY, (171, 170), (179, 180), 1200, 8200, 90_000_000))
    assert found.hops == [] and found.blackout_ns == 9500 * US
    assert found.migration.source is not None and found.migration.source.pid == 1000
    assert migration()[1].hops is None
    both = replace(script.recording, events=[*script.events, ev.Mark(1, PROXY, ev.HOP, "proxy")])
    assert merge._without_hops(both).events == script.events
