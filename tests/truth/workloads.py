# SPDX-License-Identifier: Apache-2.0
"""Kernel work of a known kind and amount: `python -m tests.truth.workloads NAME ARGUMENT`, driven like the machine.

`sends N`: N 64-byte sends, as fast as possible. `sends-running N`: the same while a vCPU is in KVM_RUN. `mmu-lock MS`:
dirty-log fetches for MS ms while another thread makes the MMU notifier hold mmu_lock. `get-clean MS`: KVM_GET_DIRTY_LOG
of a large clean slot for MS ms, which is mostly copying. `clear-all N`: KVM_CLEAR_DIRTY_LOG of N GiB with all bits set,
which is mostly walking. The others are in `slow`.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.truth import kvm, slow
from tests.truth.kvm import Vm
from tests.truth.parts import Machine, Plan, say

MESSAGE = 64


def sends(count: int) -> Callable[[], dict[str, Any]]:
    """Sends to a process that only reads."""
    ours, theirs = socket.socketpair()
    drain = os.fork()
    if not drain:
        ours.close()
        while theirs.recv(1 << 16):
            pass
        os._exit(0)
    theirs.close()

    def go() -> dict[str, Any]:
        message, total = bytes(MESSAGE), 0
        begin = time.monotonic_ns()
        for _ in range(count):
            total += ours.send(message)
        took = time.monotonic_ns() - begin
        inode = os.fstat(ours.fileno()).st_ino
        ours.close()
        os.waitpid(drain, 0)
        return {"calls": count, "bytes": total, "ns": took, "socket": inode}

    return go


def sends_running(count: int) -> Callable[[], dict[str, Any]]:
    """Sends while a guest runs (halted in KVM_RUN), as in a pre-copy pass."""
    go = sends(count)
    machine = Machine(Plan())
    kvm.load_list(machine.vm, [])
    machine.vcpus[0].prepare(0)
    machine.threads[0].start()
    machine.threads[0].finished.wait()
    machine.threads[0].settle()
    return go


def mmu_lock(wanted_ms: int) -> Callable[[], dict[str, Any]]:
    """Legacy GETs take mmu_lock and slots_lock; freeing memory takes only mmu_lock."""
    vm = Vm()
    size = 16 * kvm.GIB
    vm.set_slot(0, 0, size)
    vm.set_slot(0, 0, size, log=True)
    bitmap, over = vm.bitmap_for(0), threading.Event()

    def give_back() -> None:
        kvm.pin(0)
        while not over.is_set():
            kvm.discard(vm.slots[0][2], size)

    def go() -> dict[str, Any]:
        kvm.pin(1)
        thread = threading.Thread(target=give_back)
        thread.start()
        until = time.monotonic() + wanted_ms / 1000
        calls = 0
        while time.monotonic() < until:
            vm.get_log(0, bitmap)
            calls += 1
        over.set()
        thread.join()
        return {"calls": calls}

    return go


def get_clean(wanted_ms: int) -> Callable[[], dict[str, Any]]:
    """With manual protection a GET only copies the bitmap to user space."""
    vm = Vm(irqchip=False, manual=kvm.MANUAL_PROTECT_ENABLE)
    vm.set_slot(0, 0, 128 * kvm.GIB)
    vm.set_slot(0, 0, 128 * kvm.GIB, log=True)
    bitmap = vm.bitmap_for(0)

    def go() -> dict[str, Any]:
        until, calls = time.monotonic() + wanted_ms / 1000, 0
        while time.monotonic() < until:
            vm.get_log(0, bitmap)
            calls += 1
        return {"calls": calls}

    return go


def clear_all(gib: int) -> Callable[[], dict[str, Any]]:
    """Re-arms a log that begins all dirty, one GiB at a time."""
    vm = Vm(irqchip=False, manual=kvm.MANUAL_PROTECT_ENABLE | kvm.INITIALLY_SET)
    vm.set_slot(0, 0, gib * kvm.GIB)
    vm.set_slot(0, 0, gib * kvm.GIB, log=True)
    pages = kvm.GIB // kvm.PAGE
    bitmap = (ctypes.c_char * (pages // 8)).from_buffer_copy(b"\xff" * (pages // 8))

    def go() -> dict[str, Any]:
        for first in range(0, gib * pages, pages):
            vm.clear_log(0, bitmap, pages, first)
        return {"calls": gib}

    return go


WORKLOADS = {
    "sends": sends,
    "sends-running": sends_running,
    "mmu-lock": mmu_lock,
    "get-clean": get_clean,
    "clear-all": clear_all,
    "outside": slow.outside,
    "slow-reader": slow.slow_reader,
    "spliced": slow.spliced,
}


def main(name: str, argument: str) -> None:
    """Runs one workload, from `ready` to `quit`."""
    go = WORKLOADS[name](int(argument))
    say("ready")
    sys.stdin.readline()
    say(json.dumps(go()))
    sys.stdin.readline()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
