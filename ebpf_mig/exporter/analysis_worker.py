# SPDX-License-Identifier: Apache-2.0
"""The analyst: a process of user nobody without capabilities, which reads recordings and makes breakdowns.

In: a socket over which the watch sends `Task`s, each with the descriptor of a recording. Out: an `Answer` for each
task. A recording that breaks its parser only affects this process. It is started when there is work (`analyst.py`),
and ends after a while without any. Run as `python -m ebpf_mig.exporter.analysis_worker OPTIONS`.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
from typing import BinaryIO

import msgspec

from ebpf_mig.collector import analyse
from ebpf_mig.exporter.messages import TASK_BYTES, Answer, Task
from ebpf_mig.exporter.observation import observe, with_parts
from ebpf_mig.exporter.otel_spans import trace_of
from ebpf_mig.linux import capabilities
from ebpf_mig.recording.file import read_recording

IDLE_S = 10.0
"""How long it waits for the next migration. Importing its modules takes a third of a second of CPU time."""
PATIENCE_S = 100
"""Time-out of one analysis, in seconds. The largest recordings take a few."""
MEMORY_BYTES = 2 << 30
"""Limit of the address space. `track.KEPT_EVENTS` of the largest events take a quarter of it."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What is passed on the command line, as JSON."""

    work: int
    ready: int
    parent: int


def work(channel: socket.socket) -> None:
    """Answers tasks until none comes for `IDLE_S`, or the other end is closed."""
    while select.select([channel], [], [], IDLE_S)[0]:
        data, fds, _, _ = socket.recv_fds(channel, TASK_BYTES, 1)
        if not data:
            return
        signal.alarm(PATIENCE_S)
        task = msgspec.json.decode(data, type=Task)
        try:
            with os.fdopen(fds[0], "rb") as recording:
                answer = examine(task, recording)
        except Exception as error:  # a bug in the analysis only affects this migration
            answer = Answer(task.id, error=f"{type(error).__name__}: {error}"[:500])
        channel.sendall(msgspec.json.encode(answer))
        signal.alarm(0)


def examine(task: Task, recording: BinaryIO) -> Answer:
    """The summary of the breakdown. RecordingError if the file is no recording."""
    found = analyse(read_recording(recording))
    breakdown = found.breakdown
    side = breakdown.migration.source or breakdown.migration.destination
    vms = sorted(task.vms, key=lambda vm: side is None or vm.pid != side.pid)
    name = next((vm.name for vm in vms if vm.name), "")
    seen = observe(breakdown, at=task.at, recording=task.recording, vmm=vms[0].vmm, vm=name, trigger=task.trigger)
    seen = with_parts(seen, found)
    return Answer(task.id, seen, trace_of(found, seen))


def main(arguments: list[str]) -> None:
    """See the module."""
    options = msgspec.json.decode(arguments[0], type=Options)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the watch waits for analyses under way
    capabilities.become_nobody()
    capabilities.die_with_parent(options.parent)  # after becoming nobody: a change of identity clears this
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.write(options.ready, b"r")
    work(socket.socket(fileno=options.work))


if __name__ == "__main__":
    main(sys.argv[1:])
