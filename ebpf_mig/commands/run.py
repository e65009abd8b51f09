# SPDX-License-Identifier: Apache-2.0
"""Shared by `demo`, `migrate` and `record`: options, the recording's file, and running a migration while tracing.

Messages go to stderr; standard output is for results.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import click

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.commands.formats import rendered
from ebpf_mig.commands.live import LiveLine
from ebpf_mig.commands.options import say as say  # noqa: PLC0414 - others take it from here
from ebpf_mig.commands.options import write_result
from ebpf_mig.commands.report import require_complete
from ebpf_mig.errors import IncompleteError, UsageError, VmmError
from ebpf_mig.linux import clock
from ebpf_mig.linux.process import is_private
from ebpf_mig.probes.tiers import AUTO, NAMES
from ebpf_mig.recording.events import AnyEvent, Header, Mark
from ebpf_mig.recording.file import RecordingWriter, default_name, read_recording
from ebpf_mig.recording.kinds import pid_of
from ebpf_mig.tracing.lifecycle import MigrationWatch
from ebpf_mig.tracing.session import Session
from ebpf_mig.tracing.witness import Witness
from ebpf_mig.vmm.base import Migration, Outcome

LATE_CALLS_NS = 200_000_000
"""Tracing continues this long after both sides reported the end, since late calls still arrive."""
CANCEL_S = 20.0
"""How long we wait for a VMM to cancel after an interruption. QEMU takes 10 ms; a stopped process never cancels."""
BASELINE_S = 0.25
"""How long the guest is traced before the migration begins: the baseline of the brownout."""

_ENDED = {"failed": "failed", "cancelled": "was cancelled"}

_F = TypeVar("_F", bound=Callable[..., object])


def recording_options(function: _F) -> _F:
    """`--output` and `--force` for a command that makes a recording."""
    output = click.option("-o", "--output", metavar="FILE", help="The recording; `-` for stdout. Default: a new name.")
    force = click.option("--force", is_flag=True, help="Overwrite an existing FILE.")
    return output(force(function))


tier_option = click.option(
    "--tier",
    type=click.Choice(NAMES),
    default=AUTO,
    show_default=True,
    envvar="EBPF_MIG_TIER",
    show_envvar=True,
    help="Attach tier; auto uses the cheapest one that fires.",
)

user_stacks_option = click.option(
    "--user-stacks",
    is_flag=True,
    help="Record the VMM's own functions in which waits slept, too; costs some 25 us for each wait in the downtime.",
)


@contextlib.contextmanager
def open_recording(output: str | None, what: str, header: Header, force: bool) -> Iterator[tuple[RecordingWriter, str]]:
    """The writer, and the name to show. `-` writes the recording to standard output."""
    if output == "-":
        if sys.stdout.isatty():
            raise UsageError("a recording is binary and stdout is a terminal", "use -o FILE, or redirect stdout")
        with RecordingWriter(sys.stdout.buffer, header) as writer:
            yield writer, "-"
        return
    name = output or default_name(what)
    with RecordingWriter(name, header, force) as writer:
        yield writer, name


def check_output(output: str | None, force: bool) -> None:
    """Checks before the migration what would make `open_recording` fail after it."""
    if output == "-":
        raise UsageError("the breakdown goes to stdout, so the recording cannot", "give it a file name with --output")
    if output and not force and os.path.lexists(output):
        raise UsageError(f"{output} exists already", "name another file, or overwrite it with --force")


@dataclass
class _Run:
    """A migration in its own thread: its outcome, and when it ended."""

    outcome: Outcome | None = None
    error: BaseException | None = None
    ended_ns: int = 0
    given_up: bool = False
    """The VMM did not cancel in time, and we do not wait any longer."""
    neighbours: Sequence[AnyEvent] = ()
    """Who holds the other ends of pipes and UNIX sockets."""
    called_off: threading.Event = field(default_factory=threading.Event)
    """Set by an interruption, which may come before the trigger."""


def trace_migration(
    migration: Migration,
    timeout_s: float,
    open_writer: Callable[[Header], contextlib.AbstractContextManager[tuple[RecordingWriter, str]]],
    notes: Sequence[str] = (),
    *,
    tier: str = AUTO,
    user_stacks: bool = False,
) -> tuple[Outcome, str]:
    """Arms, migrates, records. Returns the VMM's outcome and the recording's name.

    Ctrl-C cancels the migration, waits for its end (`CANCEL_S` at most, then the VMM is left alone), finishes the
    recording and is then raised again.
    """
    with Session(migration.targets(), tier, grows=migration.grows, user_stacks=user_stacks) as session:
        migration.prepare()
        header = session.arm(notes)
        with open_writer(header) as (writer, name):
            run = _Run()
            thread = threading.Thread(target=_drive, args=(migration, timeout_s, run), name="migration", daemon=True)
            thread.start()
            try:
                interrupted = _pump_until_done(session, writer, migration, run)
            except Exception:
                thread.join()  # tracing has failed; the migration must not
                raise
            if not run.given_up:
                thread.join()
            if run.error is not None:
                session.finish(writer, "failed")
                raise run.error
            outcome = run.outcome or Outcome("unknown")
            reason = "migrated" if outcome.result == "completed" else outcome.result
            here = [event for event in outcome.marks if not (isinstance(event, Mark) and event.pid < 0)]
            session.finish(writer, reason, [*here, *run.neighbours])
    if interrupted is not None:
        raise interrupted
    return outcome, name


def _drive(migration: Migration, timeout_s: float, run: _Run) -> None:
    try:
        off = run.called_off.wait(BASELINE_S)
        run.outcome = Outcome("cancelled", "interrupted before it began") if off else migration.run(timeout_s)
    except BaseException as error:
        run.error = error
    run.ended_ns = clock.monotonic_ns()


def _pump_until_done(
    session: Session, writer: RecordingWriter, migration: Migration, run: _Run
) -> BaseException | None:
    """Pumps events until the migration's thread and the quiet time end. An interruption cancels the migration."""
    give_up_ns = 0
    pids = [target.pid for target in session.targets]
    watch, witness = MigrationWatch(pids), Witness(pids)
    live = LiveLine(watch)
    hops: set[int] = set()

    def until(events: Sequence[AnyEvent]) -> str | None:
        for target in migration.appeared():
            session.add(target)
            watch.joined(target.pid)
            witness.joined(target.pid)
        witness.passed(events)
        own = without_hops(events, hops)
        watch.saw(own)
        if not session.holds:
            live.show(own)
        witness.meet(watch, clock.monotonic_ns())
        run.neighbours = witness.marks()
        for pid in witness.hops - hops:
            hops.add(pid)
            session.follow(pid)
        if give_up_ns and not run.ended_ns and clock.monotonic_ns() >= give_up_ns:
            say(f"the VMM has not cancelled the migration within {CANCEL_S:.0f} s; it is left alone and may complete")
            run.given_up = True
            return "done"
        return "done" if run.ended_ns and clock.monotonic_ns() - run.ended_ns >= LATE_CALLS_NS else None

    interrupted: BaseException | None = None
    while True:
        try:
            with live:
                session.pump(writer, until)
            return interrupted
        except KeyboardInterrupt as error:
            if interrupted is not None:
                raise
            interrupted = error
            say("cancelling the migration")
            run.called_off.set()
            give_up_ns = clock.monotonic_ns() + int(CANCEL_S * 10**9)
            threading.Thread(target=migration.cancel, name="cancel", daemon=True).start()


def without_hops(events: Sequence[AnyEvent], hops: Collection[int]) -> Sequence[AnyEvent]:
    """The events of VMMs: without those of the processes `hops`, which only pass the migration's bytes on."""
    return [event for event in events if pid_of(event) not in hops] if hops else events


def show(name: str, form: str, color: str) -> Breakdown:
    """Prints the breakdown of a new recording, and how to show it again; returns it."""
    recording = read_recording(name)
    breakdown = analyse(recording).breakdown
    write_result(rendered(breakdown, form, "-", color))
    if not is_private(name):
        say(f"recording: {name}; show the report again with: ebpf-mig report {name}")
    return breakdown


def conclude(outcome: Outcome, breakdown: Breakdown, strict: bool) -> None:
    """Raises the error for the exit code: a migration that did not complete, or losses under `--strict`."""
    if outcome.result != "completed":
        raise VmmError(f"the migration {_ENDED.get(outcome.result, 'ended unclearly')}: {outcome.error}")
    if outcome.remark:
        say(outcome.remark)
    require_complete(breakdown, strict)
    if outcome.remark and strict:
        raise IncompleteError(outcome.remark)
