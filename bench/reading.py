# SPDX-License-Identifier: Apache-2.0
"""Time and memory to read and analyse a long recording, by number of events: `python -m bench.reading`.

In: a real recording. Its pre-copy is repeated, shifted in time and stream position, until it has the wanted number of
events; the switchover stays as it was. Out: a Markdown table for docs/overhead.md. Exit code 1 if a million events take
more than 2 s or 500 MB, or if the largest recording costs over 1.5 times as much per event as a million events. Each
measurement is the best of several tries, in a separate process. Seconds are CPU time, so that other processes do not
count; the wall clock is shown beside it. Needs no privilege.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ebpf_mig.analysis import dirty_log
from ebpf_mig.analysis.material import split
from ebpf_mig.analysis.switchover import find
from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse, analyse_file
from ebpf_mig.recording.events import AnyEvent, Ending, Header, Mark, Socket, Thread, Transfer, VcpuState
from ebpf_mig.recording.file import Recording, RecordingWriter, read_recording
from ebpf_mig.recording.kinds import BY_TYPE

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
SEED = DATA / "qemu-11.1-3vcpus.rec"
MILLION = 1_000_000
MOST_S, MOST_BYTES, MOST_GROWTH = 2.0, 500 * 10**6, 1.5


def shifted(event: AnyEvent, by_ns: int, positions: dict[tuple[int, int], int], times: int) -> AnyEvent:
    """The event `by_ns` later and `times` repetitions further in its stream; `positions`: bytes per repetition."""
    changes = {name: at + by_ns for name in BY_TYPE[type(event)].instants if (at := getattr(event, name, 0))}
    if isinstance(event, Transfer):
        changes["position"] = event.position + times * positions.get((event.socket, event.direction), 0)
    return msgspec.structs.replace(event, **changes)


def begin_of(event: AnyEvent) -> int:
    """The begin of an event; 0 if it has no instant."""
    return getattr(event, "begin_ns", 0) or getattr(event, "at_ns", 0)


def precopy_of(header: Header, events: list[AnyEvent]) -> tuple[int, int]:
    """From the first time the dirty log is switched on to just before the first kick, on the recording's clock."""
    recording = Recording(header=header, events=events)
    source = analyse(recording).breakdown.migration.source
    if source is None:
        raise ValueError("the recording has no source")
    process = split(recording).processes[source.pid]
    found = find(process, None, process.transfers, ())
    begin = dirty_log.switched_on(process, None)
    if begin is None or found is None:
        raise ValueError("the recording has no switchover, or its log was on all the time")
    return begin, min([*found.kicks.values(), found.stop])


def stretched(
    header: Header, events: list[AnyEvent], count: int, mirrored: dict[int, int] | None = None
) -> Iterator[AnyEvent]:
    """A recording of about `count` events: those before the pre-copy, the pre-copy repeated, and the rest.

    `mirrored`: maps a socket to the one with the same stream, which gives its bytes per repetition.
    """
    begin, end = precopy_of(header, events)
    apart = (Socket, Thread, Mark, VcpuState, Ending)
    middle = [e for e in events if begin < begin_of(e) < end and not isinstance(e, apart)]
    positions: Counter[tuple[int, int]] = Counter()
    for event in middle:
        if isinstance(event, Transfer):
            positions[event.socket, event.direction] += event.bytes
    for end_, other in (mirrored or {}).items():
        for direction in (0, 1):
            positions[end_, direction] = positions[other, 1 - direction]
    copies = max(0, (count - len(events)) // len(middle))
    once = {id(event) for event in middle}
    yield from (e for e in events if begin_of(e) < end and id(e) not in once)
    for number in range(copies + 1):
        for event in middle:
            yield shifted(event, number * (end - begin), positions, number)
    for event in events:
        if begin_of(event) >= end:
            yield shifted(event, copies * (end - begin), positions, copies)


def peak_bytes() -> int:
    """Peak resident memory of this process (VmHWM; unlike ru_maxrss it does not include the parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure_here(path: str) -> None:
    """Reads and analyses. Prints the figures as JSON."""
    wall, begin = time.perf_counter(), time.process_time()
    read = begin

    def has_read(recording: Recording) -> Recording:
        nonlocal read
        read = time.process_time()
        return recording

    breakdown = analyse_file(path, has_read).breakdown
    done = time.process_time()
    said = {
        "read_s": read - begin,
        "analyse_s": done - read,
        "wall_s": time.perf_counter() - wall,
        "peak": peak_bytes(),
        "switchover": switchover_of(breakdown),
    }
    print(json.dumps(said))


def switchover_of(breakdown: Breakdown) -> list[int | None]:
    """The figures that a longer pre-copy must not change."""
    return [breakdown.blackout_ns, breakdown.window_ns, *(phase.duration_ns for phase in breakdown.phases)]


def measure(path: Path, tries: int) -> dict[str, Any]:
    """The best of several tries, each in a new process."""
    best: dict[str, Any] = {}
    for _ in range(tries):
        command = [sys.executable, "-m", "bench.reading", "--measure", str(path)]
        said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if not best or said["read_s"] + said["analyse_s"] < best["read_s"] + best["analyse_s"]:
            best = said
    return best


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, nargs="*", default=[MILLION, 3 * MILLION, 10 * MILLION])
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--measure", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure_here(options.measure)
        return 0
    seed = read_recording(SEED)
    same = switchover_of(analyse(seed).breakdown)
    print("| events | file MB | read s | analyse s | both s | us an event | wall clock s | peak MB | bytes an event |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    per_event: list[float] = []
    good = True
    for count in options.events:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "long.rec"
            with RecordingWriter(path, seed.header) as writer:
                writer.write_many(stretched(seed.header, seed.events, count))
            size = path.stat().st_size
            said = {"events": writer.events_kept, **measure(path, options.tries)}
        if said["switchover"] != same:
            raise ValueError(f"{count} events: the switchover is not the real one: {said['switchover']}, {same}")
        both = said["read_s"] + said["analyse_s"]
        per_event.append(both / said["events"])
        if count == MILLION:
            good = both <= MOST_S and said["peak"] <= MOST_BYTES
        print(
            f"| {said['events']} | {size / 1e6:.1f} | {said['read_s']:.2f} | {said['analyse_s']:.2f} | {both:.2f} | "
            f"{both / said['events'] * 1e6:.2f} | "
            f"{said['wall_s']:.2f} | {said['peak'] / 1e6:.0f} | {said['peak'] / said['events']:.0f} |",
            flush=True,
        )
    linear = per_event[-1] <= MOST_GROWTH * per_event[0]
    print(f"\nat most {MOST_S:.0f} s and {MOST_BYTES / 1e6:.0f} MB for a million: {'yes' if good else 'NO'}; ", end="")
    print(f"linear: {'yes' if linear else 'NO'}, {per_event[-1] / per_event[0]:.2f} times as much an event")
    return 0 if good and linear else 1


if __name__ == "__main__":
    sys.exit(main())
