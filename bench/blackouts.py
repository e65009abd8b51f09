# SPDX-License-Identifier: Apache-2.0
"""Two processes that make blackouts with a fixed amount of work: `python -m bench.blackouts`.

In: lines with a number on stdin. Out: `ready PID PID` on stdout, then for each line one line: the ns of that many
blackouts, from before the source's kick until before the destination's KVM_RUN.

A blackout has 50 round trips between the source and the destination: 3 ioctls, a send and a receive on the one side,
a receive, an ioctl and a send on the other, 400 calls and 100 context switches in all. QEMU makes about as many in a
blackout of 2 ms, but a number that varies. Both processes are pinned to one CPU, so each round trip is two switches,
and an observer's reader can use another CPU.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import struct
import sys
import time

from ebpf_mig.linux import kvm as numbers
from tests.truth import kvm
from tests.truth.kvm import Vcpu, Vm
from tests.truth.parts import KICK, VcpuThread

TRIPS = 50
CALLS = 8 * TRIPS
SLOT_BYTES = 1 << 20
MESSAGE = bytes(64)
RUN = b"R" * 8
PAUSE_S = 0.002


class Side:
    """A VM with one halted vCPU, and the connection to the other side."""

    def __init__(self, connection: socket.socket) -> None:
        kvm.pin(-1)
        self.connection = connection
        self.vm = Vm()
        self.vm.set_slot(0, 0, SLOT_BYTES, log=True)
        kvm.write(self.vm, kvm.CODE, kvm.CPU.halt)
        vcpu = Vcpu(self.vm, 0)
        vcpu.prepare(0)
        self.thread = VcpuThread(vcpu)
        self.log = kvm.log_of(0, self.vm.bitmap_for(0))
        self.clock = ctypes.create_string_buffer(48)

    def receive(self) -> bytes:
        """One message of the other side; ends the process if there is none."""
        message = self.connection.recv(len(MESSAGE))
        if not message:
            os._exit(0)
        return message

    def read_clock(self) -> None:
        kvm.ioctl(self.vm.fd, numbers.GET_CLOCK, self.clock, hold=True)

    def run(self) -> int:
        """Starts the vCPU; the instant right before its KVM_RUN."""
        self.thread.entered_ns = 0
        self.thread.start()
        return self.thread.entered()[0]


def serve(side: Side) -> None:
    """The destination: answers until it is told to run, runs, and stops again."""
    while True:
        message = side.receive()
        if message == RUN:
            at = side.run()
            side.thread.stop()
            side.connection.send(struct.pack("=Q", at))
        else:
            side.read_clock()
            side.connection.send(MESSAGE)


def blackout(side: Side) -> int:
    """The source's part of one blackout, in ns; the guest runs again when it returns."""
    begin = time.monotonic_ns()
    side.thread.stop()
    for _ in range(TRIPS):
        kvm.ioctl(side.vm.fd, numbers.GET_DIRTY_LOG, side.log, hold=True)
        side.read_clock()
        side.read_clock()
        side.connection.send(MESSAGE)
        side.receive()
    side.connection.send(RUN)
    (end,) = struct.unpack("=Q", side.receive())
    side.run()
    return int(end) - begin


def main() -> None:
    """See the module."""
    signal.signal(KICK, lambda *_: None)
    gc.disable()
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        ours.close()
        serve(Side(theirs))
    theirs.close()
    side = Side(ours)
    side.run()
    print("ready", os.getpid(), child, flush=True)
    for line in sys.stdin:
        took = []
        for _ in range(int(line)):
            time.sleep(PAUSE_S)
            took.append(blackout(side))
        print(*took, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
