# SPDX-License-Identifier: Apache-2.0
"""An exporter that runs for many rounds, and what must be true of it after each.

In: a directory. Out: `Node`, whose `check_*` raise `BrokenError` with a sentence.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.kernel import descendants, held_by, held_by_others, programs, states
from tests.integration.exporters import OURS, PROGRAM, children, free_port, is_ready, samples

READY_S = 25.0
"""A stopped watch is killed after 2 s, and started after at most 10 s if it has been killed often."""
COUNTED_S = 10.0
LEFT_S = 6.0
"""A loader that outlived its watch may still need this long."""
MODULES = {"watch": "watch_process", "listener": "serve", "analyst": "analysis_worker"}


class BrokenError(Exception):
    """Something that must hold does not."""


def wait_for(what: Callable[[], Any], seconds: float, else_: Callable[[], str]) -> Any:
    """The first true answer. BrokenError with what `else_` says if there is none in time."""
    deadline = time.monotonic() + seconds
    while not (answer := what()):
        if time.monotonic() > deadline:
            raise BrokenError(else_())
        time.sleep(0.03)
    return answer


class Node:
    """The exporter. `before`: programs that were loaded before it and are not ours."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._before = programs()
        self._log = (directory / "exporter.log").open("w")
        self._seen: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.start()

    def start(self) -> None:
        """Starts it, and waits until it is ready."""
        self.port = free_port()
        options = ["--web.listen-address", f"127.0.0.1:{self.port}", "--vm", f"{OURS}*", "--keep", "20"]
        options += ["--state-directory", str(self._directory / "state")]
        self.process = subprocess.Popen([*PROGRAM, "exporter", *options], stderr=self._log)
        self._seen = {}
        self.check_ready()

    def close(self) -> None:
        """SIGTERM, after which it must exit with 0 and leave nothing."""
        self.process.terminate()
        try:
            status = self.process.wait(20)
        finally:
            self.process.kill()
            self._log.close()
        if status != 0:
            raise BrokenError(f"the exporter exits with {status}")
        self.check_nothing_left(running=False)

    def pid(self, name: str) -> int | None:
        """Of one of its processes."""
        with contextlib.suppress(OSError):
            return self.process.pid if name == "supervisor" else children(self.process.pid).get(MODULES[name])
        return None

    def check_ready(self) -> None:
        """It is ready, or gets so in time."""
        wait_for(lambda: is_ready(self.port), READY_S, lambda: f"not ready after {READY_S:.0f} s: {self._processes()}")

    def _processes(self) -> str:
        load = Path("/proc/loadavg").read_text().split()[0]
        return f"status {self.process.poll()}, load {load}, {states(self.process.pid)}"

    def scrape(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """All samples. BrokenError if a counter is lower than in the scrape before."""
        deadline = time.monotonic() + READY_S
        while True:
            try:
                found = {(s.name, tuple(sorted(s.labels.items()))): float(s.value) for s in samples(self.port)}
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise BrokenError("the listener does not answer") from None
                time.sleep(0.05)
        for key, value in self._seen.items():
            counts = key[0].startswith("ebpf_mig") and key[0].endswith(("_total", "_count", "_sum", "_bucket"))
            if counts and found.get(key, -1) < value - 1e-9:
                raise BrokenError(f"{key} went from {value} to {found.get(key)}")
        self._seen = found
        return found

    def migrations(self, **labels: str) -> float:
        """How many it has counted."""
        of = {key: value for key, value in self.scrape().items() if key[0] == "ebpf_mig_migrations_total"}
        return sum(value for (_, pairs), value in of.items() if labels.items() <= dict(pairs).items())

    def check_nothing_left(self, running: bool = True) -> None:
        """Every loaded program belongs to the one watch that runs, and no process of ours is left over."""

        def left() -> set[int]:
            watch = self.pid("watch") if running else None
            ours = programs() - self._before - (held_by(watch) if watch else set())
            return ours - held_by_others() if ours else ours

        wait_for(lambda: not left(), LEFT_S, lambda: f"BPF programs are left: {sorted(left())}")
        if not running:
            return
        # A watch that was started again has a loader for a moment.
        wait_for(self._has_one_of_each, LEFT_S, lambda: f"processes of the exporter: {descendants(self.process.pid)}")

    def _has_one_of_each(self) -> bool:
        below = descendants(self.process.pid)
        names = [name for words in below.values() for name in MODULES.values() if f"exporter.{name} " in words]
        return len(names) == len(set(names)) == len(below)

    def check_ended(self, name: str, pid: int) -> None:
        """That one of its processes was told to end, and does: the watch first keeps what it was tracing."""
        wait_for(lambda: self.pid(name) != pid, READY_S, lambda: f"the {name} does not end: {self._processes()}")
