# SPDX-License-Identifier: Apache-2.0
"""A restore: a process loads memory and state of a guest from files, and runs it.

In: a process. Out: a `Restore` if it did that, and the phases of its part of the window.

A VMM that boots also reads files (firmware, kernel) and writes registers. What tells a restore apart:

    Cloud Hypervisor, Firecracker   write each vCPU's registers once, and with them what only a saved vCPU has
                                    (KVM_SET_VCPU_EVENTS, KVM_SET_XSAVE); a boot does not
    QEMU                            writes them for new vCPUs and after the reset (`qemu_system_reset`), and reads no
                                    file after that, unless it restores: then they are written once more

A file that is mapped instead of read is known by mmap(2). Its pages come when the guest touches them.

QEMU's loadvm and snapshot-load replace the guest of a VM that runs (`again`). They stop it, return its disks to the
snapshot, reset the machine, and read the state from a disk image by worker threads (`load_snapshot`,
migration/savevm.c, 7.2 to 11.1).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ebpf_mig.analysis import dirty_log, loading, requests
from ebpf_mig.analysis.phases import Partition
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.reception import LOADED_BYTES
from ebpf_mig.analysis.requests import Request
from ebpf_mig.analysis.sockets import LEAST_BYTES, family_of
from ebpf_mig.analysis.switchover import Switchover
from ebpf_mig.breakdown import PhaseName, Span, SwitchoverKind
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import FILE, RECEIVE, FileCall, Ioctl, Transfer

_SAVED = frozenset({"SET_VCPU_EVENTS", "SET_XSAVE", "SET_XCRS", "SET_DEBUGREGS"})
"""What only a vCPU that has run has, for VMMs that write it only then."""
_RESETS = 2
"""How often QEMU has written a vCPU's registers before it can load a state: for a new vCPU, and after the reset."""
MEMORY_FILE_BYTES = 1 << 20
"""Memory that is read as a whole is larger than this; a state is not."""
STREAM_FILE_BYTES = 64 << 10
"""The same for one file with both. It has at least a header for each page, also if most are zero."""


@dataclass(frozen=True, slots=True)
class Restore:
    """When a process loaded a guest from files. Instants are absolute, in ns."""

    files: frozenset[int]
    """As keys of carriers."""
    memory: list[Span]
    """When its memory was read or mapped."""
    begin: int
    """The request to load, or the first act of loading."""
    loaded: int
    """The end of the last ioctl that loaded something."""
    start: int
    """The first vCPU's start."""
    managed: list[Span]
    """When it waited for a request before the start."""


def find(process: Process) -> Restore | None:
    """Whether and how the process restored the guest that it then ran."""
    lines = process.vcpus.values()
    starts = [line.first_run for line in lines if line.first_run is not None]
    if not starts or any(line.ran_before for line in lines):
        return None
    start = min(starts)
    ioctls = [i for i in process.ioctls if i.begin_ns < start]
    clock = max((i.begin_ns for i in ioctls if kvm.name_of(i.cmd) == "SET_CLOCK"), default=start)
    setters = [i for i in ioctls if kvm.name_of(i.cmd) in kvm.VCPU_STATE_SET and i.begin_ns < clock]
    if not setters:
        return None
    reads = _reads(process, ioctls, setters)
    maps = [c for c in process.calls if c.call == FileCall.MMAP and c.begin_ns < start and c.file]
    if sum(t.bytes for t in reads) < (LEAST_BYTES if maps else LOADED_BYTES):
        return None
    return _described(process, reads, [(c.begin_ns, c.end_ns) for c in maps], ioctls, setters, start)


def again(process: Process, found: Switchover | None) -> Restore | None:
    """Whether and how the process loaded another guest from a file while its own was stopped, and ran that one.

    It begins with the reset. A machine that is only reset writes each vCPU's registers once. A snapshot switches dirty
    logging on.
    """
    if found is None or found.kind != SwitchoverKind.ABORTED or found.first_start is None:
        return None
    ioctls = [i for i in process.ioctls if found.stop <= i.begin_ns < found.first_start]
    setters = [i for i in ioctls if kvm.name_of(i.cmd) in kvm.VCPU_STATE_SET]
    written = sorted((i.begin_ns, i.fd) for i in setters if kvm.name_of(i.cmd) == "SET_REGS")
    many = len({fd for _, fd in written})
    if len(written) <= many or dirty_log.switched_on(process, None) is not None:
        return None
    first, last = min(i.begin_ns for i in setters), max(i.begin_ns for i in setters)
    size: Counter[int] = Counter()
    reads = [t for t in _of_files(process) if written[many - 1][0] < t.begin_ns < last]
    for one in reads:
        size[one.socket] += one.bytes
    key = max(size, key=lambda one: (size[one], -one), default=0)
    if size[key] < STREAM_FILE_BYTES:
        return None
    image = [t for t in reads if t.socket == key]
    return replace(_described(process, image, [], ioctls, setters, found.first_start), begin=first)


