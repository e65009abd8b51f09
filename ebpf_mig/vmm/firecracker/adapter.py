# SPDX-License-Identifier: Apache-2.0
"""The Firecracker adapter: its options, its lab, its checks. See `vmm.adapter.Adapter`.

Firecracker has no live migration: one process writes a snapshot, and another loads it. In: values of the command line.
Out: `ADAPTER`. The API client is imported only on use.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from ebpf_mig.errors import PreflightError, UsageError
from ebpf_mig.linux.check import OK, WARN, Check
from ebpf_mig.vmm.adapter import Adapter, Kind, Option, Values

if TYPE_CHECKING:
    from ebpf_mig.lab.netns import Link
    from ebpf_mig.lab.scenario import Scenario
    from ebpf_mig.vmm.base import Migration, RemoteEnd
    from ebpf_mig.vmm.witness import VmmWitness

_FILE, _UFFD = "file", "uffd"


class FirecrackerAdapter(Adapter):
    """Firecracker by its HTTP API."""

    name = "firecracker"
    title = "Firecracker"
    comms = ("firecracker",)
    about = "Hand a Firecracker VM over to another process by a snapshot."
    options = (
        Option("--source", "API socket of the VM to hand over.", metavar="SOCKET", required=True),
        Option("--destination", "API socket of the Firecracker to load it.", metavar="SOCKET", required=True),
        Option("--snapshot-dir", "Directory for the files, as both VMMs see it.", metavar="DIR", required=True),
        Option(
            "--diff",
            "Write only what changed since the VM's last snapshot, into MEMORY, that snapshot's memory file.",
            metavar="MEMORY",
        ),
        Option("--backend", "How the destination gets the memory.", Kind.CHOICE, choices=(_FILE, _UFFD)),
        Option("--uffd-socket", "Where your page fault handler listens, for --backend uffd.", metavar="PATH"),
        Option("--track-dirty-pages", "Log the restored VM's dirty pages, for a diff later on.", Kind.FLAG),
        Option("--after-resume", "Trace the restored VM for so long.  [default: 1s]", Kind.DURATION),
        Option("--source-log", "The source's log file, to report its own figures, too.", metavar="FILE"),
        Option("--destination-log", "The destination's log file.", metavar="FILE"),
    )
    examples: ClassVar = {
        "migrate": (
            "ebpf-mig migrate firecracker --source a.sock --destination b.sock \\",
            "    --snapshot-dir /var/snapshots/vm1",
            "ebpf-mig migrate firecracker --source a.sock --destination b.sock \\",
            "    --snapshot-dir /var/snapshots/vm1 \\",
            "    --backend uffd --uffd-socket /run/uffd.sock",
        ),
        "demo": ("ebpf-mig demo --vmm firecracker --vmm-binary ./firecracker",),
    }
    epilog = (
        "The destination is a Firecracker started with --api-sock alone. Afterwards\n"
        "the source stays paused: end its process. If the hand-over fails, the source\n"
        "resumes its guest, unless it may be on the destination; the error says which."
    )
    timeout_help = "Give up after this, and resume the source."
    has_lab = True

    @property
    def witness(self) -> VmmWitness:
        """See `Adapter.witness`."""
        from ebpf_mig.vmm.firecracker.witness import WITNESS

        return WITNESS

    def connect(self, values: Values, remote: tuple[str, RemoteEnd] | None = None) -> Migration:
        """See `Adapter.connect`."""
        if remote is not None:
            raise UsageError("a snapshot's files are on one host", "leave --source-host and --destination-host out")
        if (values["backend"] == _UFFD) != (values["uffd_socket"] is not None):
            raise UsageError("--backend uffd and --uffd-socket go together", "give both, or none")
        from ebpf_mig.vmm.firecracker.migration import AFTER_NS, FcMigration, FcOptions

        after = values["after_resume"]
        options = FcOptions(
            directory=values["snapshot_dir"],
            diff=values["diff"],
            uffd=values["uffd_socket"],
            track_dirty_pages=values["track_dirty_pages"],
            after_ns=AFTER_NS if after is None else after,
            source_log=values["source_log"],
            destination_log=values["destination_log"],
        )
        return FcMigration(values["source"], values["destination"], options)

    @contextlib.contextmanager
    def lab(
        self, scenario: Scenario, binary: str | None = None, *, local: bool = False, link: Link | None = None
    ) -> Iterator[tuple[Migration, list[str]]]:
        """See `Adapter.lab`. A scenario with postcopy has its page faults served by a handler (userfaultfd)."""
        from ebpf_mig.vmm.firecracker.lab import FcPair
        from ebpf_mig.vmm.firecracker.migration import FcMigration

        if link is not None or local:
            what = "--two-hosts" if link is not None else "--local"
            raise UsageError("a Firecracker VM is handed over by files on one host", f"leave {what} out")
        limited = scenario.downtime_ms is not None or scenario.bandwidth_bytes
        if limited or scenario.dirty_ring is not None or scenario.auto_converge or scenario.multifd_channels:
            raise UsageError(
                "Firecracker pauses its VM and then writes its memory: there are no passes to set up",
                "leave limits, channels, auto-converge and the dirty ring out",
            )
        with FcPair(scenario, binary, uffd=scenario.postcopy) as pair:
            migration = FcMigration(pair.source.api, pair.destination.api, pair.options())
            with contextlib.closing(migration):
                yield migration, pair.notes

    def checks(self) -> Iterator[Check]:
        """Which Firecracker the lab would use."""
        from ebpf_mig.vmm.firecracker.lab import find_binary

        try:
            path = find_binary(None)
        except PreflightError as error:
            yield Check(self.title, WARN, "not found; needed by demo --vmm firecracker only", error.remedy or "")
            return
        run = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", check=False, timeout=30
        )
        first = (run.stdout.splitlines() or ["unknown version"])[0]
        yield Check(self.title, OK, first.removeprefix("Firecracker "))


ADAPTER = FirecrackerAdapter()
