# SPDX-License-Identifier: Apache-2.0
"""A VM that the watch knows, and its budget for signs that lead to nothing.

In: a VM. Out: whether its next sign may be followed, and whether it is being loaded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ebpf_mig.exporter import discovery
from ebpf_mig.exporter.discovery import Vm
from ebpf_mig.linux import procfs

BURST, REFILL_S = 4, 30.0
"""Budget of a VM for signs that lead to nothing: `BURST` at once, then one every `REFILL_S`."""
GROWTH_BYTES = 16 << 20
"""A VM that has not run and grows by this much within a second is being loaded."""


@dataclass
class Known:
    """A VM and its state."""

    vm: Vm
    fresh: bool
    """Its guest has not been seen to run, so it may be a destination."""
    resident: int = 0
    signed: tuple[int, str] = (0, "")
    """Time and kind of its last sign."""
    credit: float = BURST
    credited: float = field(default_factory=time.monotonic)

    def may_try(self) -> bool:
        """Takes one sign from the budget; False if the budget is spent."""
        now = time.monotonic()
        self.credit = min(BURST, self.credit + (now - self.credited) / REFILL_S)
        self.credited = now
        if self.credit < 1:
            return False
        self.credit -= 1
        return True

    def is_being_loaded(self) -> bool:
        """Whether it has grown much since the last call, about a second ago, and its guest has not run yet."""
        if not self.fresh:
            return False
        before, self.resident = self.resident, procfs.resident_bytes(self.vm.pid)
        self.fresh = discovery.is_fresh(self.vm.pid)
        return self.fresh and self.resident - before >= GROWTH_BYTES
