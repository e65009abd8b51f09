# SPDX-License-Identifier: Apache-2.0
"""VMMs in containers that podman made: its namespaces, control groups, seccomp filter and dropped capabilities.

The containers have no image: their root has a few empty directories and this host's /usr. The user is nobody, and
there is no network, so the migration goes over a UNIX socket, as between two pods of one node.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_mig.vmm.qemu.lab import find_binary
from tests.conftest import TRACING, requires
from tests.integration.shapes import OPTIONS, TOOLS, Tool, migrated_unix, pids
from tests.integration.test_exporter_container import PLAIN_CGROUPS
from tests.integration.test_shapes import UNIX, Contained

pytestmark = [requires(*TRACING, "podman", "private mount namespaces"), pytest.mark.timeout(180)]
NOBODY = 65534
NAMESPACES = ("pid", "net", "mnt", "ipc", "uts", "cgroup")
_FOLDERS = ("usr", "etc", "proc", "dev", "sys", "tmp")
_LINKS = ("bin", "sbin", "lib", "lib64")
_OPEN_KVM = "mount -t tmpfs none /mnt; mknod -m 666 /mnt/kvm c 10 232; mount --bind /mnt/kvm /dev/kvm; "
"""Whoever is in a container may open its /dev/kvm, as on hosts for VMs."""


@contextlib.contextmanager
def engine(place: Path) -> Iterator[str]:
    """The path of a program that runs QEMU in a new container. Removes the containers at the end."""
    root, script = place / "root", place / "qemu"
    for name in _FOLDERS:
        (root / name).mkdir(parents=True)
    for name in _LINKS:
        (root / name).symlink_to(f"usr/{name}")
    temporary = tempfile.gettempdir()
    podman = ["unshare", "--mount", "sh", "-c", _OPEN_KVM + PLAIN_CGROUPS, "sh", "podman"]
    command = [*podman, "run", "--network=none", f"--user={NOBODY}:{NOBODY}", "--device=/dev/kvm"]
    command += ["--cgroupns=private", "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"]
    command += ["--volume=/usr:/usr:ro", f"--volume={temporary}:{temporary}"]
    started = f'{shlex.join(command)} --cidfile "{place}/$$.cid" --rootfs {root} {find_binary(None)} "$@"'
    script.write_text(f"#!/bin/sh\nexec {started}\n")
    script.chmod(0o755)
    try:
        yield str(script)
    finally:
        for file in place.glob("*.cid"):
            remove = [*podman, "rm", "--force", "--time", "0", "--cidfile", str(file)]
            subprocess.run(remove, check=True, capture_output=True, timeout=60)


def namespaces(pid: int | str) -> dict[str, str]:
    return {name: str(Path(f"/proc/{pid}/ns/{name}").readlink()) for name in NAMESPACES}


@TOOLS
def test_vmms_in_an_engines_containers(tool: Tool, tmp_path: Path) -> None:
    with engine(tmp_path) as binary, Contained(UNIX, binary, OPTIONS) as pair:
        for pid in pids(pair):
            assert Path(f"/proc/{pid}").stat().st_uid == NOBODY
            assert not namespaces(pid).items() & namespaces("self").items(), "all of them are its own"
            assert "Seccomp:\t2\n" in Path(f"/proc/{pid}/status").read_text(), "a filter"
        migrated_unix(tool, pair, tmp_path)
