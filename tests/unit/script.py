# SPDX-License-Identifier: Apache-2.0
"""A small language for synthetic recordings: what each VMM does, at which microsecond.

All times given are microseconds after 10 s of monotonic time; results are compared in microseconds too, through
`Result`. The numbers in the tests are worked out by hand from the scripts, not by running the code.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.linux import kvm
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.file import Recording

BASE = 10_000_000_000
US = 1000
ATTACH = dict.fromkeys(("dirty-log", "kick", "lock", "off-cpu", "socket", "state", "vcpu"), "tracepoint")
UNIX, TCP = 1, 2


def cmd(name: str) -> int:
    """The request number of a KVM ioctl."""
    if isinstance(number := getattr(kvm, name, None), int):
        return number
    return next(0x4004AE00 | n for n in range(256) if kvm.name_of(0x4004AE00 | n) == name)


def at(us: float) -> int:
    return BASE + round(us * US)


class Vm:
    """One VMM process. vCPU i is thread pid + 100 + i."""

    def __init__(self, pid: int, role: str, vcpus: int) -> None:
        self.pid, self.role, self.vcpus = pid, role, vcpus
        self.events: list[ev.AnyEvent] = [ev.Thread(pid, self.tid(i), f"CPU {i}/KVM", i) for i in range(vcpus)]
        self._position: dict[tuple[int, int], int] = {}

    def tid(self, vcpu: int) -> int:
        return self.pid + 100 + vcpu

    def entered(self, us: float, vcpu: int = 0, *, left: float | None = None, ret: int = 0, runs: int = 1) -> None:
        """KVM_RUN was entered and the entry was kept; `left` is the return of the call before."""
        before = 0 if left is None else at(left)
        self.events.append(ev.VcpuEnter(at(us), self.pid, self.tid(vcpu), 10 + vcpu, before, ret, runs))

    def interrupted(self, us: float, vcpu: int = 0, *, entered: float | None = None) -> None:
        """KVM_RUN returned -EINTR; `entered` None: the thread was inside before tracing began."""
        enter = 0 if entered is None else at(entered)
        self.events.append(ev.VcpuExit(at(us), self.pid, self.tid(vcpu), 10 + vcpu, enter, -4))

    def last(self, vcpu: int = 0, *, entered: float, left: float, end: float) -> None:
        """The account of a vCPU at the end of tracing."""
        self.events.append(
            ev.VcpuState(at(end), self.pid, self.tid(vcpu), 10 + vcpu, at(entered), at(left), 0, 5, 0, 0, 0)
        )

    def kick(self, us: float, vcpu: int = 0, tid: int = 1) -> None:
        self.events.append(ev.Kick(at(us), self.pid, self.pid + tid, self.tid(vcpu), 10))

    def ioctl(
        self, name: str, us: float, took: float = 10, *, tid: int = 1, slot: int = 0, flags: int = 0, size: int = 0
    ) -> None:
        """A KVM ioctl of thread pid + tid."""
        self.events.append(
            ev.Ioctl(at(us), at(us + took), self.pid, self.pid + tid, 9, cmd(name), 0, slot, flags, 0, size)
        )

    def ioctls(self, names: str, us: float, until: float, tid: int = 1) -> None:
        """Several ioctls, back to back, of equal length."""
        each = (until - us) / len(names.split())
        for index, name in enumerate(names.split()):
            self.ioctl(name, us + index * each, each, tid=tid)

    def gets(self, us: float, slots: Sequence[int] = (0, 3), took: float = 10, step: float = 20, tid: int = 1) -> None:
        """A fetch: GET_DIRTY_LOG of each slot, `step` apart."""
        for index, slot in enumerate(slots):
            self.ioctl("GET_DIRTY_LOG", us + index * step, took, slot=slot, tid=tid)

    def logging(
        self, us: float, slots: Sequence[tuple[int, int]] = ((0, 256 << 20), (3, 16 << 20)), on: bool = True
    ) -> None:
        for index, (slot, size) in enumerate(slots):
            self.ioctl("SET_USER_MEMORY_REGION", us + index * 20, 10, slot=slot, flags=int(on), size=size)

    def send(self, us: float, until: float, size: int, socket: int = 70, tid: int = 1, **more: int) -> None:
        self._transfer(0, us, until, size, socket, tid, more)

    def receive(self, us: float, until: float, size: int, socket: int = 70, tid: int = 1, **more: int) -> None:
        self._transfer(1, us, until, size, socket, tid, more)

    def command(self, us: float, size: int, socket: int = 79, tid: int = 3) -> None:
        """A command on QEMU's monitor, which reads it one byte at a time: here in 2 us each."""
        for index in range(size):
            self.receive(us + 2 * index, us + 2 * index + 1, 1, socket, tid)

    def off(self, us: float, until: float, stack: str = "", *, tid: int = 1, preempted: bool = False) -> None:
        """Thread pid + tid was off the CPU; `stack`: the innermost function."""
        frames = (stack,) if stack else ()
        self.events.append(ev.OffCpu(at(us), at(until), self.pid, self.pid + tid, frames, preempted))

    def socket(self, inode: int, local: str = "", remote: str = "", *, family: int = TCP, peer: int = 0) -> None:
        self.events.append(ev.Socket(at(0), self.pid, 20, inode, family, local, remote, peer))

    def _transfer(
        self, direction: int, us: float, until: float, size: int, socket: int, tid: int, more: dict[str, int]
    ) -> None:
        before = self._position.get((socket, direction), 0)
        self._position[socket, direction] = before + size
        self.events.append(
            ev.Transfer(
                begin_ns=at(us),
                end_ns=at(until),
                pid=self.pid,
                tid=self.pid + tid,
                fd=20,
                direction=direction,
                socket=socket,
                calls=more.get("calls", 1),
                bytes=size,
                in_call_ns=more.get("in_call_us", round(until - us)) * US,
                max_call_ns=0,
                failed=more.get("failed", 0),
                position=before,
                off_cpu_ns=more["off_cpu_us"] * US if "off_cpu_us" in more else -1,
            )
        )


