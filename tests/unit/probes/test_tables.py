# SPDX-License-Identifier: Apache-2.0
"""The kernel's real tables, through bcc and through descriptors alone: both ways read and write the same."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from ebpf_mig.linux import kvm, procfs
from ebpf_mig.linux.descriptors import vcpus_of
from ebpf_mig.linux.procfs import may_run_vcpu
from ebpf_mig.probes.inherited import InheritedProgram
from ebpf_mig.probes.loader import Program
from ebpf_mig.probes.macros import defines
from ebpf_mig.probes.plan import WALKER
from ebpf_mig.probes.program import BpfProgram
from ebpf_mig.probes.records import CONTRACT, stream_key
from ebpf_mig.probes.tables import ProcessTable, SocketTable, counts, own_runs
from ebpf_mig.recording.events import RECEIVE, SEND, OwnRuns, Socket, Transfer, VcpuState
from tests.companion import Companion
from tests.conftest import requires
from tests.truth.beside import HALTS, PAUSED, SPINS, VCPU_ID, vmm

pytestmark = requires("root", "bcc", "kernel BTF")
OURS = os.getpid()


@pytest.fixture(scope="module")
def compiled() -> Iterator[Program]:
    program = Program("trace.bpf.c", defines([], set()), CONTRACT)
    yield program
    program.close()


@pytest.fixture(scope="module")
def walker_fd(compiled: Program) -> int:
    return compiled.load_iterator(WALKER, "task")


@pytest.fixture(params=["bcc", "inherited"])
def program(compiled: Program, request: pytest.FixtureRequest) -> Iterator[BpfProgram]:
    """The same tables, empty."""
    for table in ("threads", "processes", "streams", "tcp_owners", "queues", "requests"):
        compiled.table(table).clear()
    if request.param == "bcc":
        yield compiled
        return
    fds: list[int] = []
    description = compiled.describe(fds)
    inherited = InheritedProgram(description, [os.dup(fd) for fd in fds])
    yield inherited
    inherited.close()


def put_thread(program: BpfProgram, tid: int, pid: int) -> None:
    """As the kernel half leaves a vCPU thread that also received on socket 80."""
    threads = program.table("threads")
    thread = threads.Leaf(tgid=pid, vcpu_fd=12, run_enter_ns=300, run_exit_ns=200, run_ret=-4, runs=3, in_ns=70)
    batch = thread.batch[RECEIVE]
    batch.begin_ns, batch.end_ns, batch.fd, batch.socket, batch.calls, batch.bytes = 100, 200, -1, 80, 2, 4096
    threads[ctypes.c_uint32(tid)] = thread


def test_accounts_are_those_of_one_process_or_of_all(program: BpfProgram) -> None:
    put_thread(program, 8, 7)
    put_thread(program, 18, 17)
    streams = program.table("streams")
    streams[ctypes.c_uint64(stream_key(7, 80))] = streams.Leaf((500, 1000))
    table = ProcessTable(program)
    transfer = Transfer(100, 200, 7, 8, -1, 1, 80, 2, 4096, 0, 0, 0, 1000, 0, 0)
    account = VcpuState(999, 7, 8, 12, 300, 200, -4, 3, 70, 0, 0)
    assert table.accounts(999, 7) == [transfer, account]
    assert sorted(event.pid for event in table.accounts(999)) == [7, 7, 17, 17]
    table.forget(7)
    assert {event.pid for event in table.accounts(999)} == {17}


def test_queued_requests_are_those_of_one_process_or_of_all(program: BpfProgram) -> None:
    """A batch that has its event is none; what is in flight is forgotten with the process."""
    queues, requests, streams = (program.table(name) for name in ("queues", "requests", "streams"))
    for number, pid, calls in ((1, 7, 2), (2, 7, 0), (3, 17, 2)):
        queue = queues.Leaf(tgid=pid, tid=pid + 1, direction=RECEIVE)
        batch = queue.batch
        batch.begin_ns, batch.end_ns, batch.fd, batch.socket, batch.calls = 100, 200, -1, 80, calls
        batch.bytes, batch.in_call_ns, batch.max_call_ns = 4096, 90, 60
        queues[ctypes.c_uint64(number)] = queue
        requests[ctypes.c_uint64(number)] = requests.Leaf(tgid=pid)
    streams[ctypes.c_uint64(stream_key(7, 80))] = streams.Leaf((500, 1000))
    table = ProcessTable(program)
    assert table.accounts(999, 7) == [Transfer(100, 200, 7, 0, -1, RECEIVE, 80, 2, 4096, 90, 60, 0, 1000)]
    assert sorted(event.pid for event in table.accounts(999)) == [7, 17]
    table.forget(7)
    assert [event.pid for event in table.accounts(999)] == [17]
    assert [one.tgid for _, one in requests.items()] == [17]


def test_a_process_is_traced_until_it_is_removed(program: BpfProgram) -> None:
    table, processes = ProcessTable(program), program.table("processes")
    table.add([OURS])
    assert [(key.value, leaf.running) for key, leaf in processes.items()] == [(OURS, 0)]
    table.remove(OURS)
    table.remove(OURS)
    assert list(processes.items()) == []


@requires("x86-64", "/dev/kvm")
@pytest.mark.parametrize("guest", [PAUSED, SPINS, HALTS])
def test_a_busy_thread_of_a_vmm_is_no_vcpu(guest: str, walker_fd: int, program: BpfProgram) -> None:
    """A vCPU whose guest never sleeps nor leaves KVM_RUN has no event, and /proc says of both threads only that they
    run. A guest that halted is counted at once.
    """
    with vmm(guest) as (pid, (busy, *vcpus)):
        assert may_run_vcpu(pid, busy)
        table = ProcessTable(program, walker_fd)
        table.add([pid])
        assert table.inside(pid) == dict.fromkeys(vcpus, VCPU_ID)
        silent = table.silent_vcpus(999)
        assert [state.tid for state in silent] == (vcpus if guest == SPINS else [])
        assert all(vcpus_of(pid)[state.fd] == VCPU_ID for state in silent), "/proc/PID/syscall says `running` of it"
        assert [leaf.running for _, leaf in program.table("processes").items()] == [int(guest == HALTS)]


def test_a_thread_that_was_busy_all_the_time_may_have_run_a_guest(program: BpfProgram) -> None:
    """Where the kernel cannot be asked who is inside KVM."""
    table = ProcessTable(program)
    with Companion(["sh", "-c", "while :; do :; done"]) as busy, Companion(["sleep", "60"]) as idle:
        try:
            time.sleep(0.1)
            table.add([busy.pid, idle.pid])
            expected = VcpuState(999, busy.pid, busy.pid, -1, 0, 0, 0, 0, 0, 0, 0)
            assert table.silent_vcpus(999) == table.silent_vcpus(999, busy.pid) == [expected]
            assert table.silent_vcpus(999, idle.pid) == []
            put_thread(program, busy.pid, busy.pid)
            assert table.silent_vcpus(999) == [], "it made a traced call"
            table.forget(busy.pid)
            assert table.silent_vcpus(999) == []
        finally:
            busy.kill()
            idle.kill()


def test_only_the_sockets_of_a_process_are_forgotten(program: BpfProgram) -> None:
    streams, owners = program.table("streams"), program.table("tcp_owners")
    sockets = SocketTable(program)
    for pid, inode in ((7, 80), (7, 81), (17, 80), (17, 90)):
        sockets.seen(Socket(1, pid, 3, inode, 2, "", ""))
        streams[ctypes.c_uint64(stream_key(pid, inode))] = streams.Leaf((1, 2))
        owners[ctypes.c_uint64(inode << 8 | pid)] = owners.Leaf(pid=pid, socket=inode)
    sockets.forget(7)
    assert {key.value for key, _ in streams.items()} == {stream_key(17, 80), stream_key(17, 90)}
    assert {(leaf.pid, leaf.socket) for _, leaf in owners.items()} == {(17, 80), (17, 90)}
    sockets.clear()
    assert list(streams.items()) == list(owners.items()) == []


def test_an_open_batch_follows_what_came_before_it(program: BpfProgram) -> None:
    """A program that is still writing a batch's record has counted its bytes already."""

    def batch(position: int, size: int, *, direction: int = SEND, pid: int = 7) -> Transfer:
        return Transfer(1, 2, pid, pid, 3, direction, 80, 1, size, 1, 1, 0, position)

    sockets = SocketTable(program)
    assert sockets.follows(batch(0, 10)) and not sockets.follows(batch(10, 10))
    sockets.moved(batch(0, 100))
    assert sockets.follows(batch(100, 10))
    sockets.moved(batch(120, 30))  # of another CPU, whose record comes first
    sockets.moved(batch(100, 20))
    assert sockets.follows(batch(150, 10)) and not sockets.follows(batch(160, 10))
    assert sockets.follows(batch(0, 10, direction=RECEIVE)) and sockets.follows(batch(0, 10, pid=17))
    sockets.moved(batch(0, 5))
    assert sockets.follows(batch(5, 10)), "it begins anew"
    sockets.forget(7)
    assert sockets.follows(batch(0, 10))


