# SPDX-License-Identifier: Apache-2.0
"""Whether a process was loaded with a state that came in over a connection. Only that makes it a destination.

In: the ioctls and transfers of one process, in any order. Out: yes or no. A VMM that boots also sets vCPU state and
then runs its guest. Meanwhile its monitor, disk, console or network may deliver bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import RECEIVE, Ioctl, Transfer

STREAM_BYTES = 1024
"""Calls of the migration's stream move more than this on average: pages and state are flushed from large buffers.
Replies and events of a monitor are smaller, and QEMU reads its monitor byte by byte."""
LOADED_BYTES = 16 << 10
"""The state of the smallest VM is larger. Where memory does not go over the connection, nothing else does."""


class Reception:
    """Of one process. Feed it with `ioctl` and `transfer`, then ask `loaded`."""

    def __init__(self) -> None:
        self._bytes: Counter[int] = Counter()
        self._calls: Counter[int] = Counter()
        self._enough: dict[int, int] = {}
        """When so much had come in on a socket."""
        self._set_ns = 0
        self._clock_ns = 0

    @classmethod
    def of(cls, ioctls: Iterable[Ioctl], transfers: Iterable[Transfer]) -> Reception:
        """Of all that a process did."""
        found = cls()
        for ioctl in ioctls:
            found.ioctl(ioctl)
        for transfer in transfers:
            found.transfer(transfer)
        return found

    def ioctl(self, event: Ioctl) -> None:
        """A VMM that starts a guest sets the clock first, and then what has changed since in its vCPUs."""
        name = kvm.name_of(event.cmd)
        if name == "SET_CLOCK":
            self._clock_ns = min(event.begin_ns, self._clock_ns or event.begin_ns)
        elif name in kvm.VCPU_STATE_SET and (not self._clock_ns or event.begin_ns < self._clock_ns):
            self._set_ns = max(event.begin_ns, self._set_ns)

    def transfer(self, event: Transfer) -> None:
        """Calls that move few bytes are those of a monitor or a console."""
        if event.direction != RECEIVE:
            return
        self._bytes[event.socket] += event.bytes
        self._calls[event.socket] += event.calls
        if event.socket not in self._enough and self._bytes[event.socket] >= LOADED_BYTES:
            self._enough[event.socket] = event.begin_ns

    @property
    def loaded(self) -> bool:
        """Whether vCPU state was set, before the clock was, after enough had come in on a connection."""
        return any(
            at < self._set_ns and self._bytes[socket] >= STREAM_BYTES * self._calls[socket]
            for socket, at in self._enough.items()
        )
