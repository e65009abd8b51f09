# SPDX-License-Identifier: Apache-2.0
"""What `demo --two-hosts` and `migrate --..-host` share: two recorders around one migration, and one report of both.

In: recorders, a migration. Out: two recordings in files and their joined breakdown; where the other host's is lost,
that of the half that is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.commands import tracing
from ebpf_mig.commands.common import say, write_result
from ebpf_mig.commands.report import rendered, warn
from ebpf_mig.errors import RecordingError, UsageError
from ebpf_mig.events import AnyEvent, Mark, Target
from ebpf_mig.joining import Hint, joined
from ebpf_mig.matching import JoinError
from ebpf_mig.recorder import Recorder
from ebpf_mig.recording import Recording, RecordingWriter, default_name
from ebpf_mig.vmm.base import Migration, Outcome

ROLES = ("source", "destination")


def file_names(output: str | None, what: str, force: bool) -> dict[str, str]:
    """Where each side's recording goes; UsageError if a file is there already."""
    if output == "-":
        tracing.check_output(output, force)
    base = Path(output or default_name(what))
    stem = base.with_suffix("") if base.suffix == ".rec" else base
    names = {role: f"{stem}.{role}.rec" for role in ROLES}
    for name in names.values():
        tracing.check_output(name, force)
    return names


def driven(migration: Migration, timeout_s: float) -> Outcome:
    """Runs a migration that others trace. Ctrl-C cancels it, waits for its end and is then raised again."""
    outcome: list[Outcome] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            time.sleep(tracing.BASELINE_S)
            outcome.append(migration.run(timeout_s))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="migration")
    thread.start()
    interrupted: KeyboardInterrupt | None = None
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt as error:
            if interrupted is not None:
                raise
            interrupted = error
            say("cancelling the migration")
            threading.Thread(target=migration.cancel, name="cancel", daemon=True).start()
    if interrupted is not None:
        raise interrupted
    if errors:
        raise errors[0]
    time.sleep(tracing.QUIET_NS / 1e9)
    return outcome[0]


def told(recording: Recording, targets: Sequence[Target], marks: Sequence[AnyEvent]) -> Recording:
    """A side's recording with what its VMM said of itself and of the migration."""
    pids = {target.pid for target in recording.header.targets}
    known = [target for target in targets if target.pid in pids]
    said = [mark for mark in marks if isinstance(mark, Mark) and mark.pid in pids]
    header = msgspec.structs.replace(recording.header, targets=known or recording.header.targets)
    return msgspec.structs.replace(recording, header=header, events=[*recording.events, *said])


def show(
    halves: dict[str, Recording], names: dict[str, str], force: bool, form: str, color: str, hint: Hint | None = None
) -> Breakdown:
    """Keeps the halves in files; prints the breakdown of both, or of the one there is, and returns it."""
    for role, half in halves.items():
        warn(names[role], half)
        with RecordingWriter(names[role], half.header, force) as writer:
            writer.write_many(half.events)
    whole = next(iter(halves.values()))
    kept = ", ".join(names[role] for role in halves)
    again = f"ebpf-mig report {kept}"
    if len(halves) == len(ROLES):
        try:
            whole = joined(halves["source"], halves["destination"], (names["source"], names["destination"]), hint)
            again = f"ebpf-mig join {' '.join(names[role] for role in ROLES)}"
        except (JoinError, UsageError) as error:
            say(f"the two recordings cannot be joined: {error}; this is the source's half")
    breakdown = analyse(whole.header, whole.events, truncated=whole.truncated, unknown=whole.unknown)
    write_result(rendered(breakdown, form, "-", color))
    say(f"recordings: {kept}; see it again with: {again}")
    return breakdown


def taken(recorder: Recorder) -> Recording | None:
    """What a recorder recorded; None, and one line that says why, if it is nothing."""
    try:
        recording = recorder.finish()
    except RecordingError as error:
        say(f"{recorder.name}: its recording is lost: {error}; {recorder.complaint()}")
        return None
    if recorder.lost:
        say(f"{recorder.name}: its recording is not whole: {recorder.lost}")
    return recording
