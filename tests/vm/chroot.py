# SPDX-License-Identifier: Apache-2.0
"""A Debian tree: built once by mmdebstrap, and entered with private mounts that end with the command.

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
ARM64_PACKAGES = (
    "bash,busybox-static,coreutils,dash,debianutils,grep,iproute2,kmod,libc-bin,mount,procps,python3,python3-bpfcc,"
    "qemu-system-arm,sed,util-linux"
)
"""Packages that are unpacked but not configured, so that none of their programs has to run here."""
UNUSED = ("doc", "man", "locale", "info")
VERSIONED = {"qemu-system-x86": "QEMU", "python3-bpfcc": "bcc", "python3": "Python"}
HOST_FILES = ("/etc/resolv.conf", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
"""This machine's configuration for reaching a package index, which the tree uses, too."""


class BuildError(Exception):
    """An image or tree could not be made. The message ends with the tool's last lines."""


def run(*command: str, timeout_s: float = 900, cwd: Path | None = None) -> str:
    """Runs a tool. Returns its stdout.

    Raises:
        BuildError: the tool failed or took too long.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=cwd)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise BuildError(f"`{shlex.join(command)[:300]}` failed with {done.returncode}:\n{tail}")
    return done.stdout


def inside(
    place: Path, command: Sequence[str], *, binds: Mapping[Path, str] | None = None, cwd: str = "/"
) -> list[str]:
    """The command line that runs `command` in a tree, with /dev, /proc, /sys and `binds` (from: to) in it."""
    return ["unshare", "--mount", "sh", "-c", "\n".join(["set -e", *_enter(str(place), command, binds or {}, cwd)])]


def overlay(
    place: Path, scratch: Path, command: Sequence[str], *, binds: Mapping[Path, str] | None = None, cwd: str = "/"
) -> list[str]:
    """Like `inside`, but files that the command writes go to `scratch` instead of the tree."""
    layers = [scratch / name for name in ("merged", "upper", "work")]
    for layer in layers:
        layer.mkdir(parents=True, exist_ok=True)
    merged, upper, work = map(str, layers)
    mount = f"mount -t overlay overlay -o lowerdir={place},upperdir={upper},workdir={work} {merged}"
    return ["unshare", "--mount", "sh", "-c", "\n".join(["set -e", mount, *_enter(merged, command, binds or {}, cwd)])]


def _enter(root: str, command: Sequence[str], binds: Mapping[Path, str], cwd: str) -> list[str]:
    """The shell lines that mount and enter the tree. Paths of the cache contain no blanks."""
    lines = [f"mount --rbind {source} {root}{source}" for source in ("/dev", "/sys")]
    lines += [f"mkdir -p {root}{target}\nmount --rbind {source} {root}{target}" for source, target in binds.items()]
    lines += [f"mount -t proc proc {root}/proc", f"mount -t tmpfs tmpfs {root}/run", f"mount -t tmpfs tmpfs {root}/tmp"]
    return [*lines, f"exec chroot {root} /bin/sh -c 'cd {cwd} && exec \"$@\"' sh {shlex.join(command)}"]


def tree(userland: Userland) -> Path:
    """The suite's tree with all packages that the product needs from the distribution."""
    if userland.architecture != "amd64":
        suite = userland.name.removesuffix(f"-{userland.architecture}")
        return _tree(userland.name, suite, ARM64_PACKAGES, "--variant=extract", "--architectures=arm64")
    return _tree(userland.name, userland.name, PACKAGES)


def bare_tree(userland: Userland) -> Path:
    """The suite as on a new machine: apt, and the certificates for reaching an index."""
    return _tree(f"{userland.name}-bare", userland.name, "ca-certificates")


def _tree(name: str, suite: str, packages: str, *kind: str) -> Path:
    """A tree. It is made if it is missing or was made from another list of packages."""
    place = cache() / "tree" / name
    stamp = place.with_suffix(".stamp")
    want = hashlib.sha256(packages.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == want:
        return place
    if shutil.which("mmdebstrap") is None:
        raise BuildError("mmdebstrap is missing: apt-get install mmdebstrap")
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    options = [f"--dpkgopt=path-exclude=/usr/share/{unused}/*" for unused in UNUSED]
    options.append('--aptopt=Acquire::Check-Valid-Until "false"')
    run(
        "mmdebstrap",
        "--mode=root",
        *(kind or ("--variant=apt",)),
        f"--include={packages}",
        *options,
        suite,
        str(fresh),
        MIRROR,
    )
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


def packages_of(place: Path) -> str:
    """The packages of a tree, as lines `package version`."""
    return run("chroot", str(place), "dpkg-query", "-W", "-f", "${Package} ${Version}\\n", *VERSIONED)


def versions(listing: str) -> dict[str, str]:
    """QEMU, bcc and Python by their upstream versions, from `package version` lines."""
    found = dict(line.split() for line in listing.splitlines())
    return {name: _upstream(found[package]) for package, name in VERSIONED.items() if package in found}


def _upstream(version: str) -> str:
    """`1:7.2+dfsg-7+deb12u18` is 7.2, `0.26.0+ds-1` is 0.26.0."""
    return version.rsplit(":", maxsplit=1)[-1].split("-", maxsplit=1)[0].split("+", maxsplit=1)[0]
