# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ARG002 - the base class refuses whatever it is given
"""The adapter interface: everything that the rest of the program needs to know about one VMM.

In: values of the command line. Out: a migration, a pair of lab VMs, checks, names. `Adapter` is the base class; a VMM
overrides what it can do. Adapters do not print. They describe options, and the commands create them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ebpf_mig.errors import UsageError
from ebpf_mig.linux.check import Check

if TYPE_CHECKING:  # these load libraries that a report does not need
    from ebpf_mig.lab.netns import Link
    from ebpf_mig.lab.scenario import Scenario
    from ebpf_mig.vmm.base import Migration, RemoteEnd
    from ebpf_mig.vmm.witness import VmmWitness

Values = Mapping[str, Any]
"""Values of a VMM's options by their Python names: `downtime_limit`."""


class Kind(enum.Enum):
    """The kind of value that an option takes, and the type that the adapter gets."""

    TEXT = "str"
    FLAG = "bool"
    COUNT = "int, at least 1"
    DURATION = "ns, int"
    RATE = "bytes per second, int"
    CHOICE = "one of `choices`"


@dataclass(frozen=True)
class Option:
    """One option of `ebpf-mig migrate VMM`. If it is not given, its value is None, or False for a flag."""

    name: str
    """As typed: `--downtime-limit`."""
    help: str
    kind: Kind = Kind.TEXT
    metavar: str | None = None
    required: bool = False
    most: int | None = None
    """Largest COUNT."""
    choices: tuple[str, ...] = ()
    """Of a CHOICE; the first is the default."""
    argument: bool = False
    """It is positional: `DOMAIN`."""

    @property
    def opened(self) -> bool:
        """It is a path that we open ourselves, which may have any bytes. Other texts go to the VMM, which takes
        UTF-8."""
        return self.metavar in ("SOCKET", "FILE")


@dataclass(frozen=True)
class FarEnd:
    """What a migration needs on the other host."""

    record: Sequence[str]
    """Options of `ebpf-mig record` there that name the VM."""
    socket: str = ""
    """Path of the VMM's control socket on that host, to be forwarded to this one; empty: none is needed."""


class Adapter:
    """One VMM, or a manager of VMMs."""

    name = ""
    """Name on the command line and in recordings."""
    title = ""
    """Name in text."""
    comms: tuple[str, ...] = ()
    """Prefixes of its process names, which the kernel cuts to 15 characters."""
    plain_files = True
    """Whether it may write or read a guest's memory and state by write(2) and read(2) on files."""
    options: tuple[Option, ...] = ()
    """Options of `migrate`; empty: it has no API to migrate."""
    about = ""
    """First line of the help of `migrate`."""
    epilog = ""
    """End of that help, after the options."""
    examples: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Command lines for the help, by command: `migrate`, `demo`, `record`."""
    timeout_help = "Cancel the migration after this."
    has_lab = False
    """Whether `lab` works."""
    hands_over = False
    """Whether its lab can hand memory over by file descriptor (`--local`)."""
    tunnels = False
    """Whether its lab can send through the VMs' managers (`--tunnelled`)."""

    @property
    def witness(self) -> VmmWitness:
        """The meaning of its marks, for the analysis. Pure."""
        from ebpf_mig.vmm.witness import VmmWitness

        return VmmWitness()

    def connect(self, values: Values, remote: tuple[str, RemoteEnd] | None = None) -> Migration:
        """The migration that the options describe. `remote`: role and facts of the end on another host.

        If the other end's control socket is forwarded, `values` hold the local path. UsageError, VmmError.
        """
        raise UsageError(f"{self.title} has no API to migrate")

    def far_end(self, role: str, values: Values) -> FarEnd:
        """What the other host needs if that end is on it; UsageError if the options do not allow that."""
        raise UsageError(f"the {role} of {self.title} cannot be on another host")

    def lab(
        self, scenario: Scenario, binary: str | None = None, *, local: bool = False, link: Link | None = None
    ) -> AbstractContextManager[tuple[Migration, list[str]]]:
        """Two VMs that run the scenario and a migration between them, with notes for the report.

        `local`: hand the memory over. `link`: put each VM in its side's network. UsageError if the VMM cannot do this.
        """
        raise UsageError(f"there is no lab for {self.title}")

    def awaits_vm(self, arguments: Sequence[str]) -> bool:
        """Whether a process with this command line may have no KVM VM yet. Most VMMs create it on request."""
        return True

    def awaits_live_update(self, arguments: Sequence[str]) -> bool:
        """Whether a process with this command line waits to take over the VM of another process on this host."""
        return False

    def checks(self) -> Iterable[Check]:
        """The checks of `doctor` for this VMM."""
        return ()

    def process_behind(self, path: str) -> int | None:
        """The VMM's pid if another process created its control socket, otherwise None."""
        return None
