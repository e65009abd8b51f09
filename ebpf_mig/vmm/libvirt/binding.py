# SPDX-License-Identifier: Apache-2.0
"""libvirt through its Python binding (python3-libvirt): see `client.Client`.

In: URIs. Out: as `Client`, with events. libvirt's own events have no time stamps; QEMU's, which libvirt passes on
(libvirt_qemu, virConnectDomainQemuMonitorEventRegister), have QEMU's. One thread runs libvirt's event loop.
"""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any

import libvirt

from ebpf_mig.errors import VmmError
from ebpf_mig.vmm.libvirt.client import Domain, Event, Listener, Request, checked, error_of, mib

try:
    import libvirt_qemu
except ImportError:
    libvirt_qemu = None

_LIFECYCLE = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: "STARTED",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "SUSPENDED",
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "RESUMED",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "STOPPED",
}
_KEPT = ("STOP", "RESUME", "MIGRATION", "MIGRATION_PASS")
"""QEMU events that are passed on."""
_lock = threading.Lock()
_running = False


class Binding:
    """A connection to the source's libvirt, and perhaps one to the destination's."""

    def __init__(self, uri: str | None) -> None:
        _run_events()
        libvirt.registerErrorHandler(lambda _context, _error: None, None)  # the default prints
        self._connection = _open(uri)
        self._other: Any = None
        self._listener: Listener | None = None
        self._figures: dict[str, int] = {}

    def version(self) -> str:
        """See `Client.version`."""
        number = self._connection.getVersion()
        return f"{number // 10**6}.{number // 1000 % 1000}.{number % 1000}"

    def domain(self, name: str) -> Domain:
        """See `Client.domain`."""
        find = self._connection
        ways = [find.lookupByName, find.lookupByUUIDString]
        if name.isdecimal():
            ways.append(lambda number: find.lookupByID(int(number)))
        problem = VmmError(f"no domain is called {name}", "virsh list shows those that run")
        for way in ways:
            try:
                return checked(way(name), name)
            except libvirt.libvirtError as error:
                if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_INVALID_ARG):
                    problem = error_of(str(error))
        raise problem

    def listen(self, domain: Domain, other: str | None, listener: Listener) -> None:
        """See `Client.listen`."""
        self._listener = listener
        self._register(self._connection, "source", domain)
        if other is not None:
            self._other = _open(other)
            self._register(self._other, "destination", domain)

    def prepare(self, domain: Domain, request: Request) -> None:
        """See `Client.prepare`."""
        if request.downtime_ms is not None:
            with _translated():
                self._of(domain).migrateSetMaxDowntime(request.downtime_ms, 0)

    def migrate(self, domain: Domain, request: Request) -> None:
        """See `Client.migrate`."""
        flags = libvirt.VIR_MIGRATE_LIVE
        for wanted, flag in (
            (request.tunnelled, libvirt.VIR_MIGRATE_TUNNELLED),
            (request.parallel is not None, libvirt.VIR_MIGRATE_PARALLEL),
            (request.postcopy, libvirt.VIR_MIGRATE_POSTCOPY),
            (request.tls, libvirt.VIR_MIGRATE_TLS),
            (request.auto_converge, libvirt.VIR_MIGRATE_AUTO_CONVERGE),
        ):
            flags |= flag if wanted else 0
        parameters: dict[str, Any] = {
            libvirt.VIR_MIGRATE_PARAM_URI: request.migrate_uri,
            libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: mib(request.bandwidth_bytes) if request.bandwidth_bytes else None,
            libvirt.VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS: request.parallel,
        }
        parameters = {name: value for name, value in parameters.items() if value is not None}
        source = self._of(domain)
        with _translated():
            if request.direct:
                with contextlib.closing(_open(request.to)) as there:
                    moved = source.migrate3(there, parameters, flags)
            else:
                moved = source.migrateToURI3(request.to, parameters, flags | libvirt.VIR_MIGRATE_PEER2PEER)
        if moved is None or moved == -1:
            raise VmmError("libvirt gives no reason")
        if self._other is not None and not self._figures:
            with contextlib.suppress(libvirt.libvirtError):
                there = self._other.lookupByUUIDString(domain.uuid)
                self._take(there.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED))

    def postcopy(self, domain: Domain) -> None:
        """See `Client.postcopy`."""
        with _translated():
            self._of(domain).migrateStartPostCopy(0)

    def abort(self, domain: Domain) -> None:
        """See `Client.abort`."""
        with contextlib.suppress(VmmError, libvirt.libvirtError):
            self._of(domain).abortJob()

    def figures(self) -> dict[str, int]:
        """See `Client.figures`."""
        return self._figures

    def close(self) -> None:
        """See `Client.close`."""
        self._listener = None
        for connection in (self._other, self._connection):
            if connection is not None:
                with contextlib.suppress(libvirt.libvirtError):
                    connection.close()

    def _of(self, domain: Domain) -> Any:
        with _translated():
            return self._connection.lookupByUUIDString(domain.uuid)

    def _register(self, connection: Any, role: str, domain: Domain) -> None:
        """The destination has no such domain yet. So we receive events of all domains and filter them."""

        def pass_on(about: Any, event: Event) -> None:
            listener = self._listener
            if listener is not None and about.UUIDString() == domain.uuid:
                listener(role, event)

        def lifecycle(_c: Any, about: Any, event: int, _detail: int, _o: Any) -> None:
            if event in _LIFECYCLE:
                pass_on(about, Event(f"libvirt.{_LIFECYCLE[event]}"))

        def iteration(_c: Any, about: Any, number: int, _o: Any) -> None:
            pass_on(about, Event("libvirt.MIGRATION_ITERATION", number))

        def completed(_c: Any, about: Any, figures: dict[str, Any], _o: Any) -> None:
            if about.UUIDString() == domain.uuid:
                self._take(figures)

        def qemu(_c: Any, about: Any, event: str, seconds: int, micros: int, details: str | None, _o: Any) -> None:
            if event in _KEPT:
                pass_on(about, _qemu_event(event, seconds * 10**9 + micros * 1000, details))

        with _translated():
            for number, callback in (
                (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
                (libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION, iteration),
                (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, completed),
            ):
                connection.domainEventRegisterAny(None, number, callback, None)
            if libvirt_qemu is not None:
                with contextlib.suppress(libvirt.libvirtError):  # no QEMU
                    libvirt_qemu.qemuMonitorEventRegister(connection, None, None, qemu, None, 0)

    def _take(self, figures: dict[str, Any]) -> None:
        self._figures = {name: value for name, value in figures.items() if isinstance(value, int)}


def _qemu_event(event: str, wall_ns: int, details: str | None) -> Event:
    data: Any = {}
    with contextlib.suppress(ValueError):
        data = json.loads(details or "{}")
    if not isinstance(data, dict):
        data = {}
    name = f"qmp.{event}" + (f".{str(data.get('status', ''))[:64]}" if event == "MIGRATION" else "")
    number = data.get("pass", 0)
    return Event(name, number if isinstance(number, int) and number >= 0 else 0, wall_ns)


def _run_events() -> None:
    """libvirt's default event loop, once a process, in a thread that ends with it."""
    global _running  # noqa: PLW0603 - libvirt has one loop a process
    with _lock:
        if _running:
            return
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_loop, name="libvirt-events", daemon=True).start()
        _running = True


def _loop() -> None:
    while True:
        with contextlib.suppress(libvirt.libvirtError):
            libvirt.virEventRunDefaultImpl()


def _open(uri: str | None) -> Any:
    try:
        return libvirt.open(uri)
    except libvirt.libvirtError as error:
        at = f" at {uri}" if uri else ""
        raise VmmError(
            f"cannot connect to libvirt{at}: {' '.join(str(error).split())[:300]}",
            "check it with: virsh -c URI version",
        ) from error


class _translated(contextlib.ContextDecorator):  # noqa: N801 - used as a statement
    """libvirt's errors as ours."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, libvirt.libvirtError):
            raise error_of(str(error), error.get_error_code()) from error
