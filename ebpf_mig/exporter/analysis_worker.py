# SPDX-License-Identifier: Apache-2.0
"""The analyst: a process of user nobody without capabilities, which reads recordings and makes breakdowns.

In: a socket over which the watch sends `Task`s, each with the descriptor of a recording. Out: `READY`, then an `Answer`
for each task, as a line of JSON. A recording that breaks its parser only affects this process.

It starts while the watch still has the privilege to make it nobody. Then it sleeps and stays small: it forks a child
for the work, which ends after a while without any.
Run as `python -m ebpf_mig.exporter.analysis_worker SOCKET PARENT`.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
from typing import TYPE_CHECKING, BinaryIO

from ebpf_mig.linux import capabilities

if TYPE_CHECKING:
    from ebpf_mig.exporter.messages import Answer, Task

IDLE_S = 10.0
"""How long the child waits for the next migration. Importing its modules takes a third of a second of CPU time."""
PATIENCE_S = 100
"""Time-out of one analysis, in seconds. The largest recordings take a few."""
READY = b"ready\n"
"""Sent once, when all privilege is gone. Nothing is analysed before."""
MEMORY_BYTES = 2 << 30
"""Limit of the address space. `tracker.KEPT_EVENTS` of the largest events take a quarter of it."""


def main(channel: socket.socket) -> None:
    """Forks a child whenever there is work, until the other end is closed."""
    parent = os.getpid()
    while _awaits(channel):
        child = os.fork()
        if child == 0:
            capabilities.die_with_parent(parent)
            _work(channel)
            os._exit(0)
        _, status = os.waitpid(child, os.WUNTRACED)
        if os.WIFSTOPPED(status):  # the watch would wait for its answer for ever
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if status:
            channel.sendall(b'{"error": "the analysis ended with status %d"}\n' % status)


def _awaits(channel: socket.socket) -> bool:
    """Waits for work. False once the other end is closed."""
    try:
        return bool(channel.recv(1, socket.MSG_PEEK))
    except ConnectionResetError:  # the other end was closed before it read READY
        return False


def _work(channel: socket.socket) -> None:
    """Answers tasks until none comes for `IDLE_S`."""
    import msgspec

    from ebpf_mig.exporter.messages import Answer, Task

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while select.select([channel], [], [], IDLE_S)[0]:
        line, fds = _request(channel)
        if not line:
            return
        signal.alarm(PATIENCE_S)
        try:
            with os.fdopen(fds[0], "rb") as recording:
                answer = examine(msgspec.json.decode(line, type=Task), recording)
        except Exception as error:  # a bug in the analysis only affects this migration
            answer = Answer(error=f"{type(error).__name__}: {error}"[:500])
        channel.sendall(msgspec.json.encode(answer) + b"\n")
        signal.alarm(0)


def examine(task: Task, recording: BinaryIO) -> Answer:
    """The summary of the breakdown. RecordingError if the file is no recording."""
    from ebpf_mig.collector import analyse
    from ebpf_mig.exporter.messages import Answer
    from ebpf_mig.exporter.observation import observe, with_parts
    from ebpf_mig.exporter.otel_spans import trace_of
    from ebpf_mig.recording.file import read_recording

    found = analyse(read_recording(recording))
    breakdown = found.breakdown
    side = breakdown.migration.source or breakdown.migration.destination
    vms = sorted(task.vms, key=lambda vm: side is None or vm.pid != side.pid)
    name = next((vm.name for vm in vms if vm.name), "")
    seen = observe(breakdown, at=task.at, recording=task.recording, vmm=vms[0].vmm, vm=name, trigger=task.trigger)
    seen = with_parts(seen, found)
    return Answer(seen, trace_of(found, seen))


def _request(channel: socket.socket) -> tuple[bytes, list[int]]:
    """One line and the descriptor sent with it; empty once the other end is closed."""
    line, fds, _, _ = socket.recv_fds(channel, 1 << 20, 1)
    while line and not line.endswith(b"\n"):
        more = channel.recv(1 << 20)
        if not more:
            return b"", fds
        line += more
    return line, fds


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the watch waits for analyses under way
    capabilities.become_nobody()
    capabilities.die_with_parent(int(sys.argv[2]))  # after becoming nobody: a change of identity clears this
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.sendall(READY)
    main(channel)
