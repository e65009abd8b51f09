# SPDX-License-Identifier: Apache-2.0
"""Shared by `demo --two-hosts` and `migrate --..-host`: two recorders around one migration, and one report of both.

In: recorders, a migration. Out: two recordings in files and their joined breakdown. If the other
host's recording is lost, the breakdown of the remaining half.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.commands import run as tracing
from ebpf_mig.commands.formats import rendered
from ebpf_mig.commands.join import clock_offset_option
from ebpf_mig.commands.options import say, write_result
from ebpf_mig.commands.report import warn
from ebpf_mig.errors import PreflightError, RecordingError, UsageError
from ebpf_mig.joining.match import JoinError
from ebpf_mig.joining.merge import Hint, joined
from ebpf_mig.recording.events import AnyEvent, Mark, Target
from ebpf_mig.recording.file import Recording, RecordingWriter, default_name, read_recording
from ebpf_mig.recording.kinds import pid_of
from ebpf_mig.tracing.recorder import Recorder
from ebpf_mig.tracing.ssh import Remote, RemoteHost
from ebpf_mig.vmm.adapter import Adapter, Values
from ebpf_mig.vmm.base import Migration, Outcome

ROLES = ("source", "destination")


def file_names(output: str | None, what: str, force: bool) -> dict[str, str]:
    """The file of each side's recording. UsageError if one exists already."""
    if output == "-":
        tracing.check_output(output, force)
    base = Path(output or default_name(what))
    stem = base.with_suffix("") if base.suffix == ".rec" else base
    names = {role: f"{stem}.{role}.rec" for role in ROLES}
    for name in names.values():
        tracing.check_output(name, force)
    return names


def driven(migration: Migration, timeout_s: float) -> Outcome:
    """Runs a migration that the recorders trace. Ctrl-C cancels it, waits for its end and is then raised again."""
    outcome: list[Outcome] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            time.sleep(tracing.BASELINE_S)
            outcome.append(migration.run(timeout_s))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="migration", daemon=True)
    thread.start()
    interrupted: KeyboardInterrupt | None = None
    until = float("inf")
    while thread.is_alive() and time.monotonic() < until:
        try:
            thread.join(0.1)
        except KeyboardInterrupt as error:
            if interrupted is not None:
                raise
            interrupted, until = error, time.monotonic() + tracing.CANCEL_S
            say("cancelling the migration")
            threading.Thread(target=migration.cancel, name="cancel", daemon=True).start()
    if interrupted is not None:
        raise interrupted
    if errors:
        raise errors[0]
    time.sleep(tracing.LATE_CALLS_NS / 1e9)
    return outcome[0]


def with_marks(
    recording: Recording, targets: Sequence[Target], marks: Sequence[AnyEvent], key: int | None = None
) -> Recording:
    """The recording of a side, with the version and the marks of its VMM. `key`: see `vmm.base.RemoteEnd`."""
    pids = _traced(recording)
    own = next(iter(pids), 0)
    known = [target for target in targets if target.pid in pids]
    if not recording.header.targets and key is not None and own:  # it started after its recorder
        known = [msgspec.structs.replace(target, pid=own) for target in targets]
    own_marks = [mark for mark in marks if isinstance(mark, Mark) and mark.pid in (pids if key is None else {key})]
    if key is not None:
        own_marks = [msgspec.structs.replace(mark, pid=own) for mark in own_marks]
    header = msgspec.structs.replace(recording.header, targets=known or recording.header.targets)
    return msgspec.structs.replace(recording, header=header, events=[*recording.events, *own_marks])


def _traced(recording: Recording) -> set[int]:
    """The processes of a recording, from its header or else from its events."""
    targets = {target.pid for target in recording.header.targets}
    return targets or {pid for event in recording.events if (pid := pid_of(event)) is not None}


def keep(halves: dict[str, Recording], names: dict[str, str], force: bool) -> None:
    """Writes the halves into their files."""
    for role, half in halves.items():
        with RecordingWriter(names[role], half.header, force) as writer:
            writer.write_many(half.events)


