# SPDX-License-Identifier: Apache-2.0
"""A thin wrapper of /dev/kvm for the truth machine: VMs, memslots, dirty logs, vCPUs.

In: method calls. Out: the results of ioctls; OSError if the kernel refused. What differs between CPUs is in `CPU`.
Numbers: include/uapi/linux/kvm.h, Linux 6.12.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
from collections.abc import Iterable
from pathlib import Path

from ebpf_mig.linux import kvm as numbers
from tests.truth import cpu_arm64, cpu_x86
from tests.truth.cpu import CODE, LIST, ioctl

PAGE = 4096
GIB = 1 << 30

GET_VCPU_MMAP_SIZE = 0xAE04
CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
MANUAL_PROTECT_ENABLE, INITIALLY_SET = 1, 2

_NORESERVE = 0x4000
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
"""include/uapi/linux/userfaultfd.h."""
_RING_PAGE_OFFSET = 64
_RING_DIRTY, _RING_RESET = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

_ALLOWED = os.sched_getaffinity(0)
CPU = cpu_arm64.CPU if platform.machine() == "aarch64" else cpu_x86.CPU
"""The kind that this machine has."""


def run_delay_ns(tid: int | None = None) -> int:
    """How long a thread of ours, by default the calling one, has waited for a CPU so far, in ns; 0 if the kernel
    does not count.
    """
    try:
        return int(
            Path(f"/proc/self/task/{tid}/schedstat" if tid else "/proc/thread-self/schedstat").read_text().split()[1]
        )
    except OSError:
        return 0


def pin(place: int) -> None:
    """Pins the calling thread to the nth of our CPUs, so that two threads do not share one."""
    allowed = sorted(_ALLOWED)
    os.sched_setaffinity(0, {allowed[place % len(allowed)]})


def reserve(size: int) -> int:
    """The address of new anonymous memory, which has no pages until it is touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    return int(address)


def shared(descriptor: int, offset: int, size: int) -> int:
    """The address of memory of a memfd, which outlives the program."""
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED
    address = _libc.mmap(None, size, protection, flags, descriptor, offset)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    return int(address)


def discard(address: int, size: int) -> None:
    """Frees pages by madvise(2), which runs KVM's MMU notifier over the range (mmu_lock)."""
    _libc.madvise(address, size, mmap.MADV_DONTNEED)


def hold_back(*ranges: tuple[int, int]) -> int:
    """Who touches this memory (addresses and sizes) for the first time sleeps until the page is served, or the returned
    descriptor closed (userfaultfd(2)).
    """
    descriptor = int(_libc.syscall(CPU.userfaultfd, os.O_CLOEXEC))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    fcntl.ioctl(descriptor, _UFFDIO_API, struct.pack("QQQ", 0xAA, 0, 0))
    for address, size in ranges:
        fcntl.ioctl(descriptor, _UFFDIO_REGISTER, struct.pack("QQQQ", address, size, 1, 0))
    return descriptor


