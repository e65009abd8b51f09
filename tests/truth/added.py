# SPDX-License-Identifier: Apache-2.0
"""Memslots that the destination of the truth machine adds while it loads the state.

In: the VM. Out: how long KVM took for it, in ns, by our own clock.
"""

from __future__ import annotations

import os
import threading
import time

from tests.truth import cpu_x86, kvm
from tests.truth.kvm import PAGE, Vcpu, Vm

HEAD_START_S = 0.0005
_READ_SLOT, _SLOT, _READ_BASE, _BASE = 22, 23, 48 * kvm.GIB, 512 * kvm.GIB


def alone(vm: Vm, size: int) -> int:
    """A memslot of `size` bytes. With shadow paging, KVM allocates 8 bytes for each of its pages (memslot_rmap_alloc,
    Linux 6.18), which takes long for a large one.
    """
    begin = time.monotonic_ns()
    vm.set_slot(_SLOT, _BASE, size)
    return time.monotonic_ns() - begin


def beside_reader(vm: Vm, vcpu: Vcpu, ns: int) -> int:
    """A memslot of a page, while another thread sleeps in a page fault, inside KVM's SRCU, for `ns`.

    Only x86-64's KVM has a call that does so (kvm_write_wall_clock).
    """
    page = vm.set_slot(_READ_SLOT, _READ_BASE, PAGE)
    missing = kvm.hold_back((page, PAGE))
    thread = threading.Thread(target=cpu_x86.write_wall_clock, args=(vcpu.fd, _READ_BASE))
    thread.start()
    time.sleep(2 * HEAD_START_S)
    timer = threading.Timer(ns / 1e9, os.close, (missing,))
    timer.start()
    took = alone(vm, PAGE)
    timer.join()
    thread.join()
    return took
