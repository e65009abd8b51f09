# SPDX-License-Identifier: Apache-2.0
"""Runs the marked integration tests in one emulated kernel, or in one user land on this machine's own kernel.

In: names of the catalogue. Out: a `Row` of results. An emulated kernel boots in two machines at a time, each with a
part of the tests. A machine that failed because of the emulator is booted once more, and the row records it.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from tests.vm.catalogue import ARM64, EMULATED, EMULATES, KERNELS, USERLANDS, Kernel, Userland, cache
from tests.vm.chroot import BuildError, bare_tree, overlay, packages_of, run, tree, versions
from tests.vm.images import ROOT, WITHOUT, Apt, KernelImage, kernel_image, root_image
from tests.vm.machine import Emulator, Outcome, arm64_emulator, boot, emulator, turn
from tests.vm.results import FAILED, PASSED, Row, Subject, plain_release, read_junit, read_property

MARKER = "everywhere"
TIMEOUT_S = 2700
HANDOVER = "tests/integration/test_handover.py"


@dataclass(frozen=True)
class Part:
    """A machine's share of the tests, by markers and files. An `idle` machine runs only while a CPU is otherwise
    unused.
    """

    name: str
    marked: str
    files: str
    idle: bool
    processors: int


PARTS = (
    Part("times", f"{MARKER} and times", "tests/integration", idle=False, processors=2),
    Part("others", f"{MARKER} and not times", f"tests/integration --ignore={HANDOVER}", idle=True, processors=1),
    Part("handover", MARKER, HANDOVER, idle=True, processors=1),
)
"""Two run at a time. Most of a test is one process that compiles, so one machine has work for one CPU."""


def _pytest(keyword: str, out: str, marked: str = MARKER, files: str = "tests/integration") -> str:
    chosen = f" -k {shlex.quote(keyword)}" if keyword else ""
    options = f"-p no:cacheprovider -v --color=no --timeout 900 --junitxml={out}/junit.xml"
    return f"-m {shlex.quote(marked)}{chosen} {options} {files}"


def prepared(kernel: Kernel, userland: Userland, processors: int) -> tuple[Emulator, KernelImage, Path]:
    """An emulator, a kernel and a root image of one architecture. Missing ones are made."""
    with turn(cache() / "images"):
        return _prepared(kernel, userland, processors)


def _prepared(kernel: Kernel, userland: Userland, processors: int) -> tuple[Emulator, KernelImage, Path]:
    if (kernel.architecture, userland.architecture) == ("arm64", "arm64"):
        helper = tree(USERLANDS[kernel.suite])
        return arm64_emulator(helper, processors), kernel_image(kernel, helper), root_image(userland)
    if kernel.architecture != userland.architecture:
        raise BuildError(f"{kernel.name} is {kernel.architecture}, {userland.name} is {userland.architecture}")
    built = [place for name in USERLANDS if (place := cache() / "tree" / name).exists()]
    chosen = emulator(built, processors)
    if chosen.processors < processors:
        chosen = emulator([tree(USERLANDS[EMULATES])], processors)
    return chosen, kernel_image(kernel, tree(userland)), root_image(userland)


def emulated(kernel: str, userland: str, keyword: str, processors: int) -> Row:
    """Runs the suite in an emulated kernel. A second run of the same kernel and user land waits for the first."""
    with turn(cache() / "runs" / f"{kernel}-{userland}") as place:
        return _emulated(kernel, userland, keyword, processors, place)


def _emulated(kernel: str, userland: str, keyword: str, processors: int, place: Path) -> Row:
    where, begin = EMULATED[userland], time.monotonic()
    emulating, image, root = prepared(KERNELS[kernel], where, processors)
    if where is ARM64:
        has = Apt(KERNELS[kernel].suite, where.architecture).versions(("python3", "python3-bpfcc"))
    else:
        has = packages_of(tree(where))
    row = Row(kernel, userland, "emulated", image.version, versions(has), _today())

    def run_part(part: Part) -> list[Outcome]:
        script = f"exec python3 -m pytest {_pytest(keyword, '/out', part.marked, part.files)}\n"
        machine = replace(emulating, wanted=min(processors, part.processors))
        begun = partial(boot, machine, image, root, ROOT, script, place=place / part.name, timeout_s=TIMEOUT_S)
        first = begun(idle=part.idle)
        return [first] if first.code is not None else [first, begun(idle=part.idle)]

    with ThreadPoolExecutor(2) as pool:
        for part, outcomes in zip(PARTS, pool.map(run_part, PARTS), strict=True):
            lost = [outcome.trouble for outcome in outcomes if outcome.code is None]
            row.infrastructure += [f"the emulator failed ({part.name}): {why}; tried once more" for why in lost]
            if not _collect(row, outcomes[-1].files):
                nothing = {part.name: f"{FAILED}: the machine with these tests has no results"}
                row.subjects.setdefault("other", Subject()).tests |= nothing
    row.seconds = round(time.monotonic() - begin)
    return row


def native(userland: str, keyword: str) -> Row:
    """Installs the product in a bare user land as the README says (`./try`, `./check`), on this machine's kernel.

    A second run of the same user land waits for the first.
    """
    with turn(cache() / "runs" / f"native-{userland}") as place:
        return _native(userland, keyword, place)


def _native(userland: str, keyword: str, place: Path) -> Row:
    begin = time.monotonic()
    bare = bare_tree(Userland(userland))
    shutil.rmtree(place, ignore_errors=True)
    (place / "out").mkdir(parents=True)
    shutil.copytree(ROOT, place / "src", ignore=WITHOUT, symlinks=True)
    release = plain_release(run("uname", "-r").strip())
    row = Row("own", userland, "native", release, {}, _today())
    script = (
        f"./try -o /out/demo.rec >/out/demo.txt || exit 1\n"
        "touch /out/installed\n"
        "dpkg-query -W -f '${Package} ${Version}\\n' qemu-system-x86 python3-bpfcc python3 >/out/versions\n"
        f"./check {_pytest(keyword, '/out')}\n"
    )
    with (place / "console.log").open("wb") as log:
        binds = {place / "src": "/src", place / "out": "/out"}
        command = overlay(bare, place, ["sh", "-c", script], binds=binds, cwd="/src")
        try:
            subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            row.infrastructure.append(f"no end within {TIMEOUT_S} s")
    if (place / "out/versions").exists():
        row.versions = versions((place / "out/versions").read_text())
    installed = (place / "out/installed").exists()
    _collect(row, place / "out")
    row.subjects["install"] = Subject({"./try": PASSED if installed else f"{FAILED}: see the run's console"})
    row.seconds = round(time.monotonic() - begin)
    return row


def _collect(row: Row, files: Path) -> bool:
    """Takes over the results of a pytest run. False if there are none."""
    junit = files / "junit.xml"
    if not junit.exists():
        return False
    for name, subject in read_junit(junit).items():
        row.subjects.setdefault(name, Subject()).tests |= subject.tests
    attach = read_property(junit, "attach")
    row.attach = row.attach or (_tiers(json.loads(attach)) if attach else "")
    row.slowness = max(row.slowness, float(read_property(junit, "slowness") or 1))
    return True


def _tiers(attach: dict[str, str]) -> str:
    """`{signal: tier}` inverted: the most frequent tier first and without its signals."""
    by_tier: dict[str, list[str]] = {}
    for signal, tier in sorted(attach.items()):
        by_tier.setdefault(tier, []).append(signal)
    ranked = sorted(by_tier.items(), key=lambda item: -len(item[1]))
    return "; ".join([ranked[0][0], *(f"{tier}: {', '.join(signals)}" for tier, signals in ranked[1:])])


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