class Vm:
    """A VM; `ring` is the size of each vCPU's dirty ring in entries, `manual` the flags of manual protection. `memory`:
    the memfd that its memory is in, at the guest's addresses; -1: anonymous memory."""

    def __init__(self, *, irqchip: bool = True, manual: int = 0, ring: int = 0, memory: int = -1) -> None:
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.fd = ioctl(self.kvm, numbers.CREATE_VM)
        self.ring, self.memory = ring, memory
        self.slots: dict[int, tuple[int, int, int]] = {}
        if manual:
            self._enable(CAP_MANUAL_DIRTY_LOG_PROTECT2, manual)
        if ring:
            self._enable(CPU.dirty_ring, ring * 16)
        if irqchip and CPU.create_chip is not None:
            ioctl(self.fd, CPU.create_chip)

    def _enable(self, capability: int, argument: int) -> None:
        ioctl(
            self.fd,
            numbers.ENABLE_CAP,
            ctypes.create_string_buffer(struct.pack("<II4Q64x", capability, 0, argument, 0, 0, 0)),
        )

    def set_slot(self, slot: int, base: int, size: int, *, log: bool = False) -> int:
        """Sets a memslot and keeps its memory if it has some. Returns the memory's address."""
        if slot in self.slots:
            address = self.slots[slot][2]
        else:
            address = reserve(size) if self.memory < 0 else shared(self.memory, base, size)
        region = struct.pack("<IIQQQ", slot, int(log), base, size, address)
        ioctl(self.fd, numbers.SET_USER_MEMORY_REGION, ctypes.create_string_buffer(region, 32))
        self.slots[slot] = (base, size, address)
        return address

    def get_log(self, slot: int, bitmap: ctypes.Array[ctypes.c_char]) -> None:
        """KVM_GET_DIRTY_LOG into a bitmap from `bitmap_for`."""
        ioctl(self.fd, numbers.GET_DIRTY_LOG, log_of(slot, bitmap))

    def clear_log(self, slot: int, bitmap: ctypes.Array[ctypes.c_char], pages: int, first: int = 0) -> None:
        """KVM_CLEAR_DIRTY_LOG of the bitmap's first `pages` bits, which are for the pages from `first` on."""
        ioctl(self.fd, numbers.CLEAR_DIRTY_LOG, clear_of(slot, bitmap, pages, first))

    def read_clock(self) -> None:
        """Reads the VM's clock, if it has one."""
        if CPU.clock is not None:
            CPU.clock.read(self.fd)

    def set_clock(self) -> None:
        """Sets the VM's clock to 0, if it has one."""
        if CPU.clock is not None:
            CPU.clock.write(self.fd, bytes(CPU.clock.size))

    def bitmap_for(self, slot: int, fill: int = 0) -> ctypes.Array[ctypes.c_char]:
        """A bitmap as long as the slot's dirty log, in whole 64-bit words. Its memory is touched."""
        bitmap = ctypes.create_string_buffer((self.slots[slot][1] // PAGE + 63) // 64 * 8)
        ctypes.memset(bitmap, fill, len(bitmap))
        return bitmap

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.kvm)


def clear_of(slot: int, bitmap: ctypes.Array[ctypes.c_char], pages: int, first: int = 0) -> ctypes.Array[ctypes.c_char]:
    """struct kvm_clear_dirty_log."""
    return ctypes.create_string_buffer(struct.pack("<IIQQ", slot, pages, first, ctypes.addressof(bitmap)), 24)


def log_of(slot: int, bitmap: ctypes.Array[ctypes.c_char]) -> ctypes.Array[ctypes.c_char]:
    """struct kvm_dirty_log."""
    return ctypes.create_string_buffer(struct.pack("<IIQ", slot, 0, ctypes.addressof(bitmap)), 16)


def pages_of(bitmap: ctypes.Array[ctypes.c_char]) -> set[int]:
    """The numbers of the set bits."""
    raw = bitmap.raw
    return {8 * at + bit for at, byte in enumerate(raw) if byte for bit in range(8) if byte >> bit & 1}


class Vcpu:
    """One vCPU."""

    def __init__(self, vm: Vm, index: int) -> None:
        self.vm, self.index = vm, index
        self.fd = ioctl(vm.fd, numbers.CREATE_VCPU, index)
        CPU.create(vm.fd, self.fd)
        self._run = mmap.mmap(self.fd, ioctl(vm.kvm, GET_VCPU_MMAP_SIZE))
        self._ring_at = 0
        self._ring = mmap.mmap(self.fd, vm.ring * 16, offset=_RING_PAGE_OFFSET * PAGE) if vm.ring else None

    def run(self) -> int:
        """KVM_RUN. Returns the exit reason, or -EINTR if a signal ended it; raises other errors."""
        if _libc.ioctl(self.fd, numbers.RUN, None) == 0:
            return int(struct.unpack_from("<I", self._run, 8)[0])
        if ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), "RUN")
        return -errno.EINTR

    def hurry(self, immediate: bool) -> None:
        """kvm_run.immediate_exit: the next KVM_RUN returns -EINTR at once."""
        self._run[1] = int(immediate)

    def prepare(self, count: int, *, at: int = CODE) -> None:
        """Sets the registers, ready to run `count` entries of the address list by the code at `at`."""
        CPU.prepare(self.fd, count, at)

    def harvest(self) -> list[tuple[int, int]]:
        """Takes (slot, page) pairs from the dirty ring and marks them for KVM_RESET_DIRTY_RINGS."""
        found: list[tuple[int, int]] = []
        assert self._ring is not None
        while True:
            entry = self._ring_at % self.vm.ring * 16
            flags, slot, offset = struct.unpack_from("<IIQ", self._ring, entry)
            if not flags & _RING_DIRTY:
                return found
            found.append((slot, offset))
            struct.pack_into("<I", self._ring, entry, _RING_RESET)
            self._ring_at += 1


def write(vm: Vm, address: int, content: bytes) -> None:
    """Writes guest memory from the host, which KVM's dirty log does not show."""
    for base, size, memory in vm.slots.values():
        if base <= address and address + len(content) <= base + size:
            ctypes.memmove(memory + address - base, content, len(content))
            return
    raise ValueError(f"no slot holds {address:#x}")


def load_list(vm: Vm, addresses: Iterable[int]) -> int:
    """Puts the code and the addresses to write to into guest memory. Returns the number of addresses."""
    listed = list(addresses)
    write(vm, CODE, CPU.write_list)
    write(vm, LIST, struct.pack(f"<{len(listed)}I", *listed))
    return len(listed)