ASLEEP = {"sleep": ("230", "115"), "cat": ("0", "63")}
"""clock_nanosleep and read, on x86-64 and on arm64."""


@pytest.mark.parametrize(
    ("command", "nr", "request_", "missed"),
    [
        pytest.param(["sleep", "60"], 47, 0, 1, id="recvmsg, but it sleeps in clock_nanosleep"),
        pytest.param(["sleep", "60"], 16, kvm.GET_DIRTY_LOG, 1, id="ioctl, but it sleeps in clock_nanosleep"),
        pytest.param(["sleep", "60"], 16, kvm.RUN, 0, id="KVM_RUN needs no return probe"),
        pytest.param(["cat"], 0, 0, 0, id="read, in which it may still be"),
    ],
)
def test_a_call_that_is_over_without_a_return_is_missed(
    program: BpfProgram, command: list[str], nr: int, request_: int, missed: int
) -> None:
    with Companion(command, stdin=subprocess.PIPE) as process:
        while procfs.text(process.pid, "syscall").split()[0] not in ASLEEP[command[0]]:
            time.sleep(0.01)
        threads, table = program.table("threads"), ProcessTable(program)
        threads[ctypes.c_uint32(process.pid)] = threads.Leaf(tgid=process.pid, nr=nr + 1, a1=request_, enter=1)
        assert (table.missed_returns(), table.missed_returns(process.pid), table.missed_returns(1)) == (
            missed,
            missed,
            0,
        )
        process.kill()


