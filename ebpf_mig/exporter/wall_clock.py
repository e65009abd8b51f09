# SPDX-License-Identifier: Apache-2.0
"""The wall clock at the instant at which a guest stopped or started.

In: readings of both clocks while VMs are traced. Out: the pair of both clocks at an instant. Two nodes join their
halves of a migration by their wall clocks, whose rate NTP changes: by 0.05 % with adjtime(2) (`MAX_TICKADJ` of 500 us a
second, kernel/time/ntp.c, Linux 6.12), and by more where its daemon sets the tick. So a reading some seconds later is
off by as much as a short blackout.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from operator import attrgetter

from ebpf_mig.linux import clock
from ebpf_mig.recording.events import AnyEvent, ClockPair, Kick, VcpuEnter, VcpuExit

MOST_READINGS = 3000
"""A minute of readings, 20 ms apart."""
STEPPED = 0.02
"""The wall clock was set, and did not only run faster or slower, if the clocks disagree by more than this share."""


class WallClock:
    """The latest readings, in order."""

    def __init__(self, readings: Iterable[ClockPair] = ()) -> None:
        self._readings = deque(readings, MOST_READINGS)

    def read(self) -> None:
        """Reads both clocks, which takes some microseconds."""
        self._readings.append(ClockPair(*clock.bracket()))

    def at(self, instant_ns: int) -> ClockPair:
        """Both clocks at an instant, between the readings around it; else the nearest reading, or one of now."""
        if not self._readings:
            self.read()
        after = bisect_left(self._readings, instant_ns, key=attrgetter("monotonic_ns"))
        if after in (0, len(self._readings)):
            return self._readings[min(after, len(self._readings) - 1)]
        a, b = self._readings[after - 1], self._readings[after]
        took, wall = b.monotonic_ns - a.monotonic_ns, b.realtime_ns - a.realtime_ns
        if abs(wall - took) > took * STEPPED + a.doubt_ns + b.doubt_ns:
            return min(a, b, key=lambda pair: abs(pair.monotonic_ns - instant_ns))
        realtime_ns = a.realtime_ns + (instant_ns - a.monotonic_ns) * wall // took
        return ClockPair(instant_ns, realtime_ns, max(a.doubt_ns, b.doubt_ns))


def edge_of(events: Iterable[AnyEvent], last_ns: int) -> int:
    """About when the guest started, if one of these events shows it; else when it was stopped, or `last_ns`.

    A VMM may kick its vCPUs again when it ends; they do not leave KVM_RUN then.
    """
    kicks, exits = [last_ns], [0]
    for event in events:
        if isinstance(event, VcpuEnter) and event.runs == 1:
            return event.at_ns
        if isinstance(event, Kick):
            kicks.append(event.at_ns)
        elif isinstance(event, VcpuExit):
            exits.append(event.at_ns)
    return max(exits) or max(kicks[1:], default=last_ns)
