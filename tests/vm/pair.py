# SPDX-License-Identifier: Apache-2.0
"""A real migration between two emulated machines that are connected by a wire.

In: two kernels, the wire's delay. Out: a `Meeting`: both machines' recordings, and the instants at which the outer host
received bytes of the guest's serial port from either side. There are two kernels and two clocks. The outer host's clock
is the witness.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.joining.merge import read_both
from tests.vm.catalogue import KERNELS, USERLANDS, cache
from tests.vm.chroot import BuildError, tree
from tests.vm.images import ROOT, kernel_image, root_image
from tests.vm.machine import Outcome, boot, emulator

DATA = ROOT / "tests" / "data" / "machines"
ROLES = ("source", "destination")
TIMEOUT_S = 540
NEAR_NS = 1_000_000_000
"""Beats this near to the blackout are used for the guest's period."""
READINGS_NS = 5_000_000_000
"""Readings of a machine's clock this near to an instant are used for its offset to ours."""


class Ear:
    """Receives from a machine's second serial port, with the outer host's clock."""

    def __init__(self, path: Path) -> None:
        self.beats: list[int] = []
        """Arrival of each beat of the guest, ns."""
        self.readings: list[tuple[int, int]] = []
        """(reading of the machine's clock, its arrival), ns."""
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        connection, _ = self._listener.accept()
        rest = b""
        while data := connection.recv(256):
            rest = self.take(rest + data, time.monotonic_ns())

    def take(self, data: bytes, now: int) -> bytes:
        """Takes received bytes. Returns the rest that is not yet a whole reading."""
        self.beats += [now] * data.count(b"A")
        for reading in re.finditer(rb"C(\d+);", data := data.replace(b"A", b"")):
            self.readings.append((int(reading[1]), now))
        return data[data.rfind(b";") + 1 :]

    def behind(self, around: int) -> tuple[int, int]:
        """(outer clock minus the machine's clock near an instant, spread of the fastest readings), ns."""
        found = sorted(heard - shown for shown, heard in self.readings if abs(heard - around) <= READINGS_NS)
        if len(found) < 3:
            raise ValueError(f"{len(found)} readings of a machine's clock")
        return found[0], found[len(found) // 4] - found[0]


@dataclass(frozen=True)
class Heard:
    """The outer host's measurements, by its own clock."""

    silent_ns: int
    """Time between the last beat from the source and the first from the destination."""
    period_ns: int
    """The longest time between two other beats nearby."""
    ahead_ns: int
    """How far the destination's clock was ahead of the source's, by the readings that both sent."""
    doubt_ns: int


def listened(source: Ear, destination: Ear) -> Heard:
    """The measurements of both sides. ValueError if one of them received too little."""
    if len(source.beats) < 2 or len(destination.beats) < 2:
        raise ValueError(f"{len(source.beats)} beats from the source, {len(destination.beats)} from the destination")
    last, first = source.beats[-1], destination.beats[0]
    near = [[at for at in ear.beats if last - NEAR_NS <= at <= first + NEAR_NS] for ear in (source, destination)]
    periods = [b - a for beats in near for a, b in itertools.pairwise(beats)]
    (here, one), (there, other) = source.behind(last), destination.behind(first)
    return Heard(first - last, max(periods, default=0), here - there, one + other)


def agree(measured: Breakdown, heard: Heard) -> bool:
    """Whether the joined figures agree with the outer host's, within the bound of the clocks and the witness's
    precision.

    The guest beats once per period of run time, so it is silent for the blackout and up to one period more.
    """
    bound = measured.clock.bound_ns
    if measured.blackout_ns is None or bound is None:
        return False
    silent = abs(heard.silent_ns - measured.blackout_ns) <= bound + heard.period_ns
    return silent and abs(measured.clock.offset_ns - heard.ahead_ns) <= bound + heard.doubt_ns


@dataclass
class Meeting:
    """One migration between two machines."""

    outcomes: dict[str, Outcome]
    place: Path
    seconds: float
    heard: Heard | None = None
    breakdown: Breakdown | None = None
    trouble: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether the joined blackout agrees with the witness, within the clocks' bound and the guest's period."""
        both = self.heard is not None and self.breakdown is not None
        return both and not self.trouble and agree(self.breakdown, self.heard)

    def lines(self) -> list[str]:
        """The lines to print."""
        lines = [
            f"{role}: {o.code} {o.trouble} after {o.seconds:.0f} s; see {o.console}"
            for role, o in self.outcomes.items()
        ]
        lines += self.trouble
        if self.breakdown is not None and self.heard is not None:
            measured = self.breakdown
            bound = "open" if measured.clock.bound_ns is None else f"{measured.clock.bound_ns / 1e6:.3f}"
            lines.append(f"blackout {(measured.blackout_ns or 0) / 1e6:.3f} ms, bound of the clocks {bound} ms")
            silent, period = self.heard.silent_ns / 1e6, self.heard.period_ns / 1e6
            lines.append(f"the guest was silent for {silent:.3f} ms, its period {period:.3f} ms")
            ahead, doubt = self.heard.ahead_ns / 1e6, self.heard.doubt_ns / 1e6
            lines.append(f"the destination's clock is ahead by {measured.clock.offset_ns / 1e6:.3f} ms;")
            lines.append(f"by the machines' clock readings, {ahead:.3f} ms +- {doubt:.3f} ms")
            lines.append(f"they agree: {'yes' if self.good else 'NO'}; {self.seconds:.0f} s total")
        return lines

    def keep(self, where: Path) -> None:
        """Copies the recordings, and the witness's figures beside them."""
        where.mkdir(exist_ok=True)
        for role in ROLES:
            shutil.copy(self.outcomes[role].files / f"{role}.rec", where / f"{role}.rec")
        assert self.heard is not None
        (where / "heard.json").write_text(json.dumps(vars(self.heard), indent=1) + "\n")


def run(source: str, destination: str, delay: str) -> Meeting:
    """Boots both machines and waits for both."""
    base, begin = cache() / "runs" / "pair", time.monotonic()
    base.mkdir(parents=True, exist_ok=True)
    wire = base / "wire"
    wire.unlink(missing_ok=True)
    built = [place for name in USERLANDS if (place := cache() / "tree" / name).exists()]
    emulated = emulator(built, 1)
    ears = {role: Ear(base / f"{role}.beat") for role in ROLES}

    def start(role: str, name: str) -> Outcome:
        kernel = KERNELS[name]
        where = USERLANDS[kernel.userland]
        image, root = kernel_image(kernel, tree(where)), root_image(where)
        server = "on" if role == "destination" else "off"
        while server == "off" and not wire.exists():
            if time.monotonic() - begin > TIMEOUT_S:
                raise BuildError("the destination's machine does not start")
            time.sleep(0.1)
        more = ["-netdev", f"stream,id=wire,server={server},addr.type=unix,addr.path={wire}"]
        more += ["-device", f"virtio-net-pci,netdev=wire,mac=52:54:00:00:00:0{1 + ROLES.index(role)},romfile="]
        more += ["-chardev", f"socket,id=beat,path={base / role}.beat", "-serial", "chardev:beat"]
        return boot(
            emulated, image, root, ROOT, f"exec python3 -m tests.vm.paired {role} {delay}\n",
            place=base / role, timeout_s=TIMEOUT_S, more=more,
        )  # fmt: skip

    # Where one of them ends early, the other waits for it no longer than `paired.PATIENCE_S`.
    with ThreadPoolExecutor(2) as pool:
        futures = {
            role: pool.submit(start, role, name) for role, name in zip(ROLES, (source, destination), strict=True)
        }
        outcomes = {role: future.result() for role, future in futures.items()}
    meeting = Meeting(outcomes, base, time.monotonic() - begin)
    try:
        meeting.heard = listened(ears["source"], ears["destination"])
    except ValueError as error:
        meeting.trouble.append(str(error))
    files = [outcomes[role].files / f"{role}.rec" for role in ROLES]
    meeting.trouble += [f"{file} was not made" for file in files if not file.exists()]
    if not meeting.trouble:
        whole = read_both(*map(str, files))
        meeting.breakdown = analyse(whole).breakdown
    return meeting
