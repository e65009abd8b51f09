# SPDX-License-Identifier: Apache-2.0
"""The observers that `bench.overhead` compares: each a command that watches processes until it is interrupted.

In: pids. Out: a context manager that is entered once the observer watches. Afterwards it has the number of KVM ioctls
that the observer's output shows.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ebpf_mig.recording.events import Ending, Ioctl
from ebpf_mig.recording.file import read_recording

PROGRAM = [sys.executable, "-m", "ebpf_mig"]
SCRIPT = Path(__file__).with_name("same_signals.bt")
_PATIENCE_S = 90.0
_SETTLE_S = 0.3
_PERF_SETTLE_S = 1.0
"""perf trace does not report when it has started."""


@dataclass
class Watched:
    """The result of one run of an observer."""

    start_s: float = 0.0
    """From the command's start until it reported that it watches; 0 if it does not report that."""
    seen: int = 0
    """KVM ioctls in its output, without KVM_RUN."""
    lost: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Observer:
    """An observer: its command line for given pids and output file, the sign that it watches, and how to count what
    it saw.
    """

    name: str
    needs: str
    command: Callable[[Sequence[int], Path], list[str]]
    ready: str
    """A word that appears in the output or on standard error once it watches; empty: wait a fixed time."""
    seen: Callable[[Path], Watched]
    prints: bool = False
    """Its results are on standard output, not in the file."""

    def available(self) -> bool:
        return bool(shutil.which(self.needs))

    @contextlib.contextmanager
    def watching(self, pids: Sequence[int]) -> Iterator[Watched]:
        """Watches while the context is open. The result is complete after it closes."""
        result = Watched()
        with tempfile.TemporaryDirectory() as directory:
            output, said = Path(directory) / "output", Path(directory) / "said"
            begin = time.perf_counter()
            with said.open("wb") as sink:
                process = subprocess.Popen(self.command(pids, output), stdout=sink, stderr=sink)
            try:
                self._wait(process, said, result, begin)
                yield result
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            found = self.seen(said if self.prints else output)
            result.seen, result.lost = found.seen, found.lost

    def _wait(self, process: subprocess.Popen[bytes], said: Path, result: Watched, begin: float) -> None:
        if not self.ready:
            time.sleep(_PERF_SETTLE_S)
            return
        while True:
            if self.ready in said.read_text(errors="replace"):
                result.start_s = time.perf_counter() - begin
                time.sleep(_SETTLE_S)
                return
            if process.poll() is not None or time.perf_counter() - begin > _PATIENCE_S:
                raise RuntimeError(f"{self.name} does not watch: {said.read_text(errors='replace')[-300:]}")
            time.sleep(0.002)


def _each(option: str, pids: Sequence[int]) -> list[str]:
    return [word for pid in pids for word in (option, str(pid))]


def _recorded(path: Path) -> Watched:
    recording = read_recording(path)
    ending = recording.events[-1]
    lost = ending.lost if isinstance(ending, Ending) else {"ending": 1}
    return Watched(seen=sum(isinstance(event, Ioctl) for event in recording.events), lost=lost)


def _lines(*words: str) -> Callable[[Path], Watched]:
    """Counts the lines with one of the words and without `KVM_RUN`."""

    def count(path: Path) -> Watched:
        with path.open(errors="replace") as lines:
            return Watched(seen=sum(any(w in line for w in words) and "KVM_RUN" not in line for line in lines))

    return count


OURS = Observer(
    "ebpf-mig record",
    sys.executable,
    lambda pids, output: [*PROGRAM, "record", *_each("--pid", pids), "-o", str(output)],
    "tracing",
    _recorded,
)
BPFTRACE = Observer(
    "bpftrace, same signals",
    "bpftrace",
    lambda pids, _: ["bpftrace", "-B", "line", str(SCRIPT), str(pids[0]), str(pids[-1])],
    "ready",
    _lines("ioctl "),
    prints=True,
)
PERF = Observer(
    "perf trace",
    "perf",
    lambda pids, output: ["perf", "trace", "-o", str(output), "-p", ",".join(map(str, pids))],
    "",
    _lines("KVM_GET", "KVM_SET", "KVM_CLEAR", "KVM_"),
)
STRACE = Observer(
    "strace -f -e trace=ioctl",
    "strace",
    lambda pids, output: ["strace", "-f", "-e", "trace=ioctl", "-o", str(output), *_each("-p", pids)],
    "attached",
    _lines("KVM_"),
)
OTHERS = (BPFTRACE, PERF, STRACE)
