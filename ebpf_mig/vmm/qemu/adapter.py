# SPDX-License-Identifier: Apache-2.0
"""The QEMU adapter: its options, its lab, its checks. See `vmm.adapter.Adapter`.

In: values of the command line. Out: `ADAPTER`. The QMP client is imported only on use.
"""

from __future__ import annotations

import contextlib
import itertools
import platform
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from ebpf_mig.errors import PreflightError, UsageError
from ebpf_mig.linux.check import OK, WARN, Check
from ebpf_mig.text import printable
from ebpf_mig.vmm.adapter import Adapter, FarEnd, Kind, Option, Values

if TYPE_CHECKING:
    from ebpf_mig.lab.netns import Link
    from ebpf_mig.lab.scenario import Scenario
    from ebpf_mig.vmm.base import Migration, RemoteEnd
    from ebpf_mig.vmm.witness import VmmWitness

DEFAULT_BINARY, PACKAGE = (
    ("qemu-system-aarch64", "qemu-system-arm")
    if platform.machine() == "aarch64"
    else ("qemu-system-x86_64", "qemu-system-x86")
)
_CPR_CHANNEL = re.compile(r"channel-type[\"']?\s*[:=]\s*[\"']?cpr\b")
NORMAL = "normal"
LIVE_UPDATES = ("cpr-transfer", "cpr-exec")
"""Modes that hand the guest to a new program on the same host (MigMode in qapi/migration.json)."""
_SCHEMES = ("tcp", "unix", "vsock", "rdma")
"""Transports whose URI means the same to both ends. `exec:` and `file:` have no other end, `fd:` has two."""


class QemuAdapter(Adapter):
    """QEMU by QMP."""

    name = "qemu"
    title = "QEMU"
    comms = ("qemu", "kvm")
    """`kvm` is the program's name in Red Hat's packages and the name that Proxmox gives."""
    plain_files = False
    """Its channels use vectors (io/channel-file.c), its disk images preadv(2), pwritev(2), pread(2), pwrite(2)
    (block/file-posix.c, 7.2 to 11.1).
    """
    about = "Migrate a QEMU VM through QMP."
    options = (
        Option("--source", "QMP socket of the VM to migrate.", metavar="SOCKET", required=True),
        Option("--destination", "QMP socket of the destination VM; not for cpr-exec.", metavar="SOCKET"),
        Option(
            "--uri",
            "Where the destination listens: tcp:HOST:PORT, unix:PATH or vsock:CID:PORT; for cpr-exec file:PATH.",
            required=True,
        ),
        Option("--multifd", "Send memory over this many channels.", Kind.COUNT, most=255),
        Option("--downtime-limit", "Set QEMU's downtime-limit, e.g. 300ms.", Kind.DURATION),
        Option("--bandwidth", "Set QEMU's max-bandwidth, e.g. 10Gbit; 0: unlimited.", Kind.RATE),
        Option("--postcopy", "Switch to postcopy after the second pass.", Kind.FLAG),
        Option("--mode", "cpr-*: live update on this host.", Kind.CHOICE, choices=(NORMAL, *LIVE_UPDATES)),
        Option("--cpr-uri", "Where the new QEMU waits for descriptors (cpr-transfer).", metavar="unix:PATH"),
        Option("--exec-command", "Command of the new QEMU (cpr-exec). Default: the source's own.", metavar="COMMAND"),
    )
    examples: ClassVar = {
        "migrate": (
            "ebpf-mig migrate qemu --source a.qmp --destination b.qmp \\",
            "    --uri tcp:127.0.0.1:4444",
            "ebpf-mig migrate qemu --source a.qmp --destination b.qmp \\",
            "    --uri unix:/run/m.sock --multifd 4",
            "ebpf-mig migrate qemu --source a.qmp --mode cpr-exec --uri file:a.state",
        ),
    }
    epilog = """The destination is a QEMU started like the source, plus -incoming defer. Each
needs a QMP socket of its own: -qmp unix:PATH,server=on,wait=off"""
    has_lab = True

    @property
    def witness(self) -> VmmWitness:
        """See `Adapter.witness`."""
        from ebpf_mig.vmm.qemu.witness import WITNESS

        return WITNESS

    def connect(self, values: Values, remote: tuple[str, RemoteEnd] | None = None) -> Migration:
        """See `Adapter.connect`."""
        from ebpf_mig.vmm.qemu.migration import QemuMigration, QemuOptions

        _require_fitting(values)
        if values["mode"] != NORMAL:
            return _live_update(values)
        scheme, colon, _ = values["uri"].partition(":")
        if not colon or scheme not in _SCHEMES:
            why = f"{printable(values['uri'], 80)} is no URI through which one QEMU can reach another"
            raise UsageError(
                why, f"give --uri as one of {', '.join(f'{s}:' for s in _SCHEMES)}; watch others with record"
            )
        if scheme == "vsock":
            # The kernel loads vsock for the first such socket. QEMU makes it when the probes are chosen already.
            with contextlib.suppress(OSError):
                socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
        limit = values["downtime_limit"]
        options = QemuOptions(
            values["bandwidth"], None if limit is None else limit // 10**6, values["multifd"], values["postcopy"]
        )
        return QemuMigration(values["source"], values["destination"], values["uri"], options, remote)

    def far_end(self, role: str, values: Values) -> FarEnd:
        """See `Adapter.far_end`."""
        if values["mode"] != NORMAL:
            raise UsageError(f"{values['mode']} hands the guest over on one host", "leave the other host out")
        if not values[role]:
            raise UsageError("--destination is missing", "give the destination's QMP socket")
        return FarEnd(["--api-socket", values[role]], values[role])

    @contextlib.contextmanager
    def lab(
        self, scenario: Scenario, binary: str | None = None, *, local: bool = False, link: Link | None = None
    ) -> Iterator[tuple[Migration, list[str]]]:
        """See `Adapter.lab`."""
        from ebpf_mig.vmm.qemu.lab import QemuPair
        from ebpf_mig.vmm.qemu.migration import QemuMigration

        if local:
            raise UsageError("QEMU cannot hand memory over here", "leave --local out, or choose another VMM with --vmm")
        with QemuPair(scenario, binary, link=link) as pair:
            migration = QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options())
            with contextlib.closing(migration):
                yield migration, []

    def awaits_vm(self, arguments: Sequence[str]) -> bool:
        """QEMU has its VM from the start, unless it waits for the descriptors of its memory."""
        return self.awaits_live_update(arguments)

    def awaits_live_update(self, arguments: Sequence[str]) -> bool:
        """A destination of mode cpr-transfer has an incoming channel of type `cpr` (docs/devel/migration/CPR.rst)."""
        return any(_CPR_CHANNEL.search(value) for value in incoming(arguments))

    def checks(self) -> Iterator[Check]:
        """Which QEMU the lab would use."""
        from ebpf_mig.vmm.qemu.lab import find_binary

        try:
            path = find_binary(None)
        except PreflightError as error:
            yield Check("QEMU", WARN, "not found; needed by demo only", error.remedy or "")
            return
        run = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", check=False, timeout=30
        )
        first = (run.stdout.splitlines() or ["unknown version"])[0]
        yield Check("QEMU", OK, first.removeprefix("QEMU emulator "))

    def process_behind(self, path: str) -> int | None:
        """Asks QMP, because libvirt creates the socket for QEMU."""
        import asyncio

        from ebpf_mig.vmm.qemu.monitor import pid_behind

        return asyncio.run(pid_behind(path))


