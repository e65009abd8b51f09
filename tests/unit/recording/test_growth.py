# SPDX-License-Identifier: Apache-2.0
"""Twice as many events of a kind take about twice as long: in every report, in redaction, in joining."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from ebpf_mig.analysis import lanes
from ebpf_mig.collector import analyse
from ebpf_mig.errors import EbpfMigError
from ebpf_mig.joining.merge import joined
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.recording.kinds import KINDS
from ebpf_mig.recording.redact import redacted
from ebpf_mig.report import csv, html, perfetto, text
from ebpf_mig.report import json as json_report
from tests.unit.recording.samples import filled

DATA = Path(__file__).parents[2] / "data"
MOST_GROWTH = 2.5
FEW, TRIES = (4000, 8000), 6
FREQUENT = (ev.Ioctl, ev.Transfer, ev.Segment, ev.OffCpu, ev.Socket, ev.Thread)
LEAST_S = 0.02
"""Times below this are not compared: they are noise."""


def some(
    kind: type[ev.Event], number: int, apart: bool, within: tuple[int, int], pids: tuple[int, int]
) -> Iterator[Any]:
    """Events of one kind, spread over the recording; `apart`: each of another thread, socket, name and stack."""
    step = max(1, (within[1] - within[0]) // number)
    plain = filled(kind, "x", {"fd": 3, "direction": 0, "hidden": 0, "remote": 0, "vcpu": -1})
    for i in range(number):
        at = within[0] + i * step
        thread, socket = (100_000 + i, 200_000 + i) if apart else (pids[0], 5)
        known = {
            "begin_ns": at, "at_ns": at, "since_ns": at, "enter_ns": at, "end_ns": at + step, "until_ns": at + step,
            "exit_ns": at + step, "last_exit_ns": max(1, at - step), "pid": pids[i % 2], "tid": thread,
            "socket": socket, "cmd": 0x4010AE42, "bytes": 4096, "position": i * 4096,
            "local": f"10.0.0.1:{1000 + i % 60000}",
            "remote": f"10.0.0.2:{1000 + i % 60000}", "last_ret": -4, "detail": f"detail {i}", "off_cpu_ns": 5,
        }  # fmt: skip
        if kind is ev.OwnCost:
            known["remote"] = False
        if kind is ev.Thread:
            known |= {"name": f"thread {i}", "vcpu": i if apart else -1}
        if apart and kind in (ev.OffCpu, ev.Samples):
            known["stack"] = (f"function_{i}", "schedule")
        yield replace(plain, **{name: known[name] for name in plain.__struct_fields__ if name in known})


def recording(name: str, kind: type[ev.Event], number: int, apart: bool) -> Recording:
    seed = read_recording(DATA / name)
    pids = [target.pid for target in seed.header.targets]
    times = [event.at_ns for event in seed.events if isinstance(event, (ev.OwnCost, ev.VcpuState, ev.Kick))]
    more = some(kind, number, apart, (min(times), max(times)), (pids[0], pids[-1]))
    return replace(seed, events=[*seed.events[:-1], *more, *seed.events[-1:]])


def _view(render: Callable[[Any, Any], object]) -> Callable[[Recording], object]:
    def run(found: Recording) -> object:
        analysis = analyse(found)
        return render(analysis, lanes.view(analysis))

    return run


def _join(found: Recording) -> object:
    other = read_recording(DATA / "hosts/destination.rec")
    try:
        return joined(replace(found, events=[replace(event) for event in found.events]), other)
    except EbpfMigError:  # such events can make the two recordings contradict each other; the time counts nevertheless
        return None


WAYS: dict[str, Callable[[Recording], object]] = {
    "text": lambda found: text.render(analyse(found).breakdown),
    "json": lambda found: json_report.render(analyse(found).breakdown),
    "csv": lambda found: csv.render(analyse(found).breakdown),
    "html": _view(lambda analysis, view: html.render(analysis.breakdown, view)),
    "perfetto": _view(lambda analysis, view: perfetto.render(analysis.breakdown, analysis.header, view)),
    "redact": redacted,
    "join": _join,
}


def cost(way: Callable[[Recording], object], found: Recording) -> float:
    """CPU time in s, without full garbage collections: they happen at some sizes only."""
    gc.collect()
    gc.disable()
    try:
        begin = time.process_time()
        way(found)
        return time.process_time() - begin
    finally:
        gc.enable()


def doubled(way: Callable[[Recording], object], few: Recording, many: Recording) -> tuple[float, float]:
    """The costs of both, in s."""
    once = twice = 1e9
    for _ in range(TRIES):
        once, twice = min(once, cost(way, few)), min(twice, cost(way, many))
        if in_proportion(once, twice):
            break
    return once, twice


def in_proportion(once: float, twice: float) -> bool:
    return twice < max(once, LEAST_S) * MOST_GROWTH


@pytest.mark.parametrize(
    ("kind", "apart"),
    [
        *((kind, True) for kind in FREQUENT),
        *(pytest.param(kind, False, marks=pytest.mark.long) for kind in FREQUENT),
        *(pytest.param(k.event, True, marks=pytest.mark.long) for k in KINDS if k.event not in FREQUENT),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "apart" if value else "alike",
)
def test_twice_the_events_take_twice_the_time(kind: type[ev.Event], apart: bool) -> None:
    """CPU time, the minimum of several runs each, to exclude what a busy machine adds.

    Once in a while a step beyond a cache costs more at one size. What grows too fast does so at the next size, too.
    """
    for name, way in WAYS.items():
        file = "hosts/source.rec" if name == "join" else "qemu-7.2-tcp.rec"
        costs = []
        for number in FEW:
            few, many = (recording(file, kind, count, apart) for count in (number, 2 * number))
            costs.append(doubled(way, few, many))
            if in_proportion(*costs[-1]):
                break
        assert in_proportion(*costs[-1]), f"{name}: {costs} s"
