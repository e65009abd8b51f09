# SPDX-License-Identifier: Apache-2.0
"""Overhead of the exporter while no VM migrates, compared with bpftrace: `python -m bench.exporter_idle`.

In: seconds, VMs, migrations that the exporter has seen before. Out: a Markdown table for docs/exporter.md. For each
process it has the share of one CPU (/proc/PID/task/*/schedstat), the memory (Rss; Pss, which divides shared pages among
processes), the kernel's count of the run time of its BPF programs, and the number of threads created meanwhile. Exit
code 1 if the exporter takes more than 0.3 % of a core or 75 MB. Needs root and /dev/kvm.

Each pair of VMs is one that runs and one that waits for an incoming migration. The observers take turns. bpftrace first
counts the two tracepoints that the exporter keeps attached. Then it records everything in `same_signals.bt` all the
time, as an exporter without those two tracepoints would have to.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.observers import SCRIPT
from ebpf_mig.probes.run_statistics import BpfStatistics
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.integration import exporters
from tests.integration.migrations import LASTING

MOST_SHARE, MOST_BYTES = 0.003, 75 * 10**6
SETTLE_S = 20.0
"""By then new VMs are no longer suspected, the migration's probes are disarmed, and the analysing child has exited."""
_STANDING = (
    'BEGIN { printf("ready\\n"); } tracepoint:task:task_newtask { @born[args->pid] = count(); } '
    "tracepoint:sock:inet_sock_set_state { @state[args->newstate] = count(); }"
)


@dataclass(frozen=True)
class Held:
    """The CPU time that a process has used so far, and its memory."""

    cpu_ns: int
    resident: int
    proportional: int
    bpf_ns: int


def held(pid: int) -> Held:
    """Summed over its threads; memory in bytes. The run time of BPF programs is 0 unless the kernel counts it."""
    here = Path(f"/proc/{pid}")
    cpu = sum(int((task / "schedstat").read_text().split()[0]) for task in (here / "task").iterdir())
    rollup = dict(line.split(":", 1) for line in (here / "smaps_rollup").read_text().splitlines()[1:])
    run: dict[str, int] = {}
    for info in (here / "fdinfo").iterdir():
        with contextlib.suppress(OSError):
            said = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
            if "run_time_ns" in said:
                run[said["prog_id"]] = int(said["run_time_ns"])
    return Held(cpu, *(int(rollup[name].split()[0]) * 1024 for name in ("Rss", "Pss")), sum(run.values()))


def born() -> int:
    """Threads and processes created on this machine since boot: the events that both observers handle."""
    return int(Path("/proc/stat").read_text().split("\nprocesses ")[1].split()[0])


@contextlib.contextmanager
def our_exporter(directory: Path, migrations: int) -> Iterator[dict[str, int]]:
    """Runs the exporter as on a node. Yields its pids by process name."""
    with exporters.exporter(directory / "state") as (process, port):
        for _ in range(migrations):
            exporters.migrate(LASTING)
        seen = exporters.value(port, "ebpf_mig_migrations_total")
        if seen != migrations:
            raise RuntimeError(f"the exporter saw {seen:.0f} of {migrations} migrations")
        time.sleep(SETTLE_S)  # the process that loaded the probes has ended by then
        yield {"supervisor": process.pid, **exporters.children(process.pid)}
        if exporters.value(port, "ebpf_mig_armed") or exporters.value(port, "ebpf_mig_migrations_total") != seen:
            raise RuntimeError("a VM migrated during the measurement: the exporter was not idle")


@contextlib.contextmanager
def bpftrace(directory: Path, *arguments: str) -> Iterator[dict[str, int]]:
    """Runs bpftrace, and yields once it reports that it watches."""
    said = directory / "said"
    with said.open("w") as sink:
        process = subprocess.Popen(["bpftrace", "-B", "line", *arguments], stdout=sink, stderr=sink)
    try:
        exporters.until(lambda: "ready" in said.read_text())
        yield {"bpftrace": process.pid}
    finally:
        process.kill()  # its output is not needed
        process.wait()


def measure(name: str, pids: dict[str, int], seconds: float) -> tuple[float, int]:
    """Prints one row per process and a total. Returns the total: (share of a core, resident bytes)."""
    time.sleep(SETTLE_S)
    begin, births = time.monotonic_ns(), born()
    before = {role: held(pid) for role, pid in pids.items()}
    time.sleep(seconds)
    took = time.monotonic_ns() - begin
    a_second = (born() - births) / (took / 1e9)
    after = {role: held(pid) for role, pid in pids.items()}

    def row(label: str, roles: Iterable[str]) -> tuple[float, int]:
        both = [(before[role], after[role]) for role in roles]
        share = sum(b.cpu_ns - a.cpu_ns for a, b in both) / took
        bpf = sum(b.bpf_ns - a.bpf_ns for a, b in both) / took
        resident, own = sum(b.resident for _, b in both), sum(b.proportional for _, b in both)
        print(
            f"| {label} | {100 * share:.3f} % | {100 * bpf:.4f} % | {resident / 1e6:.1f} MB | {own / 1e6:.1f} MB | "
            f"{a_second:.1f} |",
            flush=True,
        )
        return share, resident

    if len(pids) > 1:
        for role in pids:
            row(f"{name}: {role}", [role])
    return row(name, pids)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="of each measurement")
    parser.add_argument("--pairs", type=int, default=1, help="of VMs, one running and one waiting")
    parser.add_argument("--migrations", type=int, default=1, help="that the exporter has seen before")
    parser.add_argument("--ours", action="store_true", help="no bpftrace")
    options = parser.parse_args()
    others = not options.ours and shutil.which("bpftrace") is not None
    if not others and not options.ours:
        print("bpftrace is left out: it is not installed", file=sys.stderr)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextlib.closing(BpfStatistics()))
        pairs = [stack.enter_context(QemuPair(LASTING, None, exporters.NAMED)) for _ in range(options.pairs)]
        print(f"{2 * options.pairs} VMs, {options.seconds:.0f} s each, Linux {platform.release()}\n")
        print(
            "| process | CPU, of a core | its BPF programs | resident | of that its own (proportional) | births a s |"
        )
        print("|---|--:|--:|--:|--:|--:|")
        with our_exporter(directory, options.migrations) as pids:
            share, resident = measure("exporter", pids, options.seconds)
        if others:
            with bpftrace(directory, "-e", _STANDING) as pids:
                measure("bpftrace, the same two tracepoints", pids, options.seconds)
            watched = (str(pairs[0].source.pid), str(pairs[0].destination.pid))
            with bpftrace(directory, str(SCRIPT), *watched) as pids:
                measure("bpftrace, same signals all the time", pids, options.seconds)
    good = share <= MOST_SHARE and resident <= MOST_BYTES
    print(f"\n{'met' if good else 'MISSED'}: the exporter takes at most 0.3 % of a core and 75 MB")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
