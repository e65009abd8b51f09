# SPDX-License-Identifier: Apache-2.0
"""Workloads that slow down a guest or a connection by a known amount: see `workloads`.

`outside N`: between dirty-log fetches, a vCPU is kept out of KVM_RUN N times for 3 ms each. `slow-reader MS`: TCP to a
peer that reads a little every millisecond, so that its receive window is the limit. `spliced N`: N 4 KiB pages moved
into a socket by splice(2), which is not among the traced calls.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.truth import kvm
from tests.truth.parts import KICK, Machine, Plan

OUT_S = 0.003


def outside(times: int) -> Callable[[], dict[str, Any]]:
    """Reads the clock after each return from KVM_RUN and before the next entry. The difference is at most the true
    stay.
    """
    signal.signal(KICK, lambda *_: None)
    machine = Machine(Plan())
    kvm.load_list(machine.vm, [])
    for slot, (base, size) in machine.layout.items():
        machine.vm.set_slot(slot, base, size, log=True)
    bitmap = machine.vm.bitmap_for(0)
    machine.vcpus[0].prepare(0)
    vcpu = machine.threads[0]
    vcpu.start()
    vcpu.finished.wait()
    vcpu.settle()

    def go() -> dict[str, Any]:
        stays: list[int] = []
        for _ in range(times):
            machine.vm.get_log(0, bitmap)
            vcpu.stop()
            left = vcpu.stopped_ns
            time.sleep(OUT_S)
            vcpu.start()
            vcpu.settle()
            stays.append(vcpu.entered_ns - left)
        vcpu.stop()  # the last stay is reported at the next exit after a fetch
        vcpu.start()
        vcpu.settle()
        machine.vm.get_log(0, bitmap)
        time.sleep(0.002)
        vcpu.stop()
        return {"stays": stays}

    return go


def slow_reader(wanted_ms: int) -> Callable[[], dict[str, Any]]:
    """A sender that always has more to send, and a reader in another process that reads 16 KiB every millisecond."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    reader = os.fork()
    if not reader:
        taken, _ = listener.accept()
        while taken.recv(16384):
            time.sleep(0.001)
        os._exit(0)

    def go() -> dict[str, Any]:
        ours = socket.create_connection(listener.getsockname())
        inode = os.fstat(ours.fileno()).st_ino
        until, begin, sent = time.monotonic() + wanted_ms / 1000, time.monotonic_ns(), 0
        machine = Machine(Plan())  # tcp_info is read at its fetches
        machine.vm.set_slot(0, *machine.layout[0], log=True)
        bitmap = machine.vm.bitmap_for(0)
        while time.monotonic() < until:
            sent += ours.send(bytes(65536))
            machine.vm.get_log(0, bitmap)
        took = time.monotonic_ns() - begin
        machine.vm.get_log(0, bitmap)
        time.sleep(0.3)
        machine.vm.get_log(0, bitmap)
        time.sleep(0.1)
        ours.close()
        os.kill(reader, 9)
        os.waitpid(reader, 0)
        return {"bytes": sent, "ns": took, "socket": inode}

    return go


def spliced(pages: int) -> Callable[[], dict[str, Any]]:
    """Moves pages from a pipe into a socket; a thread drains the other end."""
    ours, theirs = socket.socketpair()
    out, into = os.pipe()

    def drain() -> None:
        while theirs.recv(1 << 16):
            pass

    def go() -> dict[str, Any]:
        thread = threading.Thread(target=drain)
        thread.start()
        moved = 0
        for _ in range(pages):
            os.write(into, bytes(kvm.PAGE))
            moved += os.splice(out, ours.fileno(), kvm.PAGE)
        inode = os.fstat(ours.fileno()).st_ino
        ours.close()
        thread.join()
        return {"bytes": moved, "socket": inode}

    return go
