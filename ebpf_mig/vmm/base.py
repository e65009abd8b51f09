# SPDX-License-Identifier: Apache-2.0
"""The interface of a migration, the same for all VMMs, and helpers that make marks.

In: the user's API sockets and options. Out: the pids to trace, then, once tracing is armed, an `Outcome` with marks:
what the VMM itself reports, to compare with the kernel's figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ebpf_mig.linux import clock, procfs, sockets
from ebpf_mig.recording.events import AnyEvent, ClockPair, Mark, Target


@dataclass(frozen=True)
class Outcome:
    """How the migration ended, as the VMM reports it."""

    result: str
    """completed, failed, cancelled or unknown."""
    error: str = ""
    """Why it did not complete."""
    marks: tuple[AnyEvent, ...] = field(default=())
    remark: str = ""
    """What was requested but did not happen although the migration completed, one line; empty: nothing."""


@dataclass(frozen=True)
class RemoteEnd:
    """An end on another host, as its recorder reports it."""

    pid: int = 0
    """Pid on that host; 0: unknown."""
    clock: ClockPair | None = None
    """That host's clocks; None: unknown."""

    run: Callable[[list[str]], str] | None = None
    """Runs a command on that host. Returns its output; empty if it cannot be run."""

    @property
    def key(self) -> int:
        """Stands for its pid in marks. No process on this host has this number."""
        return -1 - self.pid

    def output(self, *command: str) -> str:
        """The output of a command on that host; see `run`."""
        return self.run(list(command)) if self.run else ""

    def listens(self, url: str) -> bool:
        """Whether something listens at the port of `url`, from the tables of the process's network namespace.

        The socket's owner is not known. If the process is unknown, the command's own namespace is read.
        """
        port = url.rpartition(":")[2]
        network = (self.pid, "net") if self.pid else ("net",)
        tables = self.output("cat", *(procfs.path(*network, table) for table in ("tcp", "tcp6")))
        return port.isdecimal() and int(port) in {found for found, _ in sockets.tcp_listeners(tables.encode())}


class Migration(Protocol):
    """One migration through a VMM's API. Order of calls: targets, prepare, run (blocks; own thread), close."""

    def targets(self) -> list[Target]:
        """The VMM processes, taken before anything blocks; VmmError if they cannot be found."""

    @property
    def grows(self) -> bool:
        """Whether more of its processes start during the migration."""

    def appeared(self) -> list[Target]:
        """Processes that started since the last call. Called every few ms during tracing."""

    def version(self, role: str) -> str:
        """The VMM's version at that end; empty if it is not known."""

    def prepare(self) -> None:
        """Everything that can be done before tracing: capabilities, parameters, making the destination listen."""

    def run(self, timeout_s: float) -> Outcome:
        """Triggers the migration and waits for its end on both sides; cancels it at the time-out."""

    def cancel(self) -> None:
        """Requests cancellation from another thread; `run` then returns. Does nothing if no migration runs."""

    def close(self) -> None:
        """Disconnects; the VMs stay as they are."""


def wall_to_monotonic(wall_ns: int, clocks: ClockPair | None = None) -> tuple[int, int]:
    """(monotonic ns, doubt ns) of a recent CLOCK_REALTIME stamp. `clocks`: both, read near it; None: as they are now.

    The wall clock runs faster or slower than the other, by what NTP wants.
    """
    clocks = clocks or ClockPair(*clock.bracket(3))
    return clocks.monotonic_ns - (clocks.realtime_ns - wall_ns), clocks.doubt_ns


def mark(
    pid: int,
    name: str,
    detail: str = "",
    value: int = 0,
    wall_ns: int | None = None,
    grain_ns: int = 0,
    clocks: ClockPair | None = None,
) -> Mark:
    """A mark at the present time, or at the VMM's wall-clock stamp, which the VMM rounds down to `grain_ns`. `clocks`:
    see `wall_to_monotonic`."""
    if wall_ns is None:
        return Mark(clock.monotonic_ns(), pid, name, detail, value, 0)
    at, doubt = wall_to_monotonic(wall_ns, clocks)
    return Mark(at + grain_ns // 2, pid, name, detail, value, doubt + -(-grain_ns // 2))
