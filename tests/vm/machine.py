# SPDX-License-Identifier: Apache-2.0
"""Runs one emulated machine, and tells failures of the emulator from those of the product.

In: a kernel image, a root image, a script. Out: its exit code, its console, a folder with its files from /out.
Software emulation (TCG) with AMD's nested virtualisation: KVM, BPF and migrations inside are real, times are not.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ebpf_mig.linux.process import spawn
from tests.vm.catalogue import cache
from tests.vm.chroot import BuildError, inside, run
from tests.vm.images import Apt, KernelImage, read_results, results_image, source_image

MEMORY_MIB = 3072
NICE, IDLE = ("nice", "-n", "15"), ("chrt", "--idle", "0")
COMMAND_LINE = "root=PARTUUID=c0ffee01-01 rw init=/init panic=-1 mitigations=off nokaslr quiet loglevel=4"
MACHINES = {
    "amd64": (["-M", "q35", "-cpu", "EPYC,+svm,+npt,-cx16"], "console=ttyS0 tsc=reliable"),
    "arm64": (["-M", "virt,virtualization=on,gic-version=3", "-cpu", "neoverse-n1"], "console=ttyAMA0"),
}
"""By Debian's name of the architecture: QEMU's arguments for a machine in which KVM works, and kernel parameters."""
TROUBLE = re.compile(r"Oops: int3|soft lockup|Kernel panic|rcu: INFO: rcu.*stall|BUG: unable to handle")
END = re.compile(r"^EBPF-MIG-VM end (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """`code` is the script's exit code, None if the machine never printed one. `trouble` is the reason, from its
    console.
    """

    code: int | None
    trouble: str
    seconds: float
    console: Path
    files: Path


@dataclass(frozen=True)
class Emulator:
    """A QEMU: this machine's, or that of a tree, which is entered by chroot.

    QEMU before 10 can run stale code after the kernel has patched itself, if two emulated processors run in parallel.
    It gets only one processor.
    """

    major: int
    tree: Path | None
    wanted: int = 2
    binary: str = "qemu-system-x86_64"
    architecture: str = "amd64"

    @property
    def processors(self) -> int:
        """The number of processors: those wanted, or 1 if this QEMU is not reliable with more."""
        return self.wanted if self.major >= 10 else 1

    def command(self, arguments: list[str]) -> list[str]:
        """The whole command line. Image paths in `arguments` are in the cache."""
        command = [self.binary, *arguments]
        return command if self.tree is None else inside(self.tree, command, binds={cache(): str(cache())})


def emulator(trees: list[Path], processors: int = 2) -> Emulator:
    """The newest QEMU: this machine's or a tree's."""
    candidates: list[Emulator] = []
    if shutil.which("qemu-system-x86_64"):
        candidates.append(Emulator(_major(["qemu-system-x86_64", "--version"]), None))
    for tree in trees:
        (tree / str(cache()).lstrip("/")).mkdir(parents=True, exist_ok=True)
        candidates.append(Emulator(_major(inside(tree, ["qemu-system-x86_64", "--version"])), tree))
    if not candidates:
        raise BuildError("there is no qemu-system-x86_64: apt-get install qemu-system-x86")
    return replace(max(candidates, key=lambda found: found.major), wanted=processors)


def arm64_emulator(place: Path, processors: int) -> Emulator:
    """The QEMU of the tree's suite. Its package is unpacked beside the tree, and it runs with the tree's libraries."""
    (place / str(cache()).lstrip("/")).mkdir(parents=True, exist_ok=True)
    unpacked = cache() / "qemu-arm"
    binary = unpacked / "usr/bin/qemu-system-aarch64"
    if not binary.exists():
        (package,) = Apt(place.name).download(["qemu-system-arm"])
        run("dpkg-deb", "-x", str(package), str(unpacked))
    inner = [str(binary), "--version"]
    major = _major(inside(place, inner, binds={cache(): str(cache())}))
    return Emulator(major, place, processors, str(binary), "arm64")


def _major(command: list[str]) -> int:
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\d+)\.", said)
    return int(found.group(1)) if found else 0


def _arguments(emulated: Emulator, kernel: KernelImage, root: Path, place: Path) -> list[str]:
    machine, console_options = MACHINES[emulated.architecture]
    arguments = [
        "-accel", "tcg", "-smp", str(emulated.processors), *machine, "-m", str(MEMORY_MIB),
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none",
        "-serial", "stdio", "-kernel", str(kernel.vmlinuz), "-append", f"{console_options} {COMMAND_LINE}",
    ]  # fmt: skip
    disks = [
        (root, "snapshot=on,cache=unsafe"), (kernel.disk, "readonly=on"),
        (place / "tests.ext4", "readonly=on"), (place / "out.ext4", "cache=unsafe"),
    ]  # fmt: skip
    for number, (disk, options) in enumerate(disks):
        arguments += ["-drive", f"if=none,id=d{number},file={disk},format=raw,{options}"]
        arguments += ["-device", f"nvme,drive=d{number},serial=d{number}"]
    return arguments


@contextlib.contextmanager
def turn(place: Path) -> Iterator[Path]:
    """Waits until no other run of this user uses the folder `place`, which need not exist."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield place


def boot(
    emulated: Emulator,
    kernel: KernelImage,
    root: Path,
    source: Path,
    script: str,
    *,
    place: Path,
    timeout_s: float,
    more: Sequence[str] = (),
    idle: bool = False,
) -> Outcome:
    """Boots, runs `script` in a copy of `source`, and powers off. `place` is emptied first. `more`: arguments for QEMU.

    An `idle` machine runs only while a CPU is otherwise unused.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    source_image(source, place / "tests.ext4", script)
    results_image(place / "out.ext4")
    console = place / "console.log"
    begin = time.monotonic()
    trouble = ""
    with console.open("wb") as log:
        command = emulated.command([*_arguments(emulated, kernel, root, place), *more])
        process = spawn([*(IDLE if idle else NICE), *command], log, log)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            trouble = f"no end within {timeout_s:.0f} s"
        finally:
            process.kill()
            process.wait()
    said = console.read_text(errors="replace")
    found = END.search(said)
    if found is None:
        seen = TROUBLE.search(said)
        trouble = seen.group(0) if seen else trouble or "the console ends early"
    read_results(place / "out.ext4", place / "out")
    (place / "tests.ext4").unlink()
    (place / "out.ext4").unlink()
    return Outcome(int(found.group(1)) if found else None, trouble, time.monotonic() - begin, console, place / "out")
