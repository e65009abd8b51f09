# SPDX-License-Identifier: Apache-2.0
"""One host's tracing run, top to bottom: load, attach, arm, wait, drain, detach.

In: the processes to trace, where the recording goes, and a function that returns the reason to stop. Out: the
recording has the events, and an `Ending` as the last one. The migration does not depend on this module: an error here
ends the tracing, never the migration.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from msgspec.structs import replace

from ebpf_mig import __version__
from ebpf_mig.errors import UsageError
from ebpf_mig.linux import clock, descriptors, namespaces, procfs
from ebpf_mig.probes.tiers import AUTO
from ebpf_mig.probes.tracer import Tracer
from ebpf_mig.recording.events import AnyEvent, ClockPair, Ending, Header, Target
from ebpf_mig.text import printable
from ebpf_mig.vmm import adapter
from ebpf_mig.vmm.processes import may_move_plainly, vmm_of

POLL_MS = 20
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Sink(Protocol):
    """The destination of events: a `recording.RecordingWriter`."""

    def write_many(self, events: Iterable[AnyEvent]) -> None:
        """Takes events in the order in which they arrived."""

    def flush(self) -> None:
        """Flushes the events, so that they survive our death."""


Until = Callable[[Sequence[AnyEvent]], str | None]
"""Called with each batch of new events (often empty); returns the reason once tracing is to end."""


def clock_pair(tries: int = 5) -> ClockPair:
    """The offset of CLOCK_MONOTONIC and CLOCK_REALTIME, from the tightest of a few brackets."""
    return ClockPair(*clock.bracket(tries))


def require_alive(targets: Sequence[Target]) -> None:
    """UsageError if a target's pid does not exist, is a thread's id, a zombie's, or our own."""
    for target in targets:
        if target.pid == os.getpid():
            raise UsageError(f"{target.pid} is this process itself", "give the pid of the VMM")
        try:
            process = procfs.process_of(target.pid)
        except ProcessLookupError as error:
            raise UsageError(f"no process has pid {target.pid}", "check the pid of the VMM, e.g. with pgrep") from error
        if process != target.pid:
            raise UsageError(f"{target.pid} is a thread of process {process}", f"use --pid {process}")
        if not procfs.is_alive(target.pid):
            raise UsageError(f"process {target.pid} has ended", "check the pid of the VMM, e.g. with pgrep")


def require_kvm(targets: Sequence[Target]) -> None:
    """UsageError if a target has no KVM VM. VMMs that create their VM later are exempt.

    If access to its descriptors is denied, its name has to be that of a VMM.
    """
    for target in targets:
        vmm = vmm_of(target.pid)
        denied = not descriptors.may_read(target.pid)
        if descriptors.holds_kvm(target.pid) or (denied and vmm):
            continue
        if not vmm or not adapter(vmm).awaits_vm(procfs.command_line(target.pid)):
            named = printable(procfs.comm(target.pid))
            raise UsageError(
                f"process {target.pid} ({named}) has no KVM VM{' that can be seen' if denied else ''}",
                "check the pid of the VMM, e.g. with pgrep; a guest without KVM (TCG) cannot be traced",
            )


def header_for(targets: Sequence[Target], attached: dict[str, str], notes: Sequence[str] = ()) -> Header:
    """The header of this host's recording, which is its first block."""
    return Header(
        tool=f"ebpf-mig {__version__}",
        host=procfs.host_name(),
        boot_id=procfs.text("sys/kernel/random/boot_id").strip(),
        kernel=platform.release(),
        machine=platform.machine(),
        page_size=os.sysconf("SC_PAGESIZE"),
        cpus=os.cpu_count() or 0,
        begin_ns=clock.monotonic_ns(),
        clock=clock_pair(),
        targets=[_with_comm(target) for target in targets],
        attach=attached,
        notes=list(notes),
    )


def _with_comm(target: Target) -> Target:
    return replace(target, comm=procfs.comm(target.pid), vmm=target.vmm or vmm_of(target.pid))


class Session:
    """A prepared run: programs compiled and loaded, nothing attached yet. Use as a context manager."""

    def __init__(
        self, targets: Sequence[Target], tier: str = AUTO, *, grows: bool = False, user_stacks: bool = False
    ) -> None:
        """`tier`: attach tier of the probes, one of `probes.tiers.NAMES`. `grows`: `add` will be called.
        `user_stacks`: as in `Tracer`.
        """
        namespaces.require_host_pids()
        require_alive(targets)
        self.targets = tuple(targets)
        self._grows = grows
        pids = [target.pid for target in targets]
        self._tracer = Tracer(() if grows else pids, tier=tier, user_stacks=user_stacks, moves_plainly=may_move_plainly)
        if grows:
            for pid in pids:
                self._tracer.add(pid)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._tracer.close()

    def arm(self, notes: Sequence[str] = ()) -> Header:
        """Attaches the probes. The header describes the attached probes."""
        self._tracer.arm()
        return header_for(self.targets, self._tracer.attached, notes)

    def add(self, target: Target) -> None:
        """Also traces this process from now on. Only for a session that grows. The header does not list it."""
        self._tracer.add(target.pid)
        self.targets = (*self.targets, target)

    def follow(self, pid: int) -> None:
        """Also traces the sends and receives of a process that passes the migration's bytes on. Nothing happens in a
        session that does not grow, nor if the table of processes is full."""
        if self._grows:
            with contextlib.suppress(OSError, KeyError):
                self._tracer.follow(pid)

    def runs_vcpu(self, pid: int) -> bool:
        """Whether a vCPU of a traced process is inside KVM_RUN at this moment."""
        return self._tracer.runs_vcpu(pid)

    @property
    def holds(self) -> bool:
        """Whether events are held back, since a guest may be stopped. Then leave the CPUs to the VMMs, and conclude
        nothing from what is not there.
        """
        return self._tracer.backlog.holds

    def pump(self, sink: Sink, until: Until) -> str:
        """Moves events into the sink until `until` gives a reason, and returns it."""
        with held_signals() as deliver:
            while True:
                events = self._tracer.poll(POLL_MS)
                sink.write_many(events)
                deliver()
                reason = until(events)
                if reason is not None:
                    return reason

    def finish(self, sink: Sink, reason: str, extra: Sequence[AnyEvent] = ()) -> None:
        """Writes the events left in the kernel, the caller's own events (marks) and the ending. Then detaches."""
        runtime, runs = self._tracer.own_cost()
        sink.write_many(self._tracer.finish())
        sink.write_many(extra)
        lost, unpaired = self._tracer.losses()
        missed = self._tracer.missed_runs()
        self._tracer.close()
        sink.write_many([Ending(clock.monotonic_ns(), reason, lost, unpaired, runtime, runs, missed)])
        sink.flush()


@contextlib.contextmanager
def held_signals() -> Iterator[Callable[[], None]]:
    """Defers Ctrl-C and similar signals. Calling the result delivers the deferred ones to the previous handlers.

    The ring buffer delivers records through a C callback. An exception raised in it is lost, so a signal that arrived
    then would have no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came: list[signal.Signals] = []
    before = {
        number: signal.signal(number, lambda got, _frame: came.append(signal.Signals(got))) for number in _INTERRUPTS
    }

    def deliver() -> None:
        while came:
            number = came.pop(0)
            handler = before[number]
            if callable(handler):
                handler(number, None)
            elif handler == signal.SIG_DFL:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

    try:
        yield deliver
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        deliver()