def _of_files(process: Process) -> list[Transfer]:
    """All that it read from files, in order."""
    found = [
        t
        for (direction, key), transfers in process.streams.items()
        if direction == RECEIVE and family_of(process, key) == FILE
        for t in transfers
        if t.bytes
    ]
    return sorted(found, key=lambda t: (t.begin_ns, t.end_ns, t.socket))


def _reads(process: Process, ioctls: list[Ioctl], setters: list[Ioctl]) -> list[Transfer]:
    """What it read from files to restore, in order; empty if it did not restore."""
    by_fd = Counter(i.fd for i in setters if kvm.name_of(i.cmd) == "SET_REGS")
    names = {kvm.name_of(i.cmd) for i in setters}
    last = max(i.begin_ns for i in setters)
    restorers = {i.tid for i in ioctls if loading.is_restore(i)}
    files = [t for t in _of_files(process) if t.begin_ns < last and t.tid in restorers]
    made = any(kvm.name_of(i.cmd) == "CREATE_VCPU" for i in ioctls)
    if made and max(by_fd.values(), default=0) <= 1:
        return files if names & _SAVED else []
    if not made:
        # A VM that is being made when tracing begins has read its firmware, and then writes registers, too. But nobody
        # asks it to: it serves no monitor yet.
        asked = [r.at for r in requests.of(process, 0, files[-1].begin_ns)] if files else []
        return [t for t in files if t.begin_ns > asked[0]] if asked else []
    known = sorted(i.begin_ns for i in setters if kvm.name_of(i.cmd) == "SET_REGS")
    many = len(by_fd) or 1
    if len(known) < (_RESETS + 1) * many:
        return []
    ready = known[_RESETS * many - 1]
    return [t for t in files if t.begin_ns > ready]


def _described(
    process: Process, reads: list[Transfer], maps: list[Span], ioctls: list[Ioctl], setters: list[Ioctl], start: int
) -> Restore:
    size: Counter[int] = Counter()
    for one in reads:
        size[one.socket] += one.bytes
    first = min([t.begin_ns for t in reads] + [begin for begin, _ in maps])
    asked = [r for r in requests.of(process, 0, start, size.keys()) if r.at <= first]
    begin = asked[-1].at if asked else first
    last = max(i.end_ns for i in setters)
    came = [r for r in requests.of(process, last, start, size.keys()) if r.at > last]
    clock = next((i.begin_ns for i in ioctls if i.begin_ns > last and loading.is_clock(i)), start)
    resume = max((r.at for r in came if r.at <= clock), default=start)
    restores = [i for i in ioctls if loading.is_restore(i) and begin <= i.begin_ns]
    loaded = max([last, *(i.end_ns for i in restores if resume < start and i.end_ns <= resume)])
    acts = [(t.begin_ns, t.end_ns) for t in reads] + [(i.begin_ns, i.end_ns) for i in ioctls if i.begin_ns >= begin]
    managed = _waits(acts, [*asked[-1:], *came], begin, resume) if resume < start else []
    memory = _memory(reads, size, [i.begin_ns for i in restores if i.begin_ns > first])
    return Restore(frozenset(size), memory + [m for m in maps if m[0] >= begin], begin, loaded, start, managed)


def _waits(acts: list[Span], came: list[Request], begin: int, resume: int) -> list[Span]:
    return requests.waits([(b, e) for b, e in acts if b < resume], came, begin, resume)


def _memory(reads: list[Transfer], size: Counter[int], restores: list[int]) -> list[Span]:
    """When memory was read: the largest file, or in a single one what comes before the first device's state."""
    if not reads:
        return []
    key = max(size, key=lambda one: (size[one], -one))
    mine = [t for t in reads if t.socket == key]
    if size[key] < (MEMORY_FILE_BYTES if len(size) > 1 else STREAM_FILE_BYTES):
        return []  # the memory is mapped, or comes later, on demand
    if len(size) == 1 and restores:
        mine = [t for t in mine if t.begin_ns < restores[0]] or mine[:1]
    return [(mine[0].begin_ns, mine[-1].end_ns)]


def assign(partition: Partition, found: Restore) -> None:
    """Assigns the time from the partition's cursor on to the phases of a restore."""
    since = partition.cursor
    partition.until(found.loaded, PhaseName.STATE_LOAD)
    if found.managed:
        partition.until(found.managed[-1][0], PhaseName.STATE_LOAD)
    partition.until(partition.end, PhaseName.RESUME)
    partition.give([(max(b, since), e) for b, e in found.memory], PhaseName.MEMORY_LOAD)
