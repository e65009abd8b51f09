# SPDX-License-Identifier: Apache-2.0
"""What the truth machine needs to know about a kind of CPU, and the one call that everything uses: ioctl(2).

In: file descriptors of /dev/kvm. Out: results; OSError if the kernel refused. Calls go through ctypes, which releases
the interpreter's lock, so a vCPU thread in KVM_RUN does not block the others. The kinds: `cpu_x86`, `cpu_arm64`.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ebpf_mig.linux import kvm as numbers

CODE, LIST = 0x1000, 0x100000
"""Guest addresses of the code, whose page the guest never writes, and of the list of addresses."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_held = ctypes.PyDLL(None, use_errno=True)
"""Keeps the interpreter's lock, so no other thread of ours runs between call and return."""
_held.ioctl.argtypes = _libc.ioctl.argtypes

Argument = int | ctypes.Array[ctypes.c_char] | None


def ioctl(fd: int, cmd: int, argument: Argument = 0, *, hold: bool = False) -> int:
    """ioctl(2); OSError with the kernel's errno. `hold`: keep the interpreter's lock, so that it returns at once."""
    pointer = ctypes.addressof(argument) if isinstance(argument, ctypes.Array) else argument
    result = int((_held if hold else _libc).ioctl(fd, cmd, pointer))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{numbers.name_of(cmd)}: {os.strerror(code)}")
    return result


@dataclass(frozen=True)
class Part:
    """A part of the state of a vCPU or a VM: the ioctls that read and write its `size` bytes. `register`: its number
    for KVM_GET_ONE_REG.
    """

    get: int
    set: int
    size: int
    register: int | None = None

    def read(self, fd: int) -> bytes:
        state = ctypes.create_string_buffer(self.size)
        ioctl(fd, self.get, self._argument(state))
        return state.raw

    def write(self, fd: int, state: bytes) -> None:
        ioctl(fd, self.set, self._argument(ctypes.create_string_buffer(state, self.size)))

    def _argument(self, state: ctypes.Array[ctypes.c_char]) -> Argument:
        if self.register is None:
            return state
        # struct kvm_one_reg. The caller keeps `state` until the call is over.
        return ctypes.create_string_buffer(struct.pack("<QQ", self.register, ctypes.addressof(state)), 16)


@dataclass(frozen=True)
class Cpu:
    """A kind of CPU."""

    state: tuple[Part, ...]
    """What a VMM reads of a vCPU, in its order."""
    chip: Part | None
    """The VM's interrupt controller, if the machine has one in the kernel."""
    clock: Part | None
    """The VM's clock, if KVM has one for the whole VM."""
    create_chip: int | None
    """The ioctl that makes the interrupt controller."""
    dirty_ring: int
    """The capability of the dirty ring."""
    userfaultfd: int
    """The number of that system call."""
    write_list: bytes
    """Code: writes to each address of the list, then leaves KVM_RUN once with `written`, then halts."""
    halt: bytes
    """Code: halts for good."""
    spin: bytes
    """Code: jumps to itself."""
    leave: bytes
    """Code: leaves KVM_RUN again and again with `written`."""
    written: int
    """The exit reason (include/uapi/linux/kvm.h)."""
    create: Callable[[int, int], None]
    """Makes a new vCPU ready for its registers, by the descriptors of the VM and of the vCPU."""
    prepare: Callable[[int, int, int], None]
    """Sets the registers of the vCPU with this descriptor: that many entries of the list, and where its code is."""
