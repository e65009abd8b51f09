# SPDX-License-Identifier: Apache-2.0
"""A process that makes a VMM's system calls on request: `python -m bench.calls`.

In: lines `KIND COUNT` on stdin. Out: `ready` on stdout, then one line per request: the ns that the calls took, loop
included. Kinds: `dirty-log` (KVM_GET_DIRTY_LOG of a slot of 1 MiB), `run` (KVM_RUN to the guest's next port write),
`send` (64 bytes, by UDP), `getppid`. A second vCPU stays halted in KVM_RUN meanwhile, as in a pre-copy pass.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat

from ebpf_mig.linux import kvm as numbers
from tests.truth import kvm
from tests.truth.kvm import PAGE, Vcpu, Vm

HALT_AT = kvm.CODE + 0x100
SLOT_BYTES = 1 << 20
MESSAGE = 64


def unread_sockets() -> list[socket.socket]:
    """A UDP socket and its peer. Nobody reads the peer, so a full buffer drops datagrams and no thread wakes up."""
    ours, theirs = socket.socket(type=socket.SOCK_DGRAM), socket.socket(type=socket.SOCK_DGRAM)
    theirs.bind(("127.0.0.1", 0))
    ours.connect(theirs.getsockname())
    return [ours, theirs]


def kinds() -> dict[str, Callable[[], object]]:
    """The calls, prepared. They keep the interpreter's lock, which halves the overhead of the loop."""
    libc = ctypes.PyDLL(None)
    libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
    libc.send.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    sink, unread = unread_sockets()
    vm = Vm()
    vm.set_slot(0, 0, SLOT_BYTES, log=True)
    kvm.write(vm, kvm.CODE, kvm.CPU.leave)
    kvm.write(vm, HALT_AT, kvm.CPU.halt)
    busy, halted = Vcpu(vm, 0), Vcpu(vm, 1)
    busy.prepare(0)
    halted.prepare(0, at=HALT_AT)

    def sit() -> None:
        while True:
            halted.run()

    threading.Thread(target=sit, daemon=True).start()
    bitmap = ctypes.create_string_buffer(SLOT_BYTES // PAGE // 8)
    log, message = kvm.log_of(0, bitmap), ctypes.create_string_buffer(MESSAGE)
    keep.extend([vm, busy, halted, bitmap, log, message, sink, unread])
    return {
        "dirty-log": partial(libc.ioctl, vm.fd, numbers.GET_DIRTY_LOG, ctypes.addressof(log)),
        "run": partial(libc.ioctl, busy.fd, numbers.RUN, 0),
        "send": partial(libc.send, sink.fileno(), ctypes.addressof(message), MESSAGE, 0),
        "getppid": libc.getppid,
    }


keep: list[object] = []
"""Buffers that the calls point to."""


def main() -> None:
    """See the module."""

    calls = kinds()
    print("ready", flush=True)
    for line in sys.stdin:
        kind, count = line.split()
        call = calls[kind]
        begin = time.perf_counter_ns()
        for _ in repeat(None, int(count)):
            call()
        print(time.perf_counter_ns() - begin, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
