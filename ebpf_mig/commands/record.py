# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig record`: traces without touching the VMM, and leaves a recording."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Callable, Sequence

import click

from ebpf_mig.commands import run
from ebpf_mig.commands.options import DURATION, examples
from ebpf_mig.errors import UsageError
from ebpf_mig.linux import procfs
from ebpf_mig.recording.events import AnyEvent, Target
from ebpf_mig.tracing.lifecycle import MigrationWatch
from ebpf_mig.tracing.session import Session
from ebpf_mig.vmm.identify import process_behind

_AFTER_COMMAND_NS = 1_000_000_000
"""The destination may start a little after the command that migrates has returned."""

_EXAMPLES = examples(
    "ebpf-mig record --pid 4711 --pid 4712",
    "ebpf-mig record --pid 4711 -- ./migrate-vm1.sh",
)


@click.command("record", epilog=_EXAMPLES)
@click.option("--pid", "pids", type=int, multiple=True, help="Source VMM; again: the destination's.")
@click.option("--api-socket", metavar="PATH", help="Instead of --pid: the VMM's control socket, to find it by.")
@click.option("--until-eof", is_flag=True, help="End when standard input does: with the ssh that started us.")
@click.option("--duration", type=DURATION, help="Stop after this long, e.g. 30s.")
@run.recording_options
@run.tier_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def command(
    pids: Sequence[int],
    api_socket: str | None,
    until_eof: bool,
    duration: int | None,
    output: str | None,
    force: bool,
    tier: str,
    command: Sequence[str],
) -> None:
    """Trace running VMMs until the migration ended, the COMMAND and what it began ended, or Ctrl-C."""
    if bool(pids) == (api_socket is not None):
        raise UsageError("record needs to know whom to trace", "give --pid, or --api-socket")
    if api_socket is not None:
        pids = [process_behind(api_socket)]
    if len(set(pids)) != len(pids) or len(pids) > 2:
        raise UsageError("--pid takes the source and, if it runs on this host, one other process, the destination")
    roles = ["source", "destination"] if len(pids) == 2 else ["unknown"]
    targets = [Target(pid=pid, role=role) for pid, role in zip(pids, roles, strict=True)]
    with Session(targets, tier) as session:
        header = session.arm()
        with run.open_recording(output, "record", header, force) as (writer, where):
            child = _start(command)
            run.say(f"tracing {', '.join(map(str, pids))}; Ctrl-C ends it")
            reason = "interrupted"
            try:
                reason = session.pump(writer, _until(pids, duration, child, until_eof))
            finally:
                session.finish(writer, reason)
                _stop(child)
                run.say(f"{reason}; look at it with: ebpf-mig report {where}")


def _start(command: Sequence[str]) -> subprocess.Popen[bytes] | None:
    if not command:
        return None
    try:
        return subprocess.Popen(command)
    except OSError as error:
        raise UsageError(f"cannot run {command[0]}: {error.strerror}") from error


def _stop(child: subprocess.Popen[bytes] | None) -> None:
    if child is not None and child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)


def _input_ended() -> bool:
    """Whether whoever holds the other end of our standard input has let go of it; what it writes is dropped."""
    while select.select([0], [], [], 0)[0]:
        try:
            if not os.read(0, 4096):
                return True
        except OSError:
            return True
    return False


def _until(
    pids: Sequence[int], duration_ns: int | None, child: subprocess.Popen[bytes] | None, until_eof: bool
) -> Callable[[Sequence[AnyEvent]], str | None]:
    watch = MigrationWatch(pids)
    begin = time.monotonic_ns()
    ended = 0

    def until(events: Sequence[AnyEvent]) -> str | None:
        nonlocal ended
        watch.saw(events)
        now = time.monotonic_ns()
        verdict = watch.verdict(now, [pid for pid in pids if procfs.is_alive(pid)])
        if verdict is not None:
            return verdict
        if duration_ns is not None and now - begin >= duration_ns:
            return "duration"
        if until_eof and _input_ended():
            return "command-ended"
        if child is not None and child.poll() is not None:
            ended = ended or now
            if now - ended >= _AFTER_COMMAND_NS:
                return "command-ended"
        return None

    return until
