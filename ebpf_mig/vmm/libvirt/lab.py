# SPDX-License-Identifier: Apache-2.0
"""Two libvirt hosts on this machine, and a domain with the tiny guest on the first.

In: a `Scenario`. Out: URIs of both hosts, the domain's name, where to migrate to. Each libvirtd runs without systemd or
dbus in mount, UTS, network and pid namespaces of its own, with state of its own. libvirt tells hosts apart by
`host_uuid` alone (virHostUUID, since 4.3). When the first process of a pid namespace ends, the kernel
ends all others in it. So libvirtd and its QEMUs end when we do.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from ebpf_mig.errors import PreflightError, VmmError
from ebpf_mig.lab.netns import ADDRESSES, Link
from ebpf_mig.lab.scenario import MIB, Scenario, require_x86
from ebpf_mig.linux.process import private_directory, spawn, stop
from ebpf_mig.vmm.qemu.lab import find_binary

NAME = "ebpf-mig-demo"
NEEDS = {
    "libvirtd": "libvirt-daemon-system", "virsh": "libvirt-clients", "qemu-system-x86_64": "qemu-system-x86",
    "unshare": "util-linux",
}  # fmt: skip
"""Required programs, and their Debian packages."""
_START_S = 30.0
_OWN = ("run", "var/lib/libvirt", "var/log/libvirt", "var/cache/libvirt", "etc/libvirt")
"""Directories that are private to each host."""
_FAST_FIRMWARE = Path("/usr/share/qemu/qboot.rom")
_HOST = """
set -e
mount --make-rprivate /
hostname "$2"
for d in run var/lib/libvirt var/log/libvirt var/cache/libvirt etc/libvirt; do mount --bind "$1/$d" "/$d"; done
mkdir -p /run/libvirt /var/lib/libvirt/qemu
mount --bind "$1/hosts" /etc/hosts
libvirtd --listen &
wait
"""
"""Runs as the first process of a host, and reaps orphans."""
_DAEMON = """listen_tls = 0
listen_tcp = 1
listen_addr = "{address}"
auth_tcp = "none"
auth_unix_rw = "none"
host_uuid = "{uuid}"
log_outputs = "1:file:/var/log/libvirt/libvirtd.log"
log_filters = "3:*"
"""
_QEMU = """user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
remember_owner = 0
stdio_handler = "file"
migration_host = "{address}"
migration_address = "{address}"
"""


@dataclass
class Host:
    """One of the two."""

    role: str
    directory: Path
    address: str
    process: subprocess.Popen[bytes]

    @property
    def uri(self) -> str:
        """Its URI from outside its namespaces."""
        return f"qemu:///system?socket={self.directory}/run/libvirt/libvirt-sock"

    @property
    def uri_between(self) -> str:
        """Its URI from the other host."""
        return f"qemu+tcp://{self.address}/system"

    def last_line(self) -> str:
        """The last line that it, or what started it, wrote."""
        for name in ("var/log/libvirt/libvirtd.log", "out"):
            with contextlib.suppress(OSError):
                lines = (self.directory / name).read_text(errors="replace").strip().splitlines()
                if lines:
                    return lines[-1]
        return "it wrote nothing"


def require_programs() -> None:
    """PreflightError with the packages to install if a program is missing."""
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    missing = {
        name: package for name, package in NEEDS.items() if not (shutil.which(name) or shutil.which(name, path=path))
    }
    if missing:
        raise PreflightError(
            f"no {', '.join(missing)} found", f"apt-get install {' '.join(sorted(set(missing.values())))}"
        )


class LibvirtHosts:
    """Both hosts, and the domain on the source. They start on entering the context and end on leaving it."""

    def __init__(self, scenario: Scenario, binary: str | None = None) -> None:
        """`binary`: the QEMU that libvirt starts."""
        require_x86("libvirt")
        require_programs()
        self.scenario = scenario
        self._binary = find_binary(binary)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> LibvirtHosts:
        with contextlib.ExitStack() as guard:
            self._stack = guard
            directory = guard.enter_context(private_directory())
            link = guard.enter_context(Link())
            guest = directory / "guest.elf"
            guest.write_bytes(self.scenario.guest())
            self._serial = directory / "serial"
            self.source = self._start("source", directory, link)
            self.destination = self._start("destination", directory, link)
            for host in (self.source, self.destination):
                self._wait_for(host)
            self._create(directory, guest)
            self._wait_for_guest()
            self._stack = guard.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, role: str, parent: Path, link: Link) -> Host:
        directory, address = parent / role, ADDRESSES[role]
        for name in _OWN:
            (directory / name).mkdir(parents=True)
        shutil.copytree("/etc/libvirt", directory / "etc/libvirt", dirs_exist_ok=True, symlinks=True)
        number = list(ADDRESSES).index(role) + 1
        uuid = f"0000000{number}-1111-4222-8333-44444444444{number}"
        (directory / "etc/libvirt/libvirtd.conf").write_text(_DAEMON.format(address=address, uuid=uuid))
        (directory / "etc/libvirt/qemu.conf").write_text(_QEMU.format(address=address))
        names = "".join(f"{at} {name}\n" for name, at in ADDRESSES.items())
        (directory / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        command = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (directory / "out").open("wb") as out:
            with link.inside(role):
                process = spawn([*command, "sh", "-c", _HOST, "sh", str(directory), role], out, out)
            self._stack.callback(stop, process)
        return Host(role, directory, address, process)

    def _wait_for(self, host: Host) -> None:
        deadline = time.monotonic() + _START_S
        while _virsh(host, "version").returncode:
            if host.process.poll() is not None or time.monotonic() > deadline:
                raise VmmError(f"libvirtd of the lab's {host.role} does not answer: {host.last_line()}")
            time.sleep(0.05)

    def _create(self, directory: Path, guest: Path) -> None:
        path = directory / "domain.xml"
        path.write_text(self._xml(guest))
        run = _virsh(self.source, "create", str(path))
        if run.returncode:
            raise VmmError(f"libvirt does not start the lab's domain: {' '.join(run.stderr.split())}")

    def _xml(self, guest: Path) -> str:
        s = self.scenario
        loader = f"<loader type='rom'>{_FAST_FIRMWARE}</loader>" if _FAST_FIRMWARE.exists() else ""
        ring = f"<kvm><dirty-ring state='on' size='{s.dirty_ring}'/></kvm>" if s.dirty_ring else ""
        return f"""<domain type='kvm'>
  <name>{NAME}</name>
  <memory unit='MiB'>{s.memory_bytes // MIB}</memory>
  <vcpu>{s.vcpus}</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>{loader}<kernel>{escape(str(guest))}</kernel></os>
  <features><acpi/>{ring}</features>
  <devices>
    <emulator>{escape(self._binary)}</emulator>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='{escape(str(self._serial))}' append='on'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""

    def _wait_for_guest(self) -> None:
        """Waits until every vCPU of the guest has written its letter."""
        letters = {chr(ord("A") + index) for index in range(self.scenario.vcpus)}
        deadline = time.monotonic() + _START_S + 2 * self.scenario.fill_s()
        beats = ""
        while not letters <= set(beats):
            if time.monotonic() > deadline:
                raise VmmError(
                    f"the guest did not come up: {len(set(beats) & letters)} of {len(letters)} vCPUs "
                    "wrote to the serial port"
                )
            time.sleep(0.02)
            with contextlib.suppress(OSError):
                beats = self._serial.read_text(errors="replace")


def _virsh(host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["virsh", "-q", "-c", host.uri, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_START_S,
        )
    except subprocess.TimeoutExpired as error:
        raise VmmError(f"libvirtd of the lab's {host.role} does not answer within {_START_S:.0f} s") from error
