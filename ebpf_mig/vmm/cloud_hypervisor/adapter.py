# SPDX-License-Identifier: Apache-2.0
"""The Cloud Hypervisor adapter: its options, its lab, its checks. See `vmm.adapter.Adapter`.

In: values of the command line. Out: `ADAPTER`. The API client is imported only on use.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ebpf_mig.errors import PreflightError, UsageError
from ebpf_mig.linux.check import OK, WARN, Check
from ebpf_mig.vmm.adapter import Adapter, FarEnd, Kind, Option, Values

if TYPE_CHECKING:
    from ebpf_mig.lab.netns import Link
    from ebpf_mig.lab.scenario import Scenario
    from ebpf_mig.vmm.base import Migration, RemoteEnd
    from ebpf_mig.vmm.witness import VmmWitness


class CloudHypervisorAdapter(Adapter):
    """Cloud Hypervisor by its HTTP API."""

    name = "cloud-hypervisor"
    title = "Cloud Hypervisor"
    comms = ("cloud-hyperv",)
    about = "Migrate a Cloud Hypervisor VM through its HTTP API."
    options = (
        Option("--source", "API socket of the VM to migrate.", metavar="SOCKET", required=True),
        Option("--destination", "API socket of the destination VMM.", metavar="SOCKET", required=True),
        Option("--url", "Where the destination listens: tcp:HOST:PORT or unix:PATH.", required=True),
        Option("--local", "Hand the memory over by file descriptor (unix only).", Kind.FLAG),
        Option("--downtime-ms", "The VMM's downtime goal (v52 and later).", Kind.COUNT),
        Option("--timeout-s", "The VMM's time-out for pre-copy (v52 and later).", Kind.COUNT),
        Option("--connections", "Number of TCP connections (v52 and later).", Kind.COUNT, most=128),
        Option("--tls-dir", "Directory of TLS certificates (v53 and later).", metavar="DIR"),
        Option("--memory-mode", "How memory is sent.", Kind.CHOICE, choices=("precopy", "postcopy")),
        Option("--source-log", "The source's log file, to report its own figures, too.", metavar="FILE"),
        Option("--destination-log", "The destination's log file.", metavar="FILE"),
        Option("--source-events", "The file of the source's --event-monitor.", metavar="FILE"),
        Option("--destination-events", "The file of the destination's --event-monitor.", metavar="FILE"),
    )
    examples: ClassVar = {
        "migrate": (
            "ebpf-mig migrate cloud-hypervisor --source a.sock --destination b.sock \\",
            "    --url tcp:127.0.0.1:4444",
            "ebpf-mig migrate cloud-hypervisor --source a.sock --destination b.sock \\",
            "    --url unix:/run/m --local",
        ),
        "demo": ("ebpf-mig demo --vmm cloud-hypervisor --vmm-binary ./cloud-hypervisor",),
    }
    epilog = "The destination is a Cloud Hypervisor started with --api-socket alone."
    timeout_help = "Stop waiting after this."
    has_lab = True
    hands_over = True

    @property
    def witness(self) -> VmmWitness:
        """See `Adapter.witness`."""
        from ebpf_mig.vmm.cloud_hypervisor.witness import WITNESS

        return WITNESS

    def connect(self, values: Values, remote: tuple[str, RemoteEnd] | None = None) -> Migration:
        """See `Adapter.connect`."""
        from ebpf_mig.vmm.cloud_hypervisor.migration import ChMigration, ChOptions

        own = ("local", "downtime_ms", "timeout_s", "connections", "tls_dir")
        files = ("source_log", "destination_log", "source_events", "destination_events")
        options = ChOptions(
            **{name: values[name] for name in (*own, *files)}, postcopy=values["memory_mode"] == "postcopy"
        )
        return ChMigration(values["source"], values["destination"], values["url"], options, remote)

    def far_end(self, role: str, values: Values) -> FarEnd:
        """See `Adapter.far_end`."""
        if values[f"{role}_events"]:
            why = "the events of a VMM on another host have no time stamps on a known clock"
            raise UsageError(why, f"leave --{role}-events out; --{role}-log works there, too")
        return FarEnd(["--api-socket", values[role]], values[role])

    @contextlib.contextmanager
    def lab(
        self, scenario: Scenario, binary: str | None = None, *, local: bool = False, link: Link | None = None
    ) -> Iterator[tuple[Migration, list[str]]]:
        """See `Adapter.lab`."""
        from ebpf_mig.vmm.cloud_hypervisor.lab import ChPair
        from ebpf_mig.vmm.cloud_hypervisor.migration import ChMigration

        if scenario.dirty_ring is not None:
            raise UsageError("Cloud Hypervisor logs dirty pages in bitmaps", "leave the dirty ring out")
        if scenario.auto_converge:
            raise UsageError("Cloud Hypervisor does not throttle vCPUs", "choose a scenario without auto-converge")
        with ChPair(scenario, binary, local=local, link=link) as pair:
            migration = ChMigration(pair.source.api, pair.destination.api, pair.uri, pair.options())
            with contextlib.closing(migration):
                yield migration, pair.notes

    def checks(self) -> Iterator[Check]:
        """Which Cloud Hypervisor the lab would use, and whether KVM can save the state that it needs."""
        from ebpf_mig.vmm.cloud_hypervisor.lab import find_binary

        try:
            path = find_binary(None)
        except PreflightError as error:
            fact = "not found; needed by demo --vmm cloud-hypervisor only"
            yield Check(self.title, WARN, fact, error.remedy or "")
        else:
            run = subprocess.run(
                [path, "--version"], capture_output=True, text=True, errors="replace", check=False, timeout=30
            )
            first = (run.stdout.splitlines() or ["unknown version"])[0]
            yield Check(self.title, OK, first.removeprefix("cloud-hypervisor "))
        yield _nested_state()


def _nested_state() -> Check:
    """Cloud Hypervisor always saves nested state. If KVM refuses, the migration fails after the stop."""
    from ebpf_mig.vmm.cloud_hypervisor.lab import lacks_nested_state

    if not Path("/dev/kvm").exists():
        return Check("nested state", WARN, "not known without /dev/kvm")
    if not lacks_nested_state():
        return Check("nested state", OK, "KVM can save it")
    fact = "KVM cannot save it: Cloud Hypervisor's migrations fail; the demo preloads a library that answers for it"
    if shutil.which("cc") is None:
        return Check("nested state", WARN, f"{fact}, and has no C compiler for it", "apt-get install gcc libc6-dev")
    return Check(
        "nested state", WARN, fact, "for VMs of your own: a KVM with nested virtualisation (kvm_intel nested=1)"
    )


ADAPTER = CloudHypervisorAdapter()
