# SPDX-License-Identifier: Apache-2.0
"""The engine of `watch` and `exporter`: it finds every migration of any VM on this node.

In: nothing but the node. Out: an `Observation` for each migration, its recording in the store, and a `Status`.
One turn of the loop: read signs from the standing probe; note VMs that came or went; trace the VMs that showed a sign;
end migrations that are over; disarm. It never calls a VMM.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import socket
import time
from collections.abc import Callable

import msgspec

from ebpf_mig.exporter import discovery
from ebpf_mig.exporter.accounts import Accounts
from ebpf_mig.exporter.analysis_queue import Analysis, Case
from ebpf_mig.exporter.discovery import Vm
from ebpf_mig.exporter.known import BURST, Known
from ebpf_mig.exporter.loader_process import load_apart
from ebpf_mig.exporter.messages import Answer
from ebpf_mig.exporter.newcomers import CHECKS, Newcomers
from ebpf_mig.exporter.observation import Status
from ebpf_mig.exporter.spawn import give_back
from ebpf_mig.exporter.store import Store
from ebpf_mig.exporter.track import as_of
from ebpf_mig.exporter.tracker import Ended, Tracks
from ebpf_mig.exporter.troubles import Troubles
from ebpf_mig.exporter.wall_clock import WallClock, edge_of
from ebpf_mig.linux import clock, procfs
from ebpf_mig.linux.kallsyms import Symbols
from ebpf_mig.linux.sockets import listening_ports
from ebpf_mig.probes.trigger import Sign
from ebpf_mig.recording.events import AnyEvent, Ending, Target, Transfer
from ebpf_mig.recording.kinds import pid_of
from ebpf_mig.tracing.session import header_for
from ebpf_mig.tracing.witness import Witness

IDLE_MS = 1000
ARMED_MS = 20
CANDIDATES_S = 0.02
"""So long, in each turn, VMs are traced that may be the destination of another. Signs are read in between."""
RESCAN_S = 60.0
"""A search of /proc finds VMs of which no new thread was seen, this often."""
VMS = 4096
"""VMs watched at a time: the size of the standing probe's table."""
TRACED, RESERVED = 256, 64
"""VMs traced at a time, the size of the costly probes' table. `RESERVED` of them are for signs in `PLAIN` only."""
PLAIN = frozenset({"logging", "connect", "accept", "exec", "update"})
UPDATE_NS = 30_000_000_000
"""How long a VM is traced after a process appeared that waits to take it over: its guest stops at once then."""
UPDATED = 16
"""If no VM has the name of that process, so many of the same VMM are traced."""

_log = logging.getLogger("ebpf_mig.exporter")


