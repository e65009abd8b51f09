# SPDX-License-Identifier: Apache-2.0
"""Decides whether a process loaded a state that it received over a connection. Only then it is a destination.

In: the ioctls and transfers of one process, in any order. Out: yes or no. A VMM that boots also sets vCPU state and
then runs its guest. At the same time it may receive bytes from its monitor, disk, console or network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import RECEIVE, Ioctl, Transfer

STREAM_BYTES = 1024
"""On average, calls of the migration's stream move more than this: pages and state are flushed from large buffers.
A monitor's replies and events are smaller, and QEMU reads its monitor byte by byte."""
LOADED_BYTES = 16 << 10
"""The state of the smallest VM is larger than this. It is all that is sent if memory does not go over the
connection.
"""


class Reception:
    """The evidence about one process. Add events with `ioctl` and `transfer`, then read `loaded`."""

    def __init__(self) -> None:
        self._bytes: Counter[int] = Counter()
        self._calls: Counter[int] = Counter()
        self._enough: dict[int, int] = {}
        """When LOADED_BYTES had been received on a socket, by socket."""
        self._set_ns = 0
        self._clock_ns = 0

    @classmethod
    def of(cls, ioctls: Iterable[Ioctl], transfers: Iterable[Transfer]) -> Reception:
        """The evidence from all ioctls and transfers of a process."""
        found = cls()
        for ioctl in ioctls:
            found.ioctl(ioctl)
        for transfer in transfers:
            found.transfer(transfer)
        return found

    def ioctl(self, event: Ioctl) -> None:
        """Adds an ioctl. Setters after the clock was set do not count: they are part of starting the guest."""
        name = kvm.name_of(event.cmd)
        if name == "SET_CLOCK":
            self._clock_ns = min(event.begin_ns, self._clock_ns or event.begin_ns)
        elif name in kvm.VCPU_STATE_SET and (not self._clock_ns or event.begin_ns < self._clock_ns):
            self._set_ns = max(event.begin_ns, self._set_ns)

    def transfer(self, event: Transfer) -> None:
        """Adds a transfer."""
        if event.direction != RECEIVE:
            return
        self._bytes[event.socket] += event.bytes
        self._calls[event.socket] += event.calls
        if event.socket not in self._enough and self._bytes[event.socket] >= LOADED_BYTES:
            self._enough[event.socket] = event.begin_ns

    @property
    def loaded(self) -> bool:
        """Whether vCPU state was set after enough bytes were received on a connection, and before the clock was set.

        A connection whose calls move few bytes is a monitor or a console, and does not count.
        """
        return any(
            at < self._set_ns and self._bytes[socket] >= STREAM_BYTES * self._calls[socket]
            for socket, at in self._enough.items()
        )
