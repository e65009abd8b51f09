# SPDX-License-Identifier: Apache-2.0
"""The engine: every migration of any VM on this node, whoever started it.

In: nothing but the node. Out: an `Observation` for each migration, its recording in the store, and a `Status`.
The loop, top to bottom: signs from the standing probe; VMs that came or went; the costly probes on those VMs that
showed a sign; the end of each migration; back to idle. It never calls a VMM.
"""

from __future__ import annotations

import bisect
import contextlib
import fnmatch
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from ebpf_mig.exporter import discovery
from ebpf_mig.exporter.analysis_queue import Analysis, Case
from ebpf_mig.exporter.discovery import Vm
from ebpf_mig.exporter.loader_process import load_apart
from ebpf_mig.exporter.messages import Answer
from ebpf_mig.exporter.observation import DELAYS_S, Status
from ebpf_mig.exporter.spawn import give_back
from ebpf_mig.exporter.store import Store
from ebpf_mig.exporter.tracker import Ended, Tracks
from ebpf_mig.exporter.troubles import Troubles
from ebpf_mig.linux import clock, procfs
from ebpf_mig.linux.kallsyms import Symbols
from ebpf_mig.linux.sockets import listening_ports
from ebpf_mig.probes.trigger import Sign
from ebpf_mig.recording.events import AnyEvent, Ending, Target
from ebpf_mig.recording.kinds import pid_of
from ebpf_mig.tracing.session import header_for
from ebpf_mig.tracing.witness import Witness

IDLE_MS = 1000
ARMED_MS = 20
RESCAN_S = 60.0
"""A VM that was missed by its thread births is found this late."""
RECHECKS_S = (0.05, 0.25, 1.0, 3.0, 6.0)
"""A process makes its VM a little after its first thread: looked at again after these."""
GROWTH_BYTES = 16 << 20
"""A VM that has not run grew by this much within a second: it is being loaded."""
BURST, REFILL_S = 4, 30.0
"""Signs that proved wrong, of one VM: this many at once, then one more each so many seconds."""
VMS = 4096
"""VMs that are watched at a time: what the standing probe's table holds."""
TRACED, RESERVED = 256, 64
"""VMs traced at a time, what the costly probes' table holds; of these, so many only for those that show it plainly."""
PLAIN = frozenset({"logging", "connect", "accept"})
CHECKS = 8192
"""Looks at new processes that are still to come."""

_log = logging.getLogger("ebpf_mig.exporter")


@dataclass
class _Known:
    """A VM and what we think of it."""

    vm: Vm
    fresh: bool
    """Its guest has not run as far as we saw: it may be a destination."""
    resident: int = 0
    credit: float = BURST
    credited: float = field(default_factory=time.monotonic)

    def may_try(self) -> bool:
        """Takes one from the budget of signs that may prove wrong; False if it is spent."""
        now = time.monotonic()
        self.credit = min(BURST, self.credit + (now - self.credited) / REFILL_S)
        self.credited = now
        if self.credit < 1:
            return False
        self.credit -= 1
        return True