class NodeWatch:
    """Use as a context manager, then call `run`. Raises PreflightError if probes cannot be loaded."""

    def __init__(
        self,
        store: Store,
        report: Callable[[Answer], None],
        only: str = "*",
        tasks: socket.socket | None = None,
    ) -> None:
        """`only`: a glob. VMs whose name does not match are ignored. `tasks`: see `Analysis`."""
        self._store = store
        self._only = only
        self._run = f"{os.getpid()}-{clock.monotonic_ns()}"
        self._troubles = Troubles()
        self._analysis = Analysis(store, report, self._troubles, self._run, tasks)
        self._probe, self._tracer = load_apart(Symbols.of_kernel)
        self._tracks = Tracks(Witness, self._tracer.pending)
        self._vms: dict[int, Known] = {}
        self._candidates: dict[int, None] = {}
        self._hops: set[int] = set()
        self._newcomers = Newcomers()
        self._accounts, self._wall_clock = Accounts(), WallClock()
        self._kept = (0, 0)
        self._rescanned = self._ticked = 0.0
        self._now = time.monotonic()

    def __enter__(self) -> NodeWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def verify(self) -> None:
        """Attaches the costly probes once with the remaining privilege, so that a PreflightError comes now."""
        self._tracer.arm(everything=True)
        self._tracer.disarm()
        give_back()

    def run(self, stop: Callable[[], bool], tick: Callable[[Status], None] | None = None) -> None:
        """Watches until `stop()` is true; it is called every turn. `tick` gets the state about once a second."""
        while not stop():
            self.step()
            if tick is not None and self._ticked == self._now:
                tick(self.status())

    def step(self) -> None:
        """One turn of the loop. Waits for signs or events, at most a second."""
        if self._tracks:
            # Events can wait; a VM that begins to migrate cannot.
            signs = self._probe.poll(0 if self._candidates else ARMED_MS)
            self._wall_clock.read()
            self._saw(self._tracer.poll(0))
        else:
            signs = self._probe.poll(self._newcomers.wait_ms(time.monotonic(), IDLE_MS))
        self._now = time.monotonic()
        for sign in signs:
            with self._troubles.of("vm", f"a sign of process {sign.pid}"):
                self._sign(sign)
        self._recheck()
        self._trace_candidates()
        if self._now - self._ticked >= 1:
            self._ticked = self._now
            self._tick()
        over: list[Ended] = []
        with self._troubles.of("events", "the migrations that are over"):
            over = self._tracks.over(clock.monotonic_ns(), self._alive)
        self._follow()
        for ended in over:
            with self._troubles.of("vm", f"the end of a migration of process {ended.pids[0]}"):
                self._end(ended)
        self._rest()

    def _follow(self) -> None:
        """Traces the processes that pass the bytes of a migration on, too."""
        for pid in self._tracks.hops - self._hops:
            self._hops.add(pid)
            with self._troubles.of("vm", f"process {pid} on a migration's way"):
                self._tracer.follow(pid)

    def _saw(self, events: list[AnyEvent]) -> None:
        with self._troubles.of("events", f"{len(events)} events"):
            self._tracks.saw(events, clock.monotonic_ns())

    def status(self) -> Status:
        """The state of the watch."""
        accounts = self._accounts
        errors, limits = self._troubles.counts()
        return Status(
            run=self._run,
            vms=len(self._vms),
            armed=accounts.armed,
            armed_seconds=accounts.armed_s(self._now),
            triggers={kind: dict(outcomes) for kind, outcomes in accounts.triggers.items()},
            delays=accounts.delays[:],
            delay_seconds=accounts.delay_s,
            attached=dict(self._probe.attached),
            trigger=self._probe.trigger,
            lost=accounts.lost | {"sign": self._probe.lost()},
            run_seconds={name: ns / 1e9 for name, ns in accounts.run_ns.items()},
            errors=errors,
            limits=limits,
            recordings=self._kept[0],
            recording_bytes=self._kept[1],
        )

    def close(self) -> None:
        """Ends tracing, keeps the recordings, waits for their analysis, and detaches."""
        for ended in self._tracks.abandon():
            with self._troubles.of("vm", f"the end of a migration of process {ended.pids[0]}"):
                self._end(ended)
        self._analysis.close()
        self._tracer.close()
        self._probe.close()

    def _alive(self, pid: int) -> bool:
        known = self._vms.get(pid)
        return known is not None and procfs.start_time(pid) == known.vm.started

    def _sign(self, sign: Sign) -> None:
        if sign.kind == "logging" and sign.pid not in self._vms:
            vm = discovery.vm_of(sign.pid)
            if vm is not None:
                self._found(vm, new=True)
        elif sign.kind == "process":
            if not self._newcomers.add(sign.pid, self._now):
                self._troubles.exceeded("new-processes", CHECKS)
        elif sign.pid in self._vms:
            known = sign.pid in self._tracks
            self._vms[sign.pid].signed = sign.at_ns, sign.kind
            self._suspect(sign.pid, sign.kind)
            if sign.kind == "exec":
                self._tracks.replaced(sign.pid, sign.at_ns)
            if not known and sign.pid in self._tracks:
                self._accounts.delayed((clock.monotonic_ns() - sign.at_ns) / 1e9)

    def _recheck(self) -> None:
        for pid in self._newcomers.due(self._now) - self._vms.keys():
            with self._troubles.of("vm", f"new process {pid}"):
                vm = discovery.vm_of(pid)
                if vm is not None:
                    self._newcomers.drop(pid)
                    self._found(vm, new=True)

    def _tick(self) -> None:
        """Once a second: finds VMs that ended, began to run, or are being loaded. Rarely: searches /proc."""
        with self._troubles.of("state", "the state directory"):
            self._kept = self._store.size()
        for pid, known in list(self._vms.items()):
            if pid not in self._tracks:
                with self._troubles.of("vm", f"process {pid}"):
                    self._look_at(pid, known)
        if self._now - self._rescanned >= RESCAN_S or not self._rescanned:
            first, self._rescanned = not self._rescanned, self._now
            with self._troubles.of("vm", "the search for VMs"):
                for vm in discovery.find_vms().values():
                    if vm.pid not in self._vms:
                        with self._troubles.of("vm", f"process {vm.pid}"):
                            self._found(vm, new=not first)

    def _look_at(self, pid: int, known: Known) -> None:
        if not self._alive(pid):
            del self._vms[pid]
            self._probe.remove(pid)
        elif known.is_being_loaded():
            self._suspect(pid, "memory")

    def _found(self, vm: Vm, *, new: bool) -> None:
        """Adds a VM. A new one may be loaded at once, one found later may already be migrating, so both are signs."""
        if not fnmatch.fnmatchcase(vm.name, self._only):
            return
        if len(self._vms) >= VMS:
            self._troubles.exceeded("vms", VMS)
            return
        fresh = new or discovery.is_fresh(vm.pid)
        self._probe.add(vm.pid)
        self._vms[vm.pid] = Known(vm, fresh, procfs.resident_bytes(vm.pid))
        for port in listening_ports(vm.pid):
            self._probe.listens(vm.pid, port)
        self._suspect(vm.pid, "born" if new else "start")
        if vm.awaits_update:
            self._expect_update(vm)

    def _expect_update(self, vm: Vm) -> None:
        """Traces the VM that the process `vm` waits to take over, found by its name: the guest stops first."""
        running = [known.vm for pid, known in self._vms.items() if pid != vm.pid and not known.vm.awaits_update]
        named = [other for other in running if other.name and other.name == vm.name]
        others = [other for other in running if other.vmm == vm.vmm]
        until_ns = clock.monotonic_ns() + UPDATE_NS
        for one in [vm, *(named or others[:UPDATED])]:
            self._begin(one.pid, "update")
            self._tracks.extend(one.pid, until_ns)

    def _suspect(self, pid: int, kind: str) -> None:
        """Traces a VM that showed a sign, and soon the VMs that may be its destination."""
        known = self._vms[pid]
        known.fresh = known.fresh and discovery.is_fresh(pid)
        if pid not in self._tracks and not known.may_try() and kind != "logging":
            self._accounts.count(kind, "suppressed")
            return
        _log.debug("process %d: %s", pid, kind)
        self._begin(pid, kind)
        if known.fresh:
            return
        self._candidates |= {other: None for other, candidate in self._vms.items() if candidate.fresh}

    def _trace_candidates(self) -> None:
        """Traces some of the VMs that may be the destination of a traced one. The next sign may say which it is. A
        new VM that is traced already stays so for as long as the others.
        """
        until = time.monotonic() + CANDIDATES_S
        while self._candidates and time.monotonic() < until:
            pid, _ = self._candidates.popitem()  # the newest: a destination is started for its migration
            known = self._vms.get(pid)
            if self._tracks and known is not None and known.fresh:
                with self._troubles.of("vm", f"process {pid}"):
                    if discovery.is_fresh(pid):
                        self._begin(pid, "candidate")

    def _begin(self, pid: int, kind: str) -> None:
        new = pid not in self._tracks
        if new and len(self._tracks.pids) >= (TRACED if kind in PLAIN else TRACED - RESERVED):
            self._troubles.exceeded("traced", TRACED)
            return
        if not self._accounts.armed:
            self._tracer.arm()
            self._accounts.arm(self._now)
        if new:
            try:
                self._tracer.add(pid)
            except BaseException:
                with contextlib.suppress(Exception):
                    self._tracer.remove(pid)
                raise
        self._tracks.begin(pid, kind, clock.monotonic_ns(), fresh=self._vms[pid].fresh)

    def _rest(self) -> None:
        """Disarms if nothing is traced."""
        if self._accounts.armed and not self._tracks:
            self._accounts.disarm(self._now)
            self._tracer.disarm()

    def _end(self, ended: Ended) -> None:
        rest: list[AnyEvent] = []
        for pid in ended.pids:
            at_ns, kind = self._vms[pid].signed
            if at_ns > ended.last_ns and ended.over and pid not in self._tracks and self._alive(pid):
                self._tracks.keep(pid, ended, kind, clock.monotonic_ns())  # it may have begun the next migration
            with self._troubles.of("vm", f"the end of tracing process {pid}"):
                rest += self._so_far(pid, ended.end_ns) if pid in self._tracks else self._tracer.remove(pid)
        unused = self._hops.intersection(ended.hops) - self._tracks.hops
        for pid in unused:
            with self._troubles.of("vm", f"the end of tracing process {pid}"):
                rest += [event for event in self._tracer.remove(pid) if isinstance(event, Transfer)]
        self._hops -= unused
        late = self._tracer.poll(0)
        gone = [*(pid for pid in ended.pids if pid not in self._tracks), *unused]
        rest += [event for event in late if pid_of(event) in gone]
        self._saw(late)
        lost, unpaired, run_ns = self._accounts.since_last(self._tracer.losses(), self._tracer.own_cost()[0])
        self._rest()
        self._accounts.count(ended.trigger, "nothing" if ended.reason == "nothing" else "migration")
        _log.debug("processes %s: %s after %s", ended.pids, ended.reason, ended.trigger)
        if ended.reason == "nothing":
            return
        vms = [self._vms[pid].vm for pid in ended.pids]
        for pid in ended.pids:
            known = self._vms[pid]
            known.fresh = known.fresh and discovery.is_fresh(pid)  # a destination may wait for the next try
            known.credit = BURST
        ending = Ending(clock.monotonic_ns(), ended.reason, lost, unpaired, run_ns)
        targets = [Target(pid=vm.pid, role="unknown", vmm="" if vm.vmm == "unknown" else vm.vmm) for vm in vms]
        notes = [f"{ended.thinned} early transfers were left out"] if ended.thinned else []
        if ended.doubtful:
            notes.append("more than one process on this node fits as the other side: it is paired with none")
        header = header_for(targets, self._tracer.attached, notes)
        pair = self._wall_clock.at(edge_of(ended.events, ended.last_ns))
        header = msgspec.structs.replace(header, begin_ns=ended.begin_ns, clock=pair)
        self._analysis.put(Case(header, [*ended.events, *rest, ending], vms, ended.trigger))

    def _so_far(self, pid: int, until_ns: int | None) -> list[AnyEvent]:
        """The names and accounts of a process that remains traced, as they were at `until_ns`; None: now."""
        found = self._tracer.so_far(pid)
        return (
            found if until_ns is None else [known for event in found if (known := as_of(event, until_ns)) is not None]
        )
