# SPDX-License-Identifier: Apache-2.0
"""The observers that `bench.overhead` compares: each a command that watches processes until it is interrupted.

In: pids. Out: a context manager that is entered once the observer watches. Afterwards it has the number of KVM ioctls
that the observer's output shows. `ObserverError` says why an observer could not be measured.
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

from ebpf_mig.errors import EbpfMigError
from ebpf_mig.recording.events import Ending, Ioctl
from ebpf_mig.recording.file import read_recording

PROGRAM = [sys.executable, "-m", "ebpf_mig"]
SCRIPT = Path(__file__).with_name("same_signals.bt")
_PATIENCE_S = 90.0
_SETTLE_S = 0.3
_PERF_SETTLE_S = 1.0
"""perf trace does not report when it has started."""


_TRACEFS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))


class ObserverError(RuntimeError):
    """An observer that is missing or fails, and why. The others can still be measured."""


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
    tracefs: bool = False
    """It needs a mounted tracefs. perf mounts it by itself."""

    def obstacle(self) -> str:
        """Why it cannot watch on this machine; empty if nothing is known to prevent it."""
        if not shutil.which(self.needs):
            return f"{self.needs} is not installed"
        if self.tracefs and not any((path / "events").is_dir() for path in _TRACEFS):
            return f"tracefs is not mounted; mount -t tracefs none {_TRACEFS[0]}"
        return ""

    @contextlib.contextmanager
    def watching(self, pids: Sequence[int]) -> Iterator[Watched]:
        """Watches while the context is open. The result is complete after it closes. Raises `ObserverError`."""
        if obstacle := self.obstacle():
            raise ObserverError(obstacle)
        result = Watched()
        with tempfile.TemporaryDirectory() as directory:
            output, said = Path(directory) / "output", Path(directory) / "said"
            begin = time.perf_counter()
            with said.open("wb") as sink:
                process = subprocess.Popen(self.command(pids, output), stdout=sink, stderr=sink)
            try:
                self._wait(process, said, result, begin)
                yield result
                if process.poll() is not None:
                    raise ObserverError(f"ended while it was needed: {_last_words(said)}")
            finally:
                _interrupt(process)
            try:
                found = self.seen(said if self.prints else output)
            except (OSError, EbpfMigError) as error:
                raise ObserverError(f"its output cannot be read: {_last_words(said) or error}") from error
            result.seen, result.lost = found.seen, found.lost

    def _wait(self, process: subprocess.Popen[bytes], said: Path, result: Watched, begin: float) -> None:
        while True:
            waited = time.perf_counter() - begin
            if self.ready and self.ready in said.read_text(errors="replace"):
                result.start_s = waited
                time.sleep(_SETTLE_S)
                return
            if not self.ready and waited > _PERF_SETTLE_S:
                return
            if process.poll() is not None or waited > _PATIENCE_S:
                raise ObserverError(f"does not watch: {_last_words(said)}")
            time.sleep(0.002)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ends an observer as Ctrl-C does, or kills it if it does not obey."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_words(said: Path) -> str:
    """The end of what a tool printed, in one line."""
    return " ".join(said.read_text(errors="replace").split())[-300:]


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
    tracefs=True,
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