def test_counts_have_the_names_of_kinds_and_no_zeros(program: BpfProgram, compiled: Program) -> None:
    lost = compiled.table("lost")
    for kind, n in ((1, 3), (15, 2)):
        per_cpu = lost.Leaf()
        per_cpu[0] = n
        lost[ctypes.c_int(kind)] = per_cpu
    assert counts(program, "lost") == {"ioctl": 3, "thread-table": 2}
    assert counts(program, "unpaired") == {}


def test_sums_of_our_own_runs_are_those_of_each_cpu(program: BpfProgram) -> None:
    table = program.table("own_runs")
    try:
        assert own_runs(program, 90) == []
        leaf = table.Leaf(since_ns=10, until_ns=20, run_ns=5, runs=4, calls=2, other_runs=3, other_calls=1)
        table[ctypes.c_int(0)] = leaf
        assert own_runs(program, 90) == [OwnRuns(10, 20, 90, 0, 5, 4, 2, 3, 1)]
        table[ctypes.c_int(0)] = table.Leaf(other_runs=3, other_calls=1)
        assert own_runs(program, 90) == [OwnRuns(90, 90, 90, 0, 0, 0, 0, 3, 1)], "no traced process ran there"
    finally:
        table[ctypes.c_int(0)] = table.Leaf()
