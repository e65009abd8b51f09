# SPDX-License-Identifier: Apache-2.0
"""libvirt's API, by its Python binding, or by virsh where that is not installed.

In: URIs, a domain, a `Request`. Out: facts about the domain, one migration, libvirt's figures. Errors of libvirt
are VmmErrors. The binding also delivers events; virsh does not.
API: https://libvirt.org/html/libvirt-libvirt-domain.html (9.0.0).
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ebpf_mig.errors import PreflightError, VmmError

MIB = 1 << 20
_ANSWER_S = 30.0


@dataclass(frozen=True)
class Request:
    """How to migrate. None and False keep libvirt's defaults."""

    to: str
    """URI of the destination's libvirt: as the source's libvirt reaches it (peer to peer), or as we do (direct)."""
    direct: bool = False
    """We drive both. False: the source's libvirt drives the destination's (peer to peer)."""
    tunnelled: bool = False
    parallel: int | None = None
    """Number of connections."""
    postcopy: bool = False
    bandwidth_bytes: int | None = None
    downtime_ms: int | None = None
    migrate_uri: str | None = None
    tls: bool = False
    auto_converge: bool = False


@dataclass(frozen=True)
class Domain:
    """A running domain."""

    name: str
    uuid: str


@dataclass(frozen=True)
class Event:
    """An event as it reached us."""

    name: str
    """`libvirt.SUSPENDED`, `qmp.STOP`."""
    value: int = 0
    wall_ns: int | None = None
    """QEMU's own stamp; None: libvirt's events have none."""


Listener = Callable[[str, Event], None]
"""Called with a role and an event, in a thread of its own."""


class CancelledError(VmmError):
    """The job was aborted."""


class Client(Protocol):
    """One connection to the source's libvirt."""

    def version(self) -> str:
        """Of the hypervisor."""

    def domain(self, name: str) -> Domain:
        """A running domain by name, UUID or id; VmmError if there is none."""

    def listen(self, domain: Domain, other: str | None, listener: Listener) -> None:
        """Delivers events of the domain from now on, here and from the libvirt at `other`."""

    def prepare(self, domain: Domain, request: Request) -> None:
        """Sets options that cannot be part of the request itself."""

    def migrate(self, domain: Domain, request: Request) -> None:
        """Migrates. Returns when the domain runs at the destination. CancelledError, VmmError."""

    def postcopy(self, domain: Domain) -> None:
        """Switches the running job to postcopy; VmmError."""

    def abort(self, domain: Domain) -> None:
        """Aborts the running job, if there is one."""

    def figures(self) -> dict[str, int]:
        """libvirt's figures of the completed job; empty if there are none."""

    def close(self) -> None:
        """Disconnects."""


def connect(uri: str | None) -> Client:
    """Uses the binding, else virsh. PreflightError if there is neither, VmmError if libvirt does not answer."""
    if importlib.util.find_spec("libvirt") is not None:
        from ebpf_mig.vmm.libvirt.binding import Binding

        return Binding(uri)
    if shutil.which("virsh") is not None:
        return Virsh(uri)
    raise PreflightError(
        "libvirt cannot be asked: neither its Python binding nor virsh is installed", "apt-get install python3-libvirt"
    )


class Virsh:
    """libvirt by its command line."""

    def __init__(self, uri: str | None) -> None:
        self._base = ["virsh", "-q", *(["-c", uri] if uri else [])]
        self._figures: dict[str, int] = {}
        self._run("version")

    def version(self) -> str:
        """See `Client.version`."""
        last = self._run("version").strip().rpartition(" ")[2]
        return last if last[:1].isdigit() else ""

    def domain(self, name: str) -> Domain:
        """See `Client.domain`."""
        if self._run("domstate", "--", name).strip() not in {"running", "paused"}:
            raise _not_running(name)
        uuid = self._run("domuuid", "--", name).strip()
        return Domain(self._run("domname", uuid).strip(), uuid)

    def listen(self, domain: Domain, other: str | None, listener: Listener) -> None:
        """Does nothing: virsh stamps events when it prints them."""

    def prepare(self, domain: Domain, request: Request) -> None:
        """See `Client.prepare`."""
        if request.downtime_ms is not None:
            self._run("migrate-setmaxdowntime", domain.uuid, str(request.downtime_ms))

    def migrate(self, domain: Domain, request: Request) -> None:
        """See `Client.migrate`."""
        options = {
            "--p2p": not request.direct,
            "--tunnelled": request.tunnelled,
            "--tls": request.tls,
            "--auto-converge": request.auto_converge,
            "--parallel": request.parallel is not None,
            "--postcopy": request.postcopy,
            "--postcopy-after-precopy": request.postcopy,
        }
        command = ["migrate", "--live", *(name for name, wanted in options.items() if wanted)]
        if request.parallel is not None:
            command += ["--parallel-connections", str(request.parallel)]
        if request.bandwidth_bytes:
            command += ["--bandwidth", str(mib(request.bandwidth_bytes))]
        if request.migrate_uri is not None:
            command += ["--migrateuri", request.migrate_uri]
        self._run(*command, "--", domain.uuid, request.to, timeout_s=None)
        with contextlib.suppress(VmmError):
            self._figures = _figures_of(self._run("domjobinfo", "--completed", "--rawstats", domain.uuid))

    def postcopy(self, domain: Domain) -> None:
        """virsh switches by itself after the first pass."""

    def abort(self, domain: Domain) -> None:
        """See `Client.abort`."""
        with contextlib.suppress(VmmError):
            self._run("domjobabort", domain.uuid)

    def figures(self) -> dict[str, int]:
        """See `Client.figures`."""
        return self._figures

    def close(self) -> None:
        """Nothing is open."""

    def _run(self, *arguments: str, timeout_s: float | None = _ANSWER_S) -> str:
        try:
            run = subprocess.run(
                [*self._base, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=timeout_s,
                process_group=0,  # our Ctrl-C aborts the job and must not reach virsh
            )
        except subprocess.TimeoutExpired as error:
            raise VmmError(f"libvirt does not answer virsh {arguments[0]} within {_ANSWER_S:.0f} s") from error
        if run.returncode:
            raise error_of(run.stderr)
        return run.stdout


def error_of(text: str, code: int | None = None) -> VmmError:
    """libvirt's message as one line."""
    line = " ".join(text.replace("error:", " ").split())[:500] or "libvirt gives no reason"
    if code == _ABORTED or "canceled by client" in line or "cancelled by" in line:
        return CancelledError(line)
    return VmmError(line)


_ABORTED = 78
"""VIR_ERR_OPERATION_ABORTED, include/libvirt/virterror.h."""


def mib(count: int) -> int:
    """MiB/s, the unit of libvirt's bandwidths, at least 1."""
    return max(1, round(count / MIB))


def _not_running(name: str) -> VmmError:
    return VmmError(f"the domain {name} does not run", "start it, or name another; virsh list shows them")


def _figures_of(text: str) -> dict[str, int]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): int(value) for name, _, value in pairs if value.strip().isdigit()}


def checked(domain: Any, name: str) -> Domain:
    """A domain of the binding; VmmError if it does not run."""
    if not domain.isActive():
        raise _not_running(name)
    return Domain(domain.name(), domain.UUIDString())
