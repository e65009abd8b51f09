# SPDX-License-Identifier: Apache-2.0
"""Calls that make every probe fire once: ioctls on a test VM that never runs, messages between sockets, and signal 0.

In: nothing. Out: nothing. Calls that the kernel or the machine does not support are skipped, and their probes do not
fire. No guest code runs, so this works on every architecture.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from ebpf_mig.linux import kvm
from ebpf_mig.linux.capabilities import has_seccomp_filter

PAGES = 64
VSOCK_MODULE = Path("/sys/module/vsock")
"""Exists if the kernel has vsock now. It loads the module when a process makes such a socket."""
_PAGE = os.sysconf("SC_PAGESIZE")
_CHECK_EXTENSION, _VCPU_MMAP_SIZE, _CREATE_DEVICE, _GET_MP_STATE = 0xAE03, 0xAE04, 0xC00CAEE0, 0x8004AE98
_SET_MP_STATE = 0x4004AE99
_MANUAL_PROTECT, _DIRTY_RING, _DIRTY_RING_ACQ_REL = 168, 192, 223
_ARM_PREFERRED_TARGET, _ARM_VCPU_INIT, _ARM_VCPU_INIT_BYTES = 0x8020AEAF, 0x4020AEAE, 32
"""struct kvm_vcpu_init, include/uapi/asm/kvm.h of arm64."""
_MANUAL_AND_ALL_DIRTY = 3
_RING_ENTRIES = 1024
_VFIO_DEVICE = 4
_SET_ATTRIBUTE, _HAS_ATTRIBUTE = 0x4018AEE1, 0x4018AEE3
_LOG = 1
_TGKILL = {"x86_64": 234, "aarch64": 131}
_IO_SUBMIT = {"x86_64": 209, "aarch64": 2}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


def fire_all() -> None:
    """Makes all calls; takes a few milliseconds."""
    os.getppid()
    kick()
    sockets()
    vm(ring=False)
    vm(ring=True)


def kick() -> None:
    """tgkill(2) of this thread with signal 0, which only checks that it exists."""
    number = _TGKILL.get(os.uname().machine)
    if number is not None:
        _libc.syscall(number, os.getpid(), threading.get_native_id(), 0)


def sockets() -> None:
    """One message each over IPv4, IPv6, a pipe, and a UNIX stream socket, which is then shut down; files; and vsock
    without a connection.
    """
    left, right = socket.socketpair()
    _talk(left, right)
    read_end, write_end = os.pipe()
    with _held(read_end), _held(write_end):
        os.write(write_end, b"?")
        os.read(read_end, 1)
    _file()
    _vsock()
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as near:
            near.bind((address, 0))
            near.connect(near.getsockname())
            near.settimeout(1)
            near.send(b"?")
            near.recv(1)


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _file() -> None:
    """Writes and reads a file without a name in all ways, and maps it. Python itself makes pwritev2 of pwritev."""
    room = ctypes.create_string_buffer(_PAGE)
    vector = ctypes.byref(_Vector(ctypes.addressof(room), _PAGE))
    with contextlib.suppress(OSError), _held(os.memfd_create("ebpf-mig")) as fd:
        for call in (_libc.pwritev, _libc.preadv):
            call(fd, vector, 1, ctypes.c_long(0))
        os.writev(fd, [room])
        os.readv(fd, [room])
        os.pwritev(fd, [room], 0)
        os.preadv(fd, [room], 0)
        os.write(fd, room)
        os.read(fd, _PAGE)
        os.pwrite(fd, room, 0)
        os.pread(fd, _PAGE, 0)
        os.fsync(fd)
        os.fdatasync(fd)
        _libc.sync_file_range(fd, ctypes.c_long(0), ctypes.c_long(0), 0)
        with mmap.mmap(fd, _PAGE) as mapped:
            mapped.flush()  # msync
            if not has_seccomp_filter():  # it may end this process: systemd's @system-service allows no mincore
                place = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
                _libc.mincore(ctypes.c_void_p(place), ctypes.c_size_t(_PAGE), ctypes.create_string_buffer(1))
                _libc.syscall(_IO_SUBMIT.get(os.uname().machine, -1), 0, 0, None)


def _vsock() -> None:
    """Sends and receives reach their functions, and are refused there, since nothing is connected.

    The socket is made only if the kernel has vsock already: it would load the module for us, and keep it.
    """
    if not VSOCK_MODULE.exists():
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as alone:
        with contextlib.suppress(OSError):
            alone.send(b"?")
        alone.recv(1)


def _talk(left: socket.socket, right: socket.socket) -> None:
    with left, right:
        left.send(b"?")
        right.recv(1)
        left.shutdown(socket.SHUT_RDWR)


def _ioctl(fd: int, cmd: int, argument: bytes | int = 0) -> int:
    """ioctl(2) with a number or a copied structure. OSError if the kernel refuses."""
    buffer = ctypes.create_string_buffer(argument, len(argument)) if isinstance(argument, bytes) else None
    given = argument if buffer is None else ctypes.addressof(buffer)
    result = int(_libc.ioctl(fd, cmd, given))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    if buffer is not None and cmd == _CREATE_DEVICE:
        return int(struct.unpack_from("=I", buffer, 4)[0])
    return result


@contextlib.contextmanager
def _held(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def vm(*, ring: bool) -> None:
    """The ioctls of a migration on a VM with one vCPU and 64 pages: with a dirty ring, or with a bitmap."""
    with contextlib.suppress(OSError), _held(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)) as system:
        _ioctl(system, _CHECK_EXTENSION, 0)
        with _held(_ioctl(system, kvm.CREATE_VM, 0)) as machine:
            if ring:
                _enable_ring(machine)
            else:
                with contextlib.suppress(OSError):
                    _enable(machine, _MANUAL_PROTECT, _MANUAL_AND_ALL_DIRTY)
            with _held(_ioctl(machine, kvm.CREATE_VCPU, 0)) as vcpu:
                with contextlib.suppress(OSError):
                    _initialise(machine, vcpu)
                    _run_nothing(system, vcpu)
                if ring:
                    _ioctl(machine, kvm.RESET_DIRTY_RINGS)
                    return
                _dirty_log(machine)
                _device(machine)


def _enable(machine: int, capability: int, argument: int) -> None:
    _ioctl(machine, kvm.ENABLE_CAP, struct.pack("=II4Q64x", capability, 0, argument, 0, 0, 0))


def _enable_ring(machine: int) -> None:
    """arm64 has only the second kind of dirty ring (Linux 6.2)."""
    try:
        _enable(machine, _DIRTY_RING, _RING_ENTRIES * 16)
    except OSError:
        _enable(machine, _DIRTY_RING_ACQ_REL, _RING_ENTRIES * 16)


def _initialise(machine: int, vcpu: int) -> None:
    """On arm64, KVM_RUN refuses an uninitialized vCPU and never reaches kvm:kvm_userspace_exit."""
    if os.uname().machine == "aarch64":
        target = ctypes.create_string_buffer(_ARM_VCPU_INIT_BYTES)
        _libc.ioctl(machine, _ARM_PREFERRED_TARGET, ctypes.addressof(target))
        _libc.ioctl(vcpu, _ARM_VCPU_INIT, ctypes.addressof(target))


def _run_nothing(system: int, vcpu: int) -> None:
    """Reads and writes a vCPU's state, then calls KVM_RUN with `immediate_exit` (offset 1 of struct kvm_run): -EINTR at
    once.
    """
    with mmap.mmap(vcpu, _ioctl(system, _VCPU_MMAP_SIZE)) as shared:
        shared[1] = 1
        with contextlib.suppress(OSError):
            _ioctl(vcpu, kvm.RUN)
    state = ctypes.create_string_buffer(4)
    _libc.ioctl(vcpu, _GET_MP_STATE, ctypes.addressof(state))
    _libc.ioctl(vcpu, _SET_MP_STATE, ctypes.addressof(state))


def _dirty_log(machine: int) -> None:
    """Logs, reads and clears a memslot. All pages are dirty initially, so clearing has to flush."""
    with mmap.mmap(-1, PAGES * _PAGE) as memory:
        place = ctypes.c_char.from_buffer(memory)
        bitmap = ctypes.create_string_buffer(PAGES // 8)
        address, bits = ctypes.addressof(place), ctypes.addressof(bitmap)
        try:
            region = [0, _LOG, 0, PAGES * _PAGE, address]
            _ioctl(machine, kvm.SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", *region))
            _ioctl(machine, kvm.GET_DIRTY_LOG, struct.pack("=IIQ", 0, 0, bits))
            with contextlib.suppress(OSError):
                _ioctl(machine, kvm.CLEAR_DIRTY_LOG, struct.pack("=IIQQ", 0, PAGES, 0, bits))
            region[3] = 0
            _ioctl(machine, kvm.SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", *region))
        finally:
            del place


def _device(machine: int) -> None:
    """An ioctl of a KVM device. VFIO is the only device that all architectures can have."""
    with (
        contextlib.suppress(OSError),
        _held(_ioctl(machine, _CREATE_DEVICE, struct.pack("=III", _VFIO_DEVICE, 0, 0))) as fd,
    ):
        _ioctl(fd, _HAS_ATTRIBUTE, struct.pack("=IIQQ", 0, 0, 0, 0))
