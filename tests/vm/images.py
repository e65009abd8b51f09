# SPDX-License-Identifier: Apache-2.0
"""The disks of an emulated machine, made from Debian packages and cached.

Root image: a user land's tree with the product's Python dependencies and a first process. Kernel image: vmlinuz
beside its modules. Tests image: a source tree, made anew for each run. Needs root, dpkg-deb, e2fsprogs.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.vm.catalogue import MIRROR, Kernel, Userland, arm64_btf, cache
from tests.vm.chroot import BuildError, inside, run, tree

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
DISK_SIGNATURE = 0xC0FFEE01
"""From Linux 6.12 on NVMe disks are numbered in random order. The kernel finds its root by this; the others have
labels.
"""
WITHOUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "*.img", ".hypothesis")
BTF_BEGIN = b"\x9f\xeb\x01\x00" + struct.pack("<I", 24)
"""struct btf_header up to hdr_len (include/uapi/linux/btf.h)."""
EXTRAS = ("pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100")


@dataclass(frozen=True)
class KernelImage:
    """`version` is uname's release, `package` the Debian version of the package."""

    version: str
    package: str
    vmlinuz: Path
    disk: Path


def root_image(userland: Userland) -> Path:
    """A bootable disk with the user land and /venv, which has the dependencies in pyproject.toml."""
    place = tree(userland)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *EXTRAS]
    first = (ROOT / "tests/vm/guest/init").read_text()
    key = hashlib.sha256("\n".join([*wanted, first, place.with_suffix(".stamp").read_text()]).encode()).hexdigest()[:16]
    image = cache() / f"root-{userland.name}-{key}.img"
    if image.exists():
        return image
    for old in cache().glob(f"root-{userland.name}-*.img"):
        old.unlink()
    if userland.architecture == "amd64":
        run(*inside(place, ["python3", "-m", "venv", "--clear", "--system-site-packages", "/venv"]))
        run(*inside(place, ["/venv/bin/pip", "install", "--quiet", *wanted]))
    else:
        _foreign_venv(place, wanted)
    init = place / "init"
    init.write_text(first)
    init.chmod(0o755)
    for mount in ("kern", "tests", "out"):
        (place / mount).mkdir(exist_ok=True)
    fresh = image.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    size = MIB * 2600
    with fresh.open("wb") as disk:
        disk.truncate(size)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", f"offset={MIB}", "-d", str(place), str(fresh),
        f"{(size - MIB) // 1024}k")  # fmt: skip
    with fresh.open("r+b") as disk:
        disk.write(_boot_record(size))
    fresh.rename(image)
    return image


def _foreign_venv(place: Path, wanted: list[str]) -> None:
    """Makes the same as `venv` and `pip` without running a program of the tree, for arm64."""
    python = next((place / "usr/bin").glob("python3.[0-9]*"))
    version, site = python.name.removeprefix("python"), place / "venv/lib" / python.name / "site-packages"
    shutil.rmtree(place / "venv", ignore_errors=True)
    (place / "venv/bin").mkdir(parents=True)
    (place / "venv/bin/python3").symlink_to(f"/usr/bin/{python.name}")
    (place / "venv/pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = true\nversion = {version}\n"
    )
    kinds = [f"--platform={kind}_aarch64" for kind in ("manylinux2014", "manylinux_2_17", "manylinux_2_28")]
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site), *kinds, "--implementation=cp",
        f"--python-version={version}", "--only-binary=:all:", *wanted)  # fmt: skip
    if not (place / "usr/bin/sh").exists():
        (place / "usr/bin/sh").symlink_to("dash")


def _boot_record(size: int) -> bytes:
    """An MBR with one partition from 1 MiB to the end. Its PARTUUID is the disk's signature and `-01`."""
    sectors = (size - MIB) // 512
    entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", MIB // 512, sectors)
    return bytes(440) + struct.pack("<IH", DISK_SIGNATURE, 0) + entry + bytes(48) + b"\x55\xaa"


