# SPDX-License-Identifier: Apache-2.0
"""A selector with which an event loop leaves the CPUs to the VMMs: it handles what arrives some time later, together.

In: files to wait for. Out: those that are ready, `REST_S` after the first of them became so, and both clocks at that
instant. QEMU sends events as it stops and starts the guest. To handle one takes a good part of a millisecond, and a
VMM would miss that CPU in its blackout.
"""

from __future__ import annotations

import selectors
import time

from ebpf_mig.linux import clock
from ebpf_mig.recording.events import ClockPair

REST_S = 0.02
"""Longer than a usual blackout."""


class Turns(selectors.DefaultSelector):
    """Rests while `rests` is true; otherwise it is an ordinary selector."""

    def __init__(self) -> None:
        super().__init__()
        self.rests = False
        self.woken = ClockPair(*clock.bracket())
        """Both clocks when something was last ready."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As `selectors.BaseSelector.select`. With a time-out of 0 it does not rest: the loop has work to do."""
        ready = super().select(timeout)
        if ready:
            self.woken = ClockPair(*clock.bracket(3))
        if ready and self.rests and timeout != 0:
            time.sleep(REST_S)
            return super().select(0)
        return ready
