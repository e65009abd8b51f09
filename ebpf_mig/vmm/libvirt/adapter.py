# SPDX-License-Identifier: Apache-2.0
"""The libvirt adapter: its options, two hosts for the lab, its checks. See `vmm.adapter.Adapter`.

In: values of the command line. Out: `ADAPTER`. libvirt's guests run in QEMU processes.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from ebpf_mig.errors import UsageError
from ebpf_mig.linux.check import OK, WARN, Check
from ebpf_mig.vmm.adapter import Adapter, FarEnd, Kind, Option, Values

if TYPE_CHECKING:
    from ebpf_mig.lab.netns import Link
    from ebpf_mig.lab.scenario import Scenario
    from ebpf_mig.vmm.base import Migration, RemoteEnd
    from ebpf_mig.vmm.witness import VmmWitness


class LibvirtAdapter(Adapter):
    """Domains of libvirt's QEMU driver."""

    name = "libvirt"
    title = "libvirt"
    about = "Migrate a libvirt domain to the host of DESTURI."
    options = (
        Option("DOMAIN", "", argument=True),
        Option("DESTURI", "", argument=True),
        Option("--connect", "The source's libvirt.  [default: as virsh]", metavar="URI"),
        Option("--direct", "Drive both libvirts from this host, not peer to peer.", Kind.FLAG),
        Option("--tunnelled", "Send through the connection between the libvirtds.", Kind.FLAG),
        Option("--parallel", "Send memory over this many connections.", Kind.COUNT, most=255),
        Option("--postcopy", "Switch to postcopy after the second pass.", Kind.FLAG),
        Option("--bandwidth", "Set the bandwidth limit, e.g. 10Gbit; libvirt rounds it to MiB/s.", Kind.RATE),
        Option("--downtime-limit", "Set the domain's maximum downtime, e.g. 300ms.", Kind.DURATION),
        Option("--migrate-uri", "URI that QEMU sends to, e.g. tcp://10.0.0.2.", metavar="URI"),
        Option("--tls", "Encrypt with TLS.", Kind.FLAG),
        Option(
            "--destination-connect",
            "URI of the destination's libvirt from this host, to receive its events.",
            metavar="URI",
        ),
    )
    examples: ClassVar = {
        "migrate": (
            "ebpf-mig migrate libvirt vm1 qemu+ssh://b/system --destination-host b",
            "ebpf-mig migrate libvirt vm1 qemu+tls://b/system --parallel 4",
        ),
        "demo": ("ebpf-mig demo --vmm libvirt --tunnelled",),
        "record": (
            "ebpf-mig record --vm vm1 -- virsh migrate --live vm1 qemu+ssh://b/system",
            "ebpf-mig record --vm 'web-*' --duration 10m",
        ),
    }
    epilog = """DOMAIN is a name, a UUID or an id. DESTURI is as the source's libvirt reaches
the destination's; with --direct, as this host does. The destination is traced
if it is on this host, or with --destination-host."""
    timeout_help = "Abort the job after this."
    has_lab = True
    tunnels = True

    @property
    def witness(self) -> VmmWitness:
        """See `Adapter.witness`."""
        from ebpf_mig.vmm.libvirt.witness import WITNESS

        return WITNESS

    def connect(self, values: Values, remote: tuple[str, RemoteEnd] | None = None) -> Migration:
        """See `Adapter.connect`."""
        from ebpf_mig.vmm.libvirt.client import Request
        from ebpf_mig.vmm.libvirt.migration import LibvirtMigration

        limit = values["downtime_limit"]
        request = Request(
            to=values["desturi"],
            downtime_ms=None if limit is None else max(1, limit // 10**6),
            bandwidth_bytes=values["bandwidth"],
            **{name: values[name] for name in ("direct", "tunnelled", "parallel", "postcopy", "migrate_uri", "tls")},
        )
        if request.tunnelled and (request.direct or request.parallel or request.tls or request.migrate_uri):
            raise UsageError(
                "a tunnel has one connection, between the libvirtds",
                "use --tunnelled without --direct, --parallel, --tls and --migrate-uri",
            )
        return LibvirtMigration(values["domain"], request, values["connect"], values["destination_connect"], remote)

    def far_end(self, role: str, values: Values) -> FarEnd:
        """See `Adapter.far_end`. The other host finds the VM by its name, even before its process starts."""
        del role
        return FarEnd(["--vm", glob.escape(values["domain"])])

    @contextlib.contextmanager
    def lab(
        self, scenario: Scenario, binary: str | None = None, *, local: bool = False, link: Link | None = None
    ) -> Iterator[tuple[Migration, list[str]]]:
        """See `Adapter.lab`."""
        from ebpf_mig.vmm.libvirt.client import Request
        from ebpf_mig.vmm.libvirt.lab import NAME, LibvirtHosts
        from ebpf_mig.vmm.libvirt.migration import LibvirtMigration

        if local:
            raise UsageError("libvirt cannot hand memory over", "leave --local out")
        if link is not None:
            raise UsageError("libvirt's lab has two hosts of its own already", "leave --two-hosts out")
        if scenario.transport != "tcp":
            raise UsageError("the hosts of libvirt's lab share only a network", "use --transport tcp")
        if scenario.tunnelled and scenario.multifd_channels:
            raise UsageError("a tunnel has one connection, between the libvirtds", "leave --multifd out")
        with LibvirtHosts(scenario, binary) as hosts:
            request = Request(
                to=hosts.destination.uri_between,
                tunnelled=scenario.tunnelled,
                parallel=scenario.multifd_channels,
                postcopy=scenario.postcopy,
                bandwidth_bytes=scenario.bandwidth_bytes,
                downtime_ms=scenario.downtime_ms,
                auto_converge=scenario.auto_converge,
            )
            migration = LibvirtMigration(NAME, request, hosts.source.uri, hosts.destination.uri)
            with contextlib.closing(migration):
                yield migration, []

    def checks(self) -> Iterator[Check]:
        """Whether libvirt answers."""
        binding = importlib.util.find_spec("libvirt") is not None
        virsh = shutil.which("virsh")
        if not binding and virsh is None:
            yield Check("libvirt", WARN, "not found; needed by migrate libvirt only", "apt-get install python3-libvirt")
            return
        how = "its Python binding" if binding else "virsh, without events"
        version = ""
        if virsh is not None:
            run = subprocess.run(
                [virsh, "--version"], capture_output=True, text=True, errors="replace", check=False, timeout=30
            )
            version = f"{run.stdout.strip()}, "
        yield Check("libvirt", OK, f"{version}asked through {how}")


ADAPTER = LibvirtAdapter()