class Apt:
    """A private apt for one suite. The machine's lists, status and sources are neither read nor changed."""

    def __init__(self, suite: str, architecture: str = "amd64") -> None:
        """Fetches the suite's list of packages, and of its security updates if it has any."""
        self.place = cache() / "apt" / f"{suite}-{architecture}"
        self.meta = f"linux-image-cloud-{architecture}"
        for folder in ("lists/partial", "debs/partial"):
            (self.place / folder).mkdir(parents=True, exist_ok=True)
        (self.place / "status").touch()
        sources = [f"deb {MIRROR} {suite} main"]
        if suite != "sid":
            sources.append(f"deb {MIRROR}-security {suite}-security main")
        (self.place / "sources.list").write_text("\n".join(sources) + "\n")
        self.options = [
            f"-oDir::Etc::sourcelist={self.place}/sources.list", "-oDir::Etc::sourceparts=/dev/null",
            f"-oDir::State::lists={self.place}/lists", f"-oDir::State::status={self.place}/status",
            f"-oDir::Cache::archives={self.place}/debs", "-oDir::Cache::pkgcache=", "-oDir::Cache::srcpkgcache=",
            "-oAPT::Sandbox::User=root", "-oDebug::NoLocking=1", "-oAcquire::Check-Valid-Until=false",
            f"-oAPT::Architecture={architecture}", f"-oAPT::Architectures={architecture}",
        ]  # fmt: skip
        run("apt-get", *self.options, "-qq", "update")

    def kernel_packages(self) -> list[str]:
        """The packages behind the meta package: one, or several if vmlinuz and modules are packaged separately."""
        options = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
        found = run("apt-cache", *self.options, "depends", "--recurse", *options, self.meta).splitlines()
        kinds = ("linux-image-", "linux-binary-", "linux-modules-", "linux-base-")
        return sorted(name for name in found if name.startswith(kinds) and name != self.meta)

    def versions(self, packages: Iterable[str]) -> str:
        """The suite's versions of the packages, as lines `package version`."""
        said = run("apt-cache", *self.options, "show", "--no-all-versions", *packages)
        found = re.findall(r"^Package: (\S+)$.*?^Version: (\S+)$", said, re.MULTILINE | re.DOTALL)
        return "".join(f"{package} {version}\n" for package, version in found)

    def download(self, packages: list[str]) -> list[Path]:
        """Downloads the packages. Returns their files."""
        run("apt-get", *self.options, "-qq", "download", *packages, cwd=self.place / "debs")
        return [max((self.place / "debs").glob(f"{name}_*.deb"), key=lambda p: p.stat().st_mtime) for name in packages]


def kernel_image(kernel: Kernel, helper: Path) -> KernelImage:
    """Makes the kernel image and the disk with its modules. `helper` is any tree with kmod."""
    apt = Apt(kernel.suite, kernel.architecture)
    debs = apt.download(apt.kernel_packages())
    package = debs[0].name.split("_")[1]
    place = cache() / f"kernel-{kernel.name}"
    stamp = place / "stamp"
    want = " ".join(deb.name for deb in debs)
    if not (stamp.exists() and stamp.read_text() == want):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        with tempfile.TemporaryDirectory(dir=cache()) as temporary:
            _unpack_kernel(debs, Path(temporary), place, helper)
        stamp.write_text(want)
    return KernelImage((place / "version").read_text(), package, place / "vmlinuz", place / "kern.ext4")


def _unpack_kernel(debs: list[Path], files: Path, place: Path, helper: Path) -> None:
    for deb in debs:
        run("dpkg-deb", "-x", str(deb), str(files))
    found = sorted(files.glob("lib/modules/*")) or sorted(files.glob("usr/lib/modules/*"))
    modules = found[0]
    vmlinuz = next(iter([*files.glob("boot/vmlinuz-*"), *modules.glob("vmlinuz")]))
    shutil.copy(vmlinuz, place / "vmlinuz")
    stage = files / "stage"
    (stage / "lib/modules").mkdir(parents=True)
    modules.rename(stage / "lib/modules" / modules.name)
    run(*inside(helper, ["depmod", "-b", "/mnt", modules.name], binds={stage: "/mnt"}))
    _filled(stage, place / "kern.ext4", "kern", "400M")
    (place / "version").write_text(modules.name)


def fetch_arm64_btf(suite: str = "trixie") -> str:
    """Keeps the type information of the suite's arm64 kernel for the unit tests. Returns the kernel's release."""
    apt = Apt(suite, "arm64")
    with tempfile.TemporaryDirectory(dir=cache()) as temporary:
        for deb in apt.download(apt.kernel_packages()):
            run("dpkg-deb", "-x", str(deb), temporary)
        kernel = next(Path(temporary).glob("**/vmlinuz*"))
        image = kernel.read_bytes()
        at = image.find(BTF_BEGIN)
        if at < 0:
            raise BuildError(f"{kernel.name} shows no BTF: it is compressed")
        _, types, strings_at, strings = struct.unpack_from("<4I", image, at + len(BTF_BEGIN))
        if types < MIB:
            raise BuildError(f"{kernel.name} has no BTF at the expected place")
        arm64_btf().write_bytes(image[at : at + len(BTF_BEGIN) + 16 + strings_at + strings])
        return kernel.name.removeprefix("vmlinuz-")


def source_image(source: Path, image: Path, script: str) -> None:
    """A disk with the source tree in /src and `script` in /script, which the machine runs."""
    with tempfile.TemporaryDirectory(dir=cache()) as temporary:
        stage = Path(temporary)
        shutil.copytree(source, stage / "src", ignore=WITHOUT, symlinks=True)
        (stage / "script").write_text(script)
        _filled(stage, image, "tests", "256M")


def _filled(stage: Path, image: Path, label: str, size: str) -> None:
    """Makes a disk with the files of `stage`."""
    run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-L", label, "-d", str(stage), str(image), size)


def results_image(image: Path) -> None:
    """Makes an empty disk for the machine's results."""
    image.unlink(missing_ok=True)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-L", "out", str(image), "64M")


def read_results(image: Path, into: Path) -> None:
    """Copies the machine's results from the disk."""
    into.mkdir(parents=True, exist_ok=True)
    run("debugfs", "-R", f"rdump / {into}", str(image))
