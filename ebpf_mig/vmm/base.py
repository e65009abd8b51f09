# SPDX-License-Identifier: Apache-2.0
"""What a session needs of a migration, whichever VMM does it, and the marks that an adapter makes.

In: the user's API sockets and options. Out: the pids to trace, then, once tracing is armed, an `Outcome` with marks:
what the VMM itself says about the migration, to be set beside the kernel's figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ebpf_mig.linux import clock, procfs, sockets
from ebpf_mig.recording.events import AnyEvent, ClockPair, Mark, Target


@dataclass(frozen=True)
class Outcome:
    """How the migration ended, as the VMM says."""

    result: str
    """completed, failed, cancelled or unknown."""
    error: str = ""
    """Why it did not complete."""
    marks: tuple[AnyEvent, ...] = field(default=())
    remark: str = ""
    """What was asked for and did not come about although it completed, one line; empty: nothing."""


@dataclass(frozen=True)
class Elsewhere:
    """An end on another host, as far as its recorder there reports it."""

    pid: int = 0
    """There; 0 unknown."""
    clock: ClockPair | None = None
    """That host's clocks; None unknown."""

    run: Callable[[list[str]], str] | None = None
    """Runs a command there: what it prints, empty if it cannot be run."""

    @property
    def key(self) -> int:
        """What stands for its pid in marks: no process here has it."""
        return -1 - self.pid

    def said(self, *command: str) -> str:
        """What a command prints there; as `run`."""
        return self.run(list(command)) if self.run else ""

    def listens(self, url: str) -> bool:
        """Whether something listens at the port of `url`, by the tables of the process's network namespace.

        Whose socket it is is not known. If the process is not known: the network of the command that looks.
        """
        port = url.rpartition(":")[2]
        network = (self.pid, "net") if self.pid else ("net",)
        said = self.said("cat", *(procfs.path(*network, table) for table in ("tcp", "tcp6")))
        return port.isdecimal() and int(port) in {found for found, _ in sockets.tcp_listeners(said.encode())}


class Migration(Protocol):
    """One migration through a VMM's API. Order of calls: targets, prepare, run (blocks; own thread), close."""

    def targets(self) -> list[Target]:
        """The VMM processes, taken before anything blocks; VmmError if they cannot be found."""

    @property
    def grows(self) -> bool:
        """Whether more processes of it start while it runs."""

    def appeared(self) -> list[Target]:
        """Those that have started since this was last asked for; asked every few ms while it is traced."""

    def version(self, role: str) -> str:
        """The VMM's version at that end; empty if it is not known."""

    def prepare(self) -> None:
        """All that can be done before tracing begins: capabilities, parameters, the destination's listening."""

    def run(self, timeout_s: float) -> Outcome:
        """Triggers the migration and waits for its end on both sides; cancels it at the time-out."""

    def cancel(self) -> None:
        """Asks for a cancellation from another thread; `run` then returns. Harmless when nothing runs."""

    def close(self) -> None:
        """Disconnects; the VMs stay as they are."""


def wall_to_monotonic(wall_ns: int) -> tuple[int, int]:
    """(monotonic ns, doubt ns) of a CLOCK_REALTIME stamp of just now: the tightest bracket of both clocks."""
    monotonic, real, doubt = clock.bracket(3)
    return monotonic - (real - wall_ns), doubt


def mark(pid: int, name: str, detail: str = "", value: int = 0, wall_ns: int | None = None, grain_ns: int = 0) -> Mark:
    """A mark of now, or of the VMM's own wall-clock stamp, which it cut to a multiple of `grain_ns`."""
    if wall_ns is None:
        return Mark(clock.monotonic_ns(), pid, name, detail, value, 0)
    at, doubt = wall_to_monotonic(wall_ns)
    return Mark(at + grain_ns // 2, pid, name, detail, value, doubt + -(-grain_ns // 2))
