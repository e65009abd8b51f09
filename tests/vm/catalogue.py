# SPDX-License-Identifier: Apache-2.0
"""The kernels and user lands of the support table: their names, and the Debian suites that have them.

A kernel is what the suite's meta package `linux-image-cloud-amd64` points to: cloud kernels have NVMe, ext4 and
devtmpfs built in, so they boot without an initramfs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MIRROR = os.environ.get("EBPF_MIG_MIRROR", "http://deb.debian.org/debian")


@dataclass(frozen=True)
class Kernel:
    """A kernel to boot. `name` is its name on the command line and in the table."""

    name: str
    suite: str
    userland: str
    """The default user land: that of the kernel's own suite, if the product runs there."""
    architecture: str = "amd64"


@dataclass(frozen=True)
class Userland:
    """A Debian suite with its QEMU, bcc and Python."""

    name: str
    architecture: str = "amd64"


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("5.10", "bullseye", "bookworm"),
        Kernel("6.1", "bookworm", "bookworm"),
        Kernel("6.12", "trixie", "trixie"),
        Kernel("newest", "sid", "sid"),
        Kernel("arm64", "trixie", "trixie-arm64", "arm64"),
    )
}
USERLANDS = {userland.name: userland for userland in map(Userland, ("bookworm", "trixie", "sid"))}
"""User lands that this machine can run. Emulated kernels can also have others."""
EMULATES = "trixie"
"""Its QEMU emulates machines with two processors, if no other here does it reliably (see `machine.Emulator`)."""
ARM64 = Userland("trixie-arm64", "arm64")
EMULATED = USERLANDS | {ARM64.name: ARM64}


def cache() -> Path:
    """The directory of images: $XDG_CACHE_HOME/ebpf-mig/vmtest."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ebpf-mig" / "vmtest"


def arm64_btf() -> Path:
    """The file in which `python -m tests.vm arm64` keeps the type information of Debian's arm64 kernel."""
    return cache() / "arm64.btf"