def incoming(arguments: Sequence[str]) -> list[str]:
    """The values of `-incoming` in a command line."""
    return [value for option, value in itertools.pairwise(arguments) if option.lstrip("-") == "incoming"]


_NEEDED = {NORMAL: ("destination",), "cpr-transfer": ("destination", "cpr_uri"), "cpr-exec": ()}
_ALLOWED = {
    NORMAL: {"multifd", "downtime_limit", "bandwidth", "postcopy", "destination"},
    "cpr-transfer": {"destination", "cpr_uri"},
    "cpr-exec": {"exec_command"},
}


def _require_fitting(values: Values) -> None:
    """UsageError if an option that the mode needs is missing, or one was given that has no meaning in it."""
    mode = values["mode"]
    for option in _NEEDED[mode]:
        if not values[option]:
            raise UsageError(f"--mode {mode} needs {_typed(option)}", "see ebpf-mig migrate qemu --help")
    for option in sorted(set().union(*_ALLOWED.values()) - _ALLOWED[mode]):
        if values[option] not in (None, False):
            raise UsageError(f"{_typed(option)} has no meaning with --mode {mode}", "leave it out")


def _typed(option: str) -> str:
    return "--" + option.replace("_", "-")


def _live_update(values: Values) -> Migration:
    from ebpf_mig.vmm.qemu.live_update import CprExec, CprTransfer

    if values["mode"] == "cpr-transfer":
        scheme, _, channel = values["cpr_uri"].partition(":")
        if scheme != "unix" or not channel:
            raise UsageError("descriptors pass only through a UNIX socket", "give --cpr-uri as unix:PATH")
        return CprTransfer(values["source"], values["destination"], values["uri"], channel)
    if not values["uri"].startswith("file:"):
        raise UsageError(f"--uri {printable(values['uri'], 80)} cannot hold the state meanwhile", "use file:PATH")
    try:
        command = shlex.split(values["exec_command"] or "")
    except ValueError as error:
        raise UsageError(f"--exec-command is no command: {error}", "quote it as for a shell") from error
    if command and not incoming(command):
        raise UsageError("--exec-command has no -incoming", f"add -incoming {printable(values['uri'], 80)}")
    return CprExec(values["source"], values["uri"], command)


ADAPTER = QemuAdapter()