class NodeWatch:
    """Use as a context manager, then call `run`. PreflightError where probes cannot be loaded."""

    def __init__(self, store: Store, tell: Callable[[Answer], None], only: str = "*") -> None:
        """`only`: a glob; VMs whose name does not match are left alone."""
        self._store = store
        self._only = only
        self._troubles = Troubles()
        self._analysis = Analysis(store, tell, self._troubles)  # starts while the other compiles
        self._probe, self._tracer = load_apart()
        self._analysis.verify()
        self._tracks = Tracks(Witness)
        self._vms: dict[int, _Known] = {}
        self._checks: list[tuple[float, int]] = []
        self._armed = False
        self._armed_at = 0.0
        self._armed_s = 0.0
        self._losses: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._lost_total: dict[str, int] = {}
        self._run_ns: dict[str, int] = {}
        self._triggers: dict[str, dict[str, int]] = {}
        self._delays, self._delay_s = [0] * (len(DELAYS_S) + 1), 0.0
        self._kept = (0, 0)
        self._rescanned = self._ticked = 0.0
        self._now = time.monotonic()

    def __enter__(self) -> NodeWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def verify(self) -> None:
        """Attaches the costly probes once, with the privilege that is left: PreflightError now, not later."""
        self._tracer.arm()
        self._tracer.disarm()
        Symbols.of_kernel()
        give_back()

    def run(self, stop: Callable[[], bool], tick: Callable[[Status], None] | None = None) -> None:
        """Watches until `stop()`; it is asked once a second. `tick` is called about once a second with the state."""
        while not stop():
            self.step()
            if tick is not None and self._ticked == self._now:
                tick(self.status())

    def step(self) -> None:
        """One turn of the loop: waits for signs or events, at most a second."""
        if self._tracks:
            signs = self._probe.poll(ARMED_MS)  # events wait better than a VM that begins to migrate meanwhile
            self._saw(self._tracer.poll(0))
        else:
            wait = IDLE_MS
            if self._checks:
                wait = max(0, min(wait, int((min(self._checks)[0] - time.monotonic()) * 1000) + 1))
            signs = self._probe.poll(wait)
        self._now = time.monotonic()
        for sign in signs:
            with self._troubles.of("vm", f"a sign of process {sign.pid}"):
                self._sign(sign)
        self._recheck()
        if self._now - self._ticked >= 1:
            self._ticked = self._now
            self._tick()
        over: list[Ended] = []
        with self._troubles.of("events", "the migrations that are over"):
            over = self._tracks.over(clock.monotonic_ns(), self._alive)
        for ended in over:
            with self._troubles.of("vm", f"the end of a migration of process {ended.pids[0]}"):
                self._end(ended)
        self._rest()

    def _saw(self, events: list[AnyEvent]) -> None:
        with self._troubles.of("events", f"{len(events)} events"):
            self._tracks.saw(events, clock.monotonic_ns())

    def status(self) -> Status:
        """The watch's own state."""
        armed_now = self._now - self._armed_at if self._armed else 0.0
        errors, limits = self._troubles.counts()
        return Status(
            vms=len(self._vms),
            armed=self._armed,
            armed_seconds=self._armed_s + armed_now,
            triggers={kind: dict(outcomes) for kind, outcomes in self._triggers.items()},
            delays=self._delays[:],
            delay_seconds=self._delay_s,
            attached=dict(self._probe.attached),
            trigger=self._probe.trigger,
            lost=self._lost_total | {"sign": self._probe.lost()},
            run_seconds={name: ns / 1e9 for name, ns in self._run_ns.items()},
            errors=errors,
            limits=limits,
            recordings=self._kept[0],
            recording_bytes=self._kept[1],
        )

    def close(self) -> None:
        """Ends what is being traced (its recordings are kept), waits for their analysis, detaches."""
        for ended in self._tracks.abandon(clock.monotonic_ns()):
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
        elif sign.kind == "stranger":
            if len(self._checks) >= CHECKS:
                self._troubles.exceeded("new-processes", CHECKS)
                return
            self._checks += [(self._now + wait, sign.pid) for wait in RECHECKS_S]
        elif sign.pid in self._vms:
            known = sign.pid in self._tracks
            self._suspect(sign.pid, sign.kind)
            if not known and sign.pid in self._tracks:
                delay = (clock.monotonic_ns() - sign.at_ns) / 1e9
                self._delays[bisect.bisect_left(DELAYS_S, delay)] += 1
                self._delay_s += delay

    def _recheck(self) -> None:
        due = {pid for at, pid in self._checks if at <= self._now}
        if not due:
            return
        self._checks = [(at, pid) for at, pid in self._checks if at > self._now]
        for pid in due - self._vms.keys():
            with self._troubles.of("vm", f"process {pid}, which is new"):
                vm = discovery.vm_of(pid)
                if vm is not None:
                    self._checks = [check for check in self._checks if check[1] != pid]
                    self._found(vm, new=True)

    def _tick(self) -> None:
        """Once a second: who is gone, who began to run, who is being loaded; seldom: who was missed."""
        self._analysis.check()
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
                        with self._troubles.of("vm", f"process {vm.pid}, which was found"):
                            self._found(vm, new=not first)

    def _look_at(self, pid: int, known: _Known) -> None:
        if not self._alive(pid):
            del self._vms[pid]
            self._probe.remove(pid)
        elif known.fresh:
            before, known.resident = known.resident, procfs.resident_bytes(pid)
            if not discovery.is_fresh(pid):
                known.fresh = False
            elif known.resident - before >= GROWTH_BYTES:
                self._suspect(pid, "memory")

    def _found(self, vm: Vm, *, new: bool) -> None:
        """A VM that was just made may be loaded at once; one that we find may be migrating already: both are signs."""
        if not fnmatch.fnmatchcase(vm.name, self._only):
            return
        if len(self._vms) >= VMS:
            self._troubles.exceeded("vms", VMS)
            return
        fresh = new or discovery.is_fresh(vm.pid)
        self._probe.add(vm.pid)
        self._vms[vm.pid] = _Known(vm, fresh, procfs.resident_bytes(vm.pid))
        for port in listening_ports(vm.pid):
            self._probe.listens(vm.pid, port)
        self._suspect(vm.pid, "born" if new else "start")

    def _suspect(self, pid: int, kind: str) -> None:
        """Traces a VM that showed a sign, and with it those that may be its destination."""
        known = self._vms[pid]
        known.fresh = known.fresh and discovery.is_fresh(pid)
        if pid not in self._tracks and not known.may_try() and kind != "logging":
            self._count(kind, "suppressed")
            return
        _log.debug("process %d: %s", pid, kind)
        self._begin(pid, kind)
        if known.fresh:
            return
        for other, candidate in self._vms.items():
            if candidate.fresh and other not in self._tracks and discovery.is_fresh(other):
                self._begin(other, "candidate")

    def _begin(self, pid: int, kind: str) -> None:
        new = pid not in self._tracks
        if new and len(self._tracks.pids) >= (TRACED if kind in PLAIN else TRACED - RESERVED):
            self._troubles.exceeded("traced", TRACED)
            return
        if not self._armed:
            self._tracer.arm()
            self._armed, self._armed_at = True, self._now
        if new:
            try:
                self._tracer.add(pid)
            except BaseException:
                with contextlib.suppress(Exception):
                    self._tracer.remove(pid)
                raise
        self._tracks.begin(pid, kind, clock.monotonic_ns(), fresh=self._vms[pid].fresh)

    def _rest(self) -> None:
        """Disarms once nothing is traced."""
        if self._armed and not self._tracks:
            self._armed = False
            self._tracer.disarm()
            self._armed_s += self._now - self._armed_at

    def _end(self, ended: Ended) -> None:
        rest: list[AnyEvent] = []
        for pid in ended.pids:
            with self._troubles.of("vm", f"the end of tracing process {pid}"):
                rest += self._tracer.names(pid) if pid in self._tracks else self._tracer.remove(pid)
        late = self._tracer.poll(0)
        gone = [pid for pid in ended.pids if pid not in self._tracks]
        rest += [event for event in late if pid_of(event) in gone]
        self._saw(late)
        lost, unpaired, run_ns = self._account()
        self._rest()
        self._count(ended.trigger, "nothing" if ended.reason == "nothing" else "migration")
        _log.debug("processes %s: %s after %s", ended.pids, ended.reason, ended.trigger)
        if ended.reason == "nothing":
            return
        vms = [self._vms[pid].vm for pid in ended.pids]
        for pid in ended.pids:
            self._vms[pid].fresh = False
            self._vms[pid].credit = BURST
        ending = Ending(clock.monotonic_ns(), ended.reason, lost, unpaired, run_ns)
        targets = [Target(pid=vm.pid, role="unknown", vmm="" if vm.vmm == "unknown" else vm.vmm) for vm in vms]
        notes = [f"{ended.thinned} early transfers were left out"] if ended.thinned else []
        header = header_for(targets, self._tracer.attached, notes)
        header = msgspec.structs.replace(header, begin_ns=ended.begin_ns)
        self._analysis.put(Case(header, [*ended.events, *rest, ending], vms, ended.trigger))

    def _account(self) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        """(lost, unpaired, run time in ns) since the last time. Of all that was traced: it cannot be told apart."""
        losses = self._tracer.losses()
        lost, unpaired = (_since(now, before) for now, before in zip(losses, self._losses, strict=True))
        self._losses = losses
        for name, number in lost.items():
            self._lost_total[name] = self._lost_total.get(name, 0) + number
        runtime = self._tracer.own_cost()[0]
        since = _since(runtime, self._run_ns)
        self._run_ns |= runtime
        return lost, unpaired, since

    def _count(self, kind: str, outcome: str) -> None:
        outcomes = self._triggers.setdefault(kind, {})
        outcomes[outcome] = outcomes.get(outcome, 0) + 1


def _since(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: n - before.get(name, 0) for name, n in now.items() if n > before.get(name, 0)}
