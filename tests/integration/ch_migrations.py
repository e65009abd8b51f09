# SPDX-License-Identifier: Apache-2.0
"""Runs traced migrations of real Cloud Hypervisors, with each binary found, and keeps their logs and events."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ebpf_mig.breakdown import Breakdown, Witness
from ebpf_mig.collector import analyse
from ebpf_mig.commands import run
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.vmm.base import Outcome
from ebpf_mig.vmm.cloud_hypervisor import event_monitor
from ebpf_mig.vmm.cloud_hypervisor.api import Api
from ebpf_mig.vmm.cloud_hypervisor.lab import DEFAULT_BINARY, ENVIRONMENT, ChPair
from ebpf_mig.vmm.cloud_hypervisor.migration import ChMigration

SEVERAL = "EBPF_MIG_TEST_CLOUD_HYPERVISORS"
"""Paths of binaries, separated by `:`. Unset: the binary that the demo would use."""
QUICK = Scenario(memory_bytes=128 * MIB, working_set_bytes=4 * MIB)
MS = 1_000_000
CUT_MS, TOLERANCE_NS = 1 * MS, 1_500_000


def binaries() -> list[str]:
    """The binaries that exist."""
    named = os.environ.get(SEVERAL)
    wanted = named.split(":") if named else [os.environ.get(ENVIRONMENT) or DEFAULT_BINARY]
    return [path for name in wanted if (path := shutil.which(name))]


@dataclass
class Traced:
    """One migration as recorded, and what happened to the guest."""

    outcome: Outcome
    recording: Recording
    breakdown: Breakdown
    path: Path
    source_alive: bool
    destination_alive: bool
    source_beats: list[int]
    destination_beats: list[int]
    took_s: float

    def witness(self, name: str) -> Witness:
        return next(w for w in self.breakdown.witnesses if w.name == f"ch.{name}")

    def row(self, name: str) -> int:
        return self.breakdown.phase_ns(name)


Act = Callable[[ChPair], None]


def migrate(directory: Path, pair: ChPair, act: Act | None = None, *, timeout_s: float = 60) -> Traced:
    """Runs one migration of the pair. `act` runs in parallel, starting just before the trigger."""
    path = directory / "migration.rec"
    with pair:
        time.sleep(0.3)
        migration = ChMigration(pair.source.api, pair.destination.api, pair.uri, pair.options())
        with contextlib.closing(migration):
            beside = threading.Thread(target=act, args=(pair,)) if act else None
            if beside:
                beside.start()
            begin = time.monotonic()
            writer = functools.partial(run.open_recording, str(path), "test", force=True)
            outcome, _ = run.trace_migration(migration, timeout_s, writer, pair.notes)
            took = time.monotonic() - begin
            if beside:
                beside.join()
        time.sleep(0.3)
        alive = [vm.process.poll() is None for vm in (pair.source, pair.destination)]
    recording = read_recording(str(path))
    breakdown = analyse(recording).breakdown
    beats = [[at for at, _ in vm.heartbeat.beats] for vm in (pair.source, pair.destination)]
    return Traced(outcome, recording, breakdown, path, *alive, *beats, took)


def at_event(name: str, act: Act, *, destination: bool = False) -> Act:
    """Runs `act` as soon as the VMM's event monitor reports the event `name`."""

    def wait(pair: ChPair) -> None:
        path = (pair.destination if destination else pair.source).events
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if any(found == name for found, _ in event_monitor.decode(path.read_text())[0]):
                act(pair)
                return
            time.sleep(0.0005)
        raise AssertionError(f"no event {name} was reported")

    return wait


def knows(binary: str, field: str) -> bool:
    """Whether this binary's send call accepts a field. Starts the binary and asks it."""
    with ChPair(Scenario(memory_bytes=64 * MIB, working_set_bytes=MIB), binary) as pair:
        return Api(pair.destination.api, "destination").knows("vm.send-migration", field) is True


def disagreement(witness: Witness) -> int:
    """How far Cloud Hypervisor's figure, truncated to whole ms, is from the kernel's span of the same interval, in
    ns.
    """
    assert witness.span is not None, f"{witness.name} has no span"
    ours = witness.span[1] - witness.span[0]
    return max(0, max(witness.value_ns - ours, ours - (witness.value_ns + CUT_MS)) - witness.doubt_ns)


def certificates(directory: Path, *addresses: str) -> str:
    """Makes a CA, and a key and certificate for each side, under the file names that Cloud Hypervisor and QEMU expect.
    `addresses`: where servers are found.
    """
    names = ",".join(["DNS:localhost", *(f"IP:{address}" for address in addresses or ("127.0.0.1",))])

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=ca")
    for side in ("server", "client"):
        openssl("req", *key, "-keyout", f"{side}-key.pem", "-out", f"{side}.csr", "-subj", f"/CN={side}")
        (directory / f"{side}.ext").write_text(f"subjectAltName={names}\n")
        openssl(
            "x509", "-req", "-in", f"{side}.csr", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial",
            "-out", f"{side}-cert.pem", "-extfile", f"{side}.ext",
        )  # fmt: skip
    return str(directory)
