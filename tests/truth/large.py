# SPDX-License-Identifier: Apache-2.0
"""Cost of dirty-log ioctls on a guest with 64 GiB of untouched memory, without tracing.

In: nothing. Out: rows of (ioctl, ms, ms/GiB, reference figure of a kernel that emulates the guest's MMU).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from tests.truth import kvm
from tests.truth.kvm import GIB, PAGE, Vm

SIZE = 64 * GIB
Row = tuple[str, float, float, str]


def _timed(act: Callable[[], object], tries: int = 1) -> float:
    """The best of several tries, in ms."""
    best = float("inf")
    for _ in range(tries):
        begin = time.perf_counter_ns()
        act()
        best = min(best, (time.perf_counter_ns() - begin) / 1e6)
    return best


def _logged(manual: int) -> tuple[Vm, float, float]:
    """A VM with one logged slot, and the ms it took to create the slot and to switch the log on."""
    vm = Vm(irqchip=False, manual=manual)
    made = _timed(lambda: vm.set_slot(0, 0, SIZE))
    return vm, made, _timed(lambda: vm.set_slot(0, 0, SIZE, log=True))


def measure() -> list[Row]:
    """Measures all kinds of dirty log. Needs some hundred MiB of kernel memory for about a second."""
    rows: list[Row] = []

    def row(what: str, ms: float, reference: str) -> None:
        rows.append((what, ms, ms / (SIZE / GIB), reference))

    vm, made, on = _logged(0)
    bitmap, fresh = vm.bitmap_for(0), ctypes.create_string_buffer(SIZE // PAGE // 8)
    row("create the slot", made, "30-80 ms")
    row("switch logging on, legacy", on, "12 ms")
    row("GET legacy, clean, fresh bitmap", _timed(lambda: vm.get_log(0, fresh)), "1.2 ms")
    row("GET legacy, clean", _timed(lambda: vm.get_log(0, bitmap), 5), "1.2 ms")
    vm.close()
    vm, _, on = _logged(kvm.MANUAL_PROTECT_ENABLE)
    row("GET manual, clean", _timed(lambda: vm.get_log(0, bitmap), 5), "0.7-0.8 ms")
    vm.close()
    vm, _, on = _logged(kvm.MANUAL_PROTECT_ENABLE | kvm.INITIALLY_SET)
    row("switch logging on, initially set", on, "2-4 ms")
    row("GET manual, all dirty", _timed(lambda: vm.get_log(0, bitmap), 5), "0.7-0.8 ms")
    ones, zeros = vm.bitmap_for(0, 0xFF), vm.bitmap_for(0)
    row("CLEAR, empty mask", _timed(lambda: vm.clear_log(0, zeros, SIZE // PAGE)), "0.26 ms")
    row("CLEAR all-ones, all dirty", _timed(lambda: vm.clear_log(0, ones, SIZE // PAGE)), "218-267 ms")
    row("CLEAR all-ones, already clean", _timed(lambda: vm.clear_log(0, ones, SIZE // PAGE)), "0.96 ms")
    vm.close()
    return rows
