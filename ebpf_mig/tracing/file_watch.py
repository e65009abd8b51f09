# SPDX-License-Identifier: Apache-2.0
"""Decides from the events alone whether a guest was written to files, or loaded from files, without dirty logging.

In: events of processes, in order. Out: which of them saved or restored a guest, and when. Pure. The rules are those of
`analysis/snapshot.py` and `analysis/restore.py`, as far as they can be followed while tracing goes on.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ebpf_mig.analysis.restore import STREAM_FILE_BYTES
from ebpf_mig.analysis.snapshot import SAVED_BYTES
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import SEND, Ioctl, Transfer

SAVED_STATE_BYTES = 4096
"""A saved state has more."""
_SAVED = frozenset({"SET_VCPU_EVENTS", "SET_XSAVE", "SET_XCRS", "SET_DEBUGREGS"})
"""What Cloud Hypervisor and Firecracker write only to a vCPU that has run."""
_RESETS = 2
"""How often QEMU writes a vCPU's registers before it loads a state."""


@dataclass
class _Vm:
    stopped: bool = False
    ran: bool = False
    readers: set[int] = field(default_factory=set)
    """Threads that read registers or kicked vCPUs since the stop."""
    written: Counter[int] = field(default_factory=Counter)
    """Bytes that each thread wrote to files since the stop."""
    made: bool = False
    """Its vCPUs were seen to be made."""
    rounds: Counter[int] = field(default_factory=Counter)
    """How often the registers of a vCPU were written, by descriptor."""
    set_saved: bool = False
    read_bytes: Counter[int] = field(default_factory=Counter)
    """Bytes read from files, by how often registers had been written before."""
    asked: bool = False
    """It served its monitor or API."""
    asked_bytes: int = 0
    """Bytes read from files after that."""
    restored: bool = False
    read_state: bool = False
    vcpus: set[int] = field(default_factory=set)
    """Threads that run vCPUs."""
    kickers: set[int] = field(default_factory=set)
    """Threads that kicked vCPUs since the stop."""
    savers: set[int] = field(default_factory=set)
    """Threads that may save in the background: those that stopped the guest, after its registers were read."""
    saved_bytes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """What they sent since the registers were read, by thread and carrier."""
    written_again: Counter[int] = field(default_factory=Counter)
    """How often the registers of a vCPU were written since the stop, by descriptor."""
    read_again: int = 0
    """Bytes read from files since then."""


class FileWatch:
    """Pass it the events of each process."""

    def __init__(self) -> None:
        self._vms: dict[int, _Vm] = {}
        self.saved: dict[int, int] = {}
        """When the last part of a saved guest was written, by pid; also if it runs again by now."""
        self.resumed: dict[int, int] = {}
        """When the guest of one of them ran again; also when it was last written, if that goes on in the background."""
        self.in_background: set[int] = set()
        """Those that are written while the guest runs."""
        self.loaded_again: dict[int, int] = {}
        """When a guest ran that was loaded in place of the one that was stopped."""

    def restored(self, pid: int) -> bool:
        """Whether its guest ran for the first time after it was loaded from files."""
        return pid in self._vms and self._vms[pid].restored

    def run_anew(self, until_ns: int) -> set[int]:
        """The processes that have run another guest since before `until_ns`."""
        return {pid for pid, at in self.loaded_again.items() if at <= until_ns and not self._vms[pid].stopped}

    def kicked(self, pid: int, tid: int) -> None:
        """The thread `tid` asked a vCPU of `pid` to stop."""
        vm = self._of(pid)
        vm.readers.add(tid)
        vm.kickers.add(tid)

    def left(self, pid: int) -> None:
        """A vCPU was interrupted."""
        vm = self._of(pid)
        vm.stopped = vm.ran = True

    def entered(self, pid: int, tid: int, at_ns: int) -> None:
        """The vCPU of the thread `tid` entered the guest."""
        vm = self._of(pid)
        if not vm.ran:
            vm.restored = self._loaded(vm)
        if pid in self.saved and vm.stopped:
            self.resumed.setdefault(pid, at_ns)
        if min(vm.written_again.values(), default=0) > 1 and vm.read_again >= STREAM_FILE_BYTES:
            self.loaded_again[pid] = at_ns
        vm.vcpus.add(tid)
        if vm.stopped and vm.read_state:
            vm.savers |= vm.kickers - vm.vcpus - {pid}
        vm.ran, vm.stopped, vm.read_state = True, False, False
        vm.readers.clear()
        vm.kickers.clear()
        vm.written.clear()
        vm.written_again.clear()
        vm.read_again = 0

    def ioctl(self, event: Ioctl) -> None:
        """A KVM ioctl."""
        name, vm = kvm.name_of(event.cmd), self._of(event.pid)
        vm.made |= name == "CREATE_VCPU"
        if vm.stopped and name in kvm.VCPU_STATE_GET:
            vm.read_state = True
            vm.readers.add(event.tid)
        if vm.stopped and name == "SET_REGS":
            vm.written_again[event.fd] += 1
        if not vm.ran and name in kvm.VCPU_STATE_SET:
            vm.rounds[event.fd] += name == "SET_REGS"
            vm.set_saved |= name in _SAVED

    def sent(self, event: Transfer) -> bool:
        """Something was sent. Returns whether a thread did that which saves a guest that runs on.

        As `analysis/snapshot.py`, `in_background`: the main thread stops guests for other reasons, and writes logs.
        """
        vm, key = self._of(event.pid), (event.tid, event.socket)
        if event.tid not in (vm.kickers if vm.stopped and vm.read_state else vm.savers):
            return False
        vm.saved_bytes[key] += event.bytes  # its thread may begin before the vCPUs are woken
        if vm.stopped or vm.saved_bytes[key] < SAVED_BYTES:
            return False
        self.saved[event.pid] = self.resumed[event.pid] = event.end_ns
        self.in_background.add(event.pid)
        return True

    def transfer(self, event: Transfer) -> None:
        """What was read from or written to a regular file."""
        vm = self._of(event.pid)
        if event.direction != SEND:
            vm.read_again += event.bytes * bool(vm.written_again)
            if not vm.ran:
                vm.asked_bytes += event.bytes * vm.asked
                vm.read_bytes[min(vm.rounds.values(), default=0)] += event.bytes
            return
        if not vm.stopped:
            return
        vm.written[event.tid] += event.bytes
        if vm.read_state and sum(vm.written[tid] for tid in vm.readers) >= SAVED_STATE_BYTES:
            self.saved[event.pid] = event.end_ns
            self.resumed.pop(event.pid, None)

    def received(self, pid: int) -> None:
        """It received something on a UNIX socket."""
        self._of(pid).asked = True

    def _of(self, pid: int) -> _Vm:
        return self._vms.setdefault(pid, _Vm())

    def _loaded(self, vm: _Vm) -> bool:
        least = min(vm.rounds.values(), default=0)
        if not vm.rounds:
            return False
        if not vm.made:
            return vm.asked_bytes >= SAVED_STATE_BYTES
        if least <= 1:
            return vm.set_saved and sum(vm.read_bytes.values()) >= SAVED_STATE_BYTES
        return sum(size for rounds, size in vm.read_bytes.items() if _RESETS <= rounds < least) >= SAVED_STATE_BYTES