def show(
    halves: dict[str, Recording], names: dict[str, str], form: str, color: str, hint: Hint | None = None
) -> Breakdown:
    """Prints the breakdown of both halves, or of the only one; returns it."""
    for role, half in halves.items():
        warn(names[role], half)
    whole = next(iter(halves.values()))
    kept = ", ".join(names[role] for role in halves)
    again = f"ebpf-mig report {kept}"
    if len(halves) == len(ROLES):
        try:
            whole = joined(halves["source"], halves["destination"], (names["source"], names["destination"]), hint)
            again = f"ebpf-mig join {' '.join(names[role] for role in ROLES)}"
        except (JoinError, UsageError) as error:
            say(f"the two recordings cannot be joined: {error}; this is the source's half")
    breakdown = analyse(whole).breakdown
    write_result(rendered(breakdown, form, "-", color))
    say(f"recordings: {kept}; show the report again with: {again}")
    return breakdown


def recording_of(recorder: Recorder) -> Recording | None:
    """The recording of a recorder. If there is none, prints the reason and returns None."""
    try:
        recording = recorder.finish()
    except RecordingError as error:
        say(f"{recorder.name}: its recording is lost: {error}; {recorder.last_line()}")
        return None
    if recorder.lost:
        say(f"{recorder.name}: its recording is incomplete: {recorder.lost}")
    return recording


def elsewhere_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--source-host` and the related options, for a command that migrates."""
    options = (
        click.option("--source-host", metavar="HOST", help="Host of the source, reached with ssh HOST."),
        click.option("--destination-host", metavar="HOST", help="Host of the destination, reached with ssh HOST."),
        click.option(
            "--remote-command", metavar="CMD", help="Run commands on the other host with this instead of ssh HOST."
        ),
        click.option(
            "--remote-tool",
            metavar="CMD",
            default="ebpf-mig",
            show_default=True,
            help="How to start ebpf-mig on the other host.",
        ),
        clock_offset_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def way_of(
    source_host: str | None, destination_host: str | None, remote_command: str | None, tool: str
) -> tuple[str, RemoteHost] | None:
    """(role of the remote end, how to reach it); None if both ends are local."""
    if source_host and destination_host:
        raise UsageError("one of the two hosts must be this host", "run ebpf-mig on the source's host")
    role, host = ("source", source_host) if source_host else ("destination", destination_host)
    if host is None:
        if remote_command is not None:
            raise UsageError(
                "--remote-command is given, but neither --source-host nor --destination-host",
                "name the host that it reaches with one of them",
            )
        return None
    if host.startswith("-"):
        raise UsageError(f"{host} is not a host name")
    return role, RemoteHost(host, remote_command, tool)


def across(
    way: tuple[str, RemoteHost],
    adapter: Adapter,
    values: Values,
    timeout_s: float,
    names: dict[str, str],
    *,
    tier: str,
    user_stacks: bool,
    force: bool,
) -> tuple[Outcome, dict[str, Recording], str]:
    """Migrates with a remote end. Returns the outcome, the recorded halves, and why one is missing.

    `values`: values of the adapter's options.
    """
    role, there = way
    here = next(name for name in ROLES if name != role)
    with Remote(there, role, adapter.far_end(role, values), tier, user_stacks) as remote:
        if remote.problem:
            say(f"{remote.problem}; only the {here}'s half is traced")
        near = {**values, role: remote.api} if remote.api else values
        with contextlib.closing(adapter.connect(near, (role, remote.end))) as migration:
            open_writer = functools.partial(tracing.open_recording, names[here], "migrate", force=force)
            outcome, _ = tracing.trace_migration(migration, timeout_s, open_writer, tier=tier, user_stacks=user_stacks)
            here_is = migration.targets()
            vmm = here_is[0].vmm if here_is else ""
            target = Target(pid=remote.end.pid, role=role, vmm=vmm, vmm_version=migration.version(role))
        halves = {here: read_recording(names[here])}
        other = recording_of(remote.recorder) if remote.recorder else None
    if other is not None:
        far = with_marks(other, [target], outcome.marks, remote.end.key)
        keep({role: far}, names, force)
        halves[role] = far
    return outcome, halves, remote.problem


def conclude(
    met: tuple[Outcome, dict[str, Recording], str],
    names: dict[str, str],
    form: str,
    color: str,
    hint: Hint | None,
    *,
    strict: bool,
) -> None:
    """Prints the result of `across`, and raises the error for the exit code. A missing half is a preflight error."""
    outcome, halves, problem = met
    tracing.conclude(outcome, show(halves, names, form, color, hint), strict)
    if problem:
        click.get_current_context().exit(PreflightError.exit_code)
