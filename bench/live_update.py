# SPDX-License-Identifier: Apache-2.0
"""What a live update of QEMU (CPR) costs: small and huge pages, 1 and 8 vCPUs, few and thousands of descriptors.

In: the cells to measure, a number of runs, and a QEMU of 10.2 or newer (in PATH or EBPF_MIG_NEWER_QEMU). Out: a
Markdown table on stdout with the medians. Each run has fresh VMs and is traced. Descriptors are memory backends that
no guest uses: QEMU keeps one for each over the update. Huge pages must be reserved before (`sysctl vm.nr_hugepages`);
otherwise their cells are left out by name.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.commands import run
from ebpf_mig.lab.scenario import MIB
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.base import Migration
from ebpf_mig.vmm.qemu.live_update import CprExec, CprTransfer
from tests.integration.live_updates import Vm, vm
from tests.integration.migrations import QUICK

MODES = ("cpr-transfer", "cpr-exec")
PAGES = {"small": "", "huge": ",hugetlb=on,hugetlbsize=2M"}
PHASES = ("quiesce", "state.save", "exec", "startup", "state.load", "resume")


def driver(guest: Vm, mode: str) -> Migration:
    """The migration; for cpr-transfer the new QEMU waits already."""
    source, place = str(guest.qmp("source")), guest.directory
    if mode == "cpr-exec":
        return CprExec(source, f"file:{place}/state")
    guest.await_transfer()
    return CprTransfer(source, str(guest.qmp("destination")), f"unix:{place}/main", f"{place}/cpr")


def backends(path: Path, count: int) -> Sequence[str]:
    """Options for so many memory backends. They go through a file, because /proc cuts a long command line."""
    rows = (f'[object "m{i}"]\n  qom-type = "memory-backend-memfd"\n  size = "4096"\n' for i in range(count))
    path.write_text("".join(rows))
    return ("-readconfig", str(path)) if count else ()


def once(mode: str, vcpus: int, pages: str, descriptors: int) -> Breakdown:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        extra = backends(place / "backends", descriptors)
        scenario = replace(QUICK, vcpus=vcpus)
        with vm(place, scenario=scenario, memory=PAGES[pages], extra=extra, patience_s=120) as guest:
            writer = functools.partial(run.open_recording, str(place / "x.rec"), "bench", force=True)
            with contextlib.closing(driver(guest, mode)) as migration:
                outcome, _ = run.trace_migration(migration, 60, writer)
            time.sleep(0.2)
        if outcome.result != "completed":
            raise SystemExit(f"{mode} {outcome.result}: {outcome.error}")
        return analyse(read_recording(str(place / "x.rec"))).breakdown


def row(found: Sequence[Breakdown]) -> list[str]:
    """Medians: descriptors counted, blackout, the phases; ms."""
    took = [{p.phase: p.duration_ns or 0 for p in b.phases} for b in found]
    passed = [b.live_update.descriptors for b in found if b.live_update is not None]
    counted = "inherited" if None in passed or not passed else str(median(n for n in passed if n is not None))
    blackout = median(b.blackout_ns or 0 for b in found)
    return [counted, *(f"{ns / 1e6:.3f}" for ns in (blackout, *(median(t[p] for t in took) for p in PHASES)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--vcpus", nargs="+", type=int, default=(1, 8))
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=tuple(PAGES))
    parser.add_argument("--descriptors", nargs="+", type=int, default=(0, 2000))
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"| mode | vCPUs | pages | backends | descriptors passed | blackout ms | {' | '.join(PHASES)} |")
    print("|---|--:|---|--:|" + "--:|" * (2 + len(PHASES)), flush=True)
    for cell in itertools.product(options.modes, options.vcpus, options.pages, options.descriptors):
        if cell[2] == "huge" and free_huge_pages() < QUICK.memory_bytes // (2 * MIB):
            print(f"left out {cell}: missing feature: reserved huge pages", file=sys.stderr)
            continue
        found = [once(*cell) for _ in range(options.runs)]
        print(f"| {' | '.join(map(str, cell))} | {' | '.join(row(found))} |", flush=True)
    return 0


def free_huge_pages() -> int:
    """Pages of 2 MiB that nobody uses."""
    with contextlib.suppress(OSError):
        return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
