# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig record`: traces without controlling the VMM, and writes a recording."""

from __future__ import annotations

import functools
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import click

from ebpf_mig.commands import run
from ebpf_mig.commands.child import Child
from ebpf_mig.commands.live import LiveLine
from ebpf_mig.commands.options import DURATION, examples
from ebpf_mig.errors import UsageError
from ebpf_mig.linux import clock, descriptors, procfs
from ebpf_mig.linux.capabilities import require_tracing
from ebpf_mig.linux.process import is_private
from ebpf_mig.recording.events import AnyEvent, Target
from ebpf_mig.text import printable
from ebpf_mig.tracing.lifecycle import MigrationWatch
from ebpf_mig.tracing.session import Session, require_alive, require_kvm
from ebpf_mig.tracing.witness import Witness
from ebpf_mig.vmm import adapters
from ebpf_mig.vmm.identify import process_behind
from ebpf_mig.vmm.processes import Followed

_AFTER_COMMAND_NS = 1_000_000_000
"""How long tracing continues after the end of COMMAND: the destination may start a little later."""

_EXAMPLES = examples(
    "ebpf-mig record --pid 4711 --pid 4712",
    "ebpf-mig record --pid 4711 -- ./migrate-vm1.sh",
    *(line for one in adapters() for line in one.examples.get("record", ())),
)


@click.command("record", epilog=_EXAMPLES)
@click.option("--pid", "pids", type=int, multiple=True, help="Pid of the source VMM; repeat it for the destination.")
@click.option("--vm", metavar="NAME", help="Instead of --pid: the VM's name, a glob pattern or its UUID.")
@click.option("--api-socket", metavar="PATH", help="Instead of --pid: path of the VMM's control socket.")
@click.option("--until-eof", is_flag=True, help="Stop on stdin EOF, e.g. when the ssh session closes.")
@click.option("--duration", type=DURATION, help="Stop after this long, e.g. 30s.")
@run.recording_options
@run.tier_option
@run.user_stacks_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def command(
    pids: Sequence[int],
    vm: str | None,
    api_socket: str | None,
    until_eof: bool,
    duration: int | None,
    output: str | None,
    force: bool,
    tier: str,
    user_stacks: bool,
    command: Sequence[str],
) -> None:
    """Trace running VMMs until the migration or COMMAND ends, or Ctrl-C.

    record never ends COMMAND. It only passes your interruption on, and exits with the exit code of COMMAND.
    With --vm, a process of the VM that starts later is traced, too: on a destination there is none before the
    migration.
    """
    if sum((bool(pids), vm is not None, api_socket is not None)) != 1:
        raise UsageError("record needs exactly one of --pid, --vm and --api-socket", "give --pid PID, for example")
    followed = Followed(vm) if vm is not None else None
    if followed is not None:
        pids = list(followed.pids)
    elif api_socket is not None:
        pids = [process_behind(api_socket)]
    if len(set(pids)) != len(pids) or len(pids) > 2:
        raise UsageError("--pid can be given for two processes at most, the source and the destination")
    roles = ["source", "destination"] if len(pids) == 2 else ["unknown"]
    targets = [Target(pid=pid, role=role) for pid, role in zip(pids, roles, strict=False)]
    require_tracing()
    require_alive(targets)
    require_kvm(targets)
    with Session(targets, tier, grows=True, user_stacks=user_stacks) as session:
        header = session.arm()
        if pids:
            _report_if_paused(session, pids[0], alone=len(pids) == 1)
        to = 2 if output == "-" else 1
        with (
            run.open_recording(output, "record", header, force) as (writer, where),
            Child(command, stdout=to) if command else nullcontext() as child,
        ):
            traced = ", ".join(map(str, pids)) or f"begins as soon as {printable(vm or '')} starts"
            run.say(f"tracing {traced}; Ctrl-C stops it")
            reason = "interrupted"
            watch, witness = MigrationWatch(pids), Witness(pids)
            arrive = functools.partial(_arrive, session, followed)
            try:
                with LiveLine(watch, plain=not until_eof and output != "-", shared=child is not None) as live:
                    reason = session.pump(
                        writer, _until(pids, duration, child, until_eof, witness, arrive, session, live)
                    )
            finally:
                try:
                    session.finish(writer, reason, witness.marks())
                    run.say(f"{reason}; show it with: ebpf-mig report {where}" if not is_private(where) else reason)
                finally:
                    if child is not None:
                        child.wait()
    if child is not None:
        _pass_on(child)


def _arrive(session: Session, followed: Followed | None) -> list[int]:
    """Adds the processes that have started since."""
    found = followed.new() if followed is not None else []
    for pid in found:
        session.add(Target(pid=pid, role="unknown"))
        run.say(f"tracing {pid}, too")
    return found


def _report_if_paused(session: Session, pid: int, *, alone: bool) -> None:
    """Prints a line if no vCPU of a VM runs in any of several checks. Its migration then has no blackout."""
    for _ in range(3):
        if not descriptors.vcpus_of(pid) or session.runs_vcpu(pid):
            return
        time.sleep(0.02)
    either = "paused or waiting for its migration" if alone else "paused"
    run.say(f"the guest of process {pid} is {either}: no vCPU runs")


def _pass_on(child: Child) -> None:
    """Exits with the status of COMMAND, or with that of the interruption."""
    if child.interrupted is not None:
        signal.raise_signal(child.interrupted)
    if child.code:
        click.get_current_context().exit(child.code)


def _input_ended() -> bool:
    """Whether the other end of standard input was closed. Input is discarded."""
    while select.select([0], [], [], 0)[0]:
        try:
            if not os.read(0, 4096):
                return True
        except OSError:
            return True
    return False


def _until(
    pids: Sequence[int],
    duration_ns: int | None,
    child: Child | None,
    until_eof: bool,
    witness: Witness,
    arrive: Callable[[], list[int]],
    session: Session,
    live: LiveLine,
) -> Callable[[Sequence[AnyEvent]], str | None]:
    """The condition that ends tracing. While COMMAND runs, the end of a migration does not."""
    watch, known = live.watch, list(pids)
    begin = clock.monotonic_ns()
    ended = 0
    hops: set[int] = set()

    def until(events: Sequence[AnyEvent]) -> str | None:
        nonlocal ended
        for pid in arrive():
            known.append(pid)
            watch.joined(pid)
            witness.joined(pid)
        witness.passed(events)
        own = run.without_hops(events, hops)
        watch.saw(own)
        if not session.holds:
            live.show(own)
        now = clock.monotonic_ns()
        witness.look(watch, now)
        for pid in witness.hops - hops:
            hops.add(pid)
            session.follow(pid)
        if duration_ns is not None and now - begin >= duration_ns:
            return "duration"
        if until_eof and _input_ended():
            return "command-ended"
        if child is not None:
            if child.abandoned():
                return "interrupted"
            if child.code is None:
                return None
            if child.interrupted is not None:
                return "interrupted"
            ended = ended or now
        if session.holds:
            return None
        verdict = watch.verdict(now, [pid for pid in known if procfs.is_alive(pid)]) if known else None
        if verdict is None and ended and not watch.under_way and now - ended >= _AFTER_COMMAND_NS:
            return "command-ended"
        return verdict

    return until
