# SPDX-License-Identifier: Apache-2.0
"""Limits the memory and time for reading a recording: a small file must not fill the memory or take minutes.

In: blocks of events as they are read, and the bytes of the file that they took. Out: nothing, or `TooLargeError`. The
limits depend on the size of the file, since ten compressed bytes can hold a thousand equal events. Real recordings
unpack to 2.4 to 4 times their size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter

from ebpf_mig.errors import RecordingError
from ebpf_mig.recording import events as ev

MOST_TIMES = 40
"""Bytes of memory allowed per byte of the file."""
MOST_BYTES = 120 << 20
"""Bytes allowed in addition, for any size. The program itself takes about 40 MB more."""
MOST_CONTENT_TIMES = 16
MOST_CONTENT_BYTES = 32 << 20
"""The same limits for the unpacked size of the blocks."""

_PLAIN: dict[type, int] = {
    ev.Ioctl: 900, ev.VcpuEnter: 700, ev.VcpuExit: 750, ev.VcpuState: 950, ev.Transfer: 800, ev.TcpInfo: 500,
    ev.Samples: 450, ev.Socket: 450, ev.Mark: 450, ev.OwnCost: 150, ev.OwnRuns: 300, ev.OwnTurn: 200,
    ev.Kick: 250, ev.Slot: 250,
}  # fmt: skip
_WITH_AXIS: dict[type, int] = {
    ev.Ioctl: 3400, ev.VcpuEnter: 1900, ev.VcpuExit: 1900, ev.VcpuState: 1800, ev.Transfer: 2400, ev.OffCpu: 2200,
    ev.Segment: 1900, ev.Mark: 1700,
}  # fmt: skip
_ANY = 400
"""Bytes per event until the report is written: measured as the peak of whole reports, rounded up."""
_ITEM = 60
"""Bytes of a string in a stack or of an entry of a map, without its characters."""
_LISTS = {
    **dict.fromkeys((ev.OffCpu, ev.Samples, ev.VcpuSleep), attrgetter("stack")),
    ev.TcpInfo: attrgetter("values"),
}


class TooLargeError(RecordingError):
    """The recording would take more memory or time than its size justifies."""


class Budget:
    """Adds up the memory that events take."""

    def __init__(self, name: str, *, with_axis: bool = False, share: int = 1) -> None:
        """`with_axis`: the report shows single events on a time axis. `share`: number of recordings held at once."""
        self._name = name
        self._costs = _PLAIN | _WITH_AXIS if with_axis else _PLAIN
        self._most = MOST_BYTES // share
        self._spent = 0

    def spend(self, block: Sequence[ev.AnyEvent], stored: int) -> None:
        """Counts a block that is kept. `stored`: bytes of the file read so far. Raises TooLargeError."""
        kinds = Counter(map(type, block))
        self._spent += sum(count * self._costs.get(kind, _ANY) for kind, count in kinds.items())
        for kind, items in _LISTS.items():
            if kind in kinds:
                self._spent += _ITEM * sum(len(items(event)) for event in block if type(event) is kind)
        if self._spent > self._most + MOST_TIMES * stored:
            raise TooLargeError(
                f"{self._name}: its first {stored / 1e6:.1f} MB unpack to more than {self._spent / 1e6:.0f} MB of "
                "events: not read"
            )


def check_content(name: str, content: int, stored: int) -> None:
    """Raises TooLargeError if blocks unpack to more than those of any real recording."""
    if content > MOST_CONTENT_BYTES + MOST_CONTENT_TIMES * stored:
        raise TooLargeError(f"{name}: its first {stored / 1e6:.1f} MB unpack to {content / 1e6:.0f} MB: not read")
