# SPDX-License-Identifier: Apache-2.0
"""A Debian tree: built once by mmdebstrap, entered with private mounts that end with the command.

In: a suite's name. Out: a directory, and command lines that run in it. Needs root and mmdebstrap.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.vm.catalogue import MIRROR, Userland, cache

PACKAGES = (
    "ca-certificates,busybox-static,kmod,mount,procps,iproute2,gcc,libc6-dev,git,python3-venv,python3-bpfcc,bpftrace,"
    "qemu-system-x86"
)
UNUSED = ("doc", "man", "locale", "info")
HOST_FILES = ("/etc/resolv.conf", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
"""How this machine reaches its package index: the tree uses the same."""


class BuildError(Exception):
    """An image or tree could not be made; the message ends with the tool's own last lines."""


def run(*command: str, timeout_s: float = 900, cwd: Path | None = None) -> str:
    """Stdout of a tool.

    Raises:
        BuildError: it failed or took too long.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=cwd)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise BuildError(f"`{shlex.join(command)[:300]}` failed with {done.returncode}:\n{tail}")
    return done.stdout


def inside(tree: Path, command: Sequence[str], *, binds: Mapping[Path, str] | None = None, cwd: str = "/") -> list[str]:
    """The command line that runs `command` in the tree: own mount namespace, /dev, /proc, /sys and `binds` (host path -> there)."""
    mounts = [(Path("/dev"), "/dev"), (Path("/sys"), "/sys"), *(binds or {}).items()]
    script = ["set -e", "mount --make-rprivate /"]
    for source, target in mounts:
        script.append(f"mount --rbind {shlex.quote(str(source))} {shlex.quote(str(tree) + target)}")
    script += [
        f"mount -t proc proc {tree}/proc",
        f"mount -t tmpfs tmpfs {tree}/run",
        f"mount -t tmpfs tmpfs {tree}/tmp",
        f'exec chroot {shlex.quote(str(tree))} /bin/sh -c \'cd "$0" && exec "$@"\' {shlex.quote(cwd)} {shlex.join(command)}',
    ]
    return ["unshare", "--mount", "sh", "-c", "\n".join(script)]


def tree(userland: Userland) -> Path:
    """The suite's tree, made if it is missing or was made from another list of packages."""
    place = cache() / "tree" / userland.name
    stamp = place.with_suffix(".stamp")
    want = hashlib.sha256(PACKAGES.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == want:
        return place
    if shutil.which("mmdebstrap") is None:
        raise BuildError("mmdebstrap is missing: apt-get install mmdebstrap")
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    excludes = [f"--dpkgopt=path-exclude=/usr/share/{unused}/*" for unused in UNUSED]
    valid = ['--aptopt=Acquire::Check-Valid-Until "false"']
    run("mmdebstrap", "--mode=root", "--variant=apt", f"--include={PACKAGES}", *excludes, *valid,
        userland.name, str(fresh), MIRROR)  # fmt: skip
    for file in map(Path, HOST_FILES):
        if file.exists():
            target = fresh / file.relative_to("/")
            target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    shutil.rmtree(place, ignore_errors=True)
    fresh.rename(place)
    stamp.write_text(want)
    return place


def versions(place: Path) -> dict[str, str]:
    """What the tree has: QEMU, bcc and Python by their upstream versions."""
    script = "dpkg-query -W -f '${Package} ${Version}\\n' qemu-system-x86 python3-bpfcc python3"
    found = dict(line.split() for line in run("chroot", str(place), "/bin/sh", "-c", script).splitlines())
    names = {"qemu-system-x86": "QEMU", "python3-bpfcc": "bcc", "python3": "Python"}
    return {name: _upstream(found[package]) for package, name in names.items()}


def _upstream(version: str) -> str:
    """`1:7.2+dfsg-7+deb12u18` is 7.2, `0.26.0+ds-1` is 0.26.0."""
    return version.split(":")[-1].split("-")[0].split("+")[0]