class Script:
    """Builds a recording."""

    def __init__(self) -> None:
        self.vms: list[Vm] = []
        self.marks: list[ev.AnyEvent] = []
        self.ending: ev.Ending | None = ev.Ending(at(1_000_000), "migrated")
        self.attach = dict(ATTACH)

    def vm(self, pid: int, role: str, vcpus: int = 1) -> Vm:
        vm = Vm(pid, role, vcpus)
        self.vms.append(vm)
        return vm

    def pair(self, vcpus: int = 1, *, unix: bool = False) -> tuple[Vm, Vm]:
        """Source 1000 and destination 2000, joined by sockets 70 and 80."""
        source, destination = self.vm(1000, "source", vcpus), self.vm(2000, "destination", vcpus)
        self.join(70, 80, unix=unix)
        return source, destination

    def join(self, left: int, right: int, *, unix: bool = False, port: int = 4444) -> None:
        """A connection between the two VMs."""
        source, destination = self.vms
        if unix:
            source.socket(left, family=UNIX, peer=right)
            destination.socket(right, family=UNIX, peer=left)
        else:
            source.socket(left, f"127.0.0.1:{50000 + left}", f"127.0.0.1:{port}")
            destination.socket(right, f"::ffff:127.0.0.1:{port}", f"::ffff:127.0.0.1:{50000 + left}")

    def mark(self, us: float, pid: int, name: str, value: int = 0, doubt_us: int = 0) -> None:
        self.marks.append(ev.Mark(at(us), pid, name, "", value, doubt_us * US))

    @property
    def header(self) -> ev.Header:
        return ev.Header(
            host="alpha",
            begin_ns=BASE - 1_000_000_000,
            targets=[ev.Target(pid=vm.pid, role=vm.role, vmm="qemu", vmm_version="7.2.22") for vm in self.vms],
            attach=self.attach,
        )

    @property
    def events(self) -> list[ev.AnyEvent]:
        found = [event for vm in self.vms for event in vm.events] + self.marks
        return [*found, self.ending] if self.ending else found

    @property
    def recording(self) -> Recording:
        return Recording(header=self.header, events=self.events)

    def result(self, *, truncated: bool = False) -> Result:
        return Result(analyse(replace(self.recording, truncated=truncated)).breakdown)


class Result:
    """A breakdown in microseconds, zeros left out."""

    def __init__(self, breakdown: Breakdown) -> None:
        self.breakdown = breakdown

    @property
    def phases(self) -> dict[str, float]:
        return {p.phase: p.duration_ns / US for p in self.breakdown.phases if p.duration_ns}

    def spans(self, phase: str) -> list[tuple[float, float]]:
        found = next(p for p in self.breakdown.phases if p.phase == phase)
        return [(begin / US, end / US) for begin, end in found.spans]

    @property
    def window(self) -> float | None:
        return None if self.breakdown.window_ns is None else self.breakdown.window_ns / US

    @property
    def blackout(self) -> tuple[float, float] | None:
        found = self.breakdown.blackout
        return None if found is None else (found[0] / US, found[1] / US)
