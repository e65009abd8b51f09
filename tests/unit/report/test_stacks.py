# SPDX-License-Identifier: Apache-2.0
"""Stacks as folded lines, for speedscope and for pprof: the totals are the recording's, and other tools read them."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from ebpf_mig.analysis.result import Analysis
from ebpf_mig.analysis.stacks import Kind, observe
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import AnyEvent, OffCpu, Samples, Thread
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.report import folded, pprof, speedscope
from tests.conftest import npm_package, requires
from tests.unit.commands.test_cli import run
from tests.unit.report.test_replay import DATA, RECORDINGS

QEMU = DATA / "qemu-7.2-tcp.rec"
STOPPED = [path for path in RECORDINGS if not path.stem.endswith(("cancelled", "died")) or "local" in path.stem]
WALK, PERIOD = ("kvm_mmu_slot_remove_write_access", "kvm_vm_ioctl", "do_syscall_64"), 100_000
Sum = Counter[tuple[str, ...]]


@cache
def loaded(path: Path) -> tuple[Recording, Analysis]:
    recording = read_recording(path)
    return recording, analyse(recording)


def with_events(*more: AnyEvent) -> Analysis:
    """A real migration with further events."""
    recording, _ = loaded(QEMU)
    return analyse(replace(recording, events=[*recording.events, *more]))


def of_recording(recording: Recording, analysis: Analysis) -> Sum:
    """ns off the CPU by phase and tid, from the events and the public phases alone."""
    sums: Sum = Counter()
    for phase in analysis.breakdown.phases:
        for begin, end in phase.spans:
            since, until = analysis.origin_ns + begin, analysis.origin_ns + end
            for e in recording.events:
                if isinstance(e, OffCpu):
                    sums[phase.phase, str(e.tid)] += max(0, min(e.end_ns, until) - max(e.begin_ns, since))
    return +sums


def lines(text: str) -> list[tuple[list[str], int]]:
    """As flamegraph.pl reads them."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"(.*)\s+(\d+)", line)
        assert match is not None, line
        frames = match[1].split(";")
        assert all(frame and frame == frame.strip() for frame in frames), line
        found.append((frames, int(match[2])))
    return found


@pytest.mark.parametrize("path", STOPPED, ids=lambda path: path.stem)
def test_totals_are_those_of_the_recording(path: Path) -> None:
    recording, analysis = loaded(path)
    wanted = of_recording(recording, analysis)
    rows = observe(analysis)
    assert wanted and wanted == sums((r.phase, r.thread.rpartition(" ")[2], r.duration_ns) for r in rows)
    total = sum(wanted.values())
    assert sum(ns for _, ns in lines(folded.render(rows))) == total
    (profile,) = json.loads(speedscope.render(rows, "x"))["profiles"]
    assert sum(profile["weights"]) == total
    read = decoded(pprof.render(rows, analysis.header, analysis.attribution.window))
    assert sum(sample.value[1] for sample in read.sample) == total
    window = analysis.attribution.window
    assert window is not None
    begun = [e for e in recording.events if isinstance(e, OffCpu) and e.begin_ns < window[1] and e.end_ns > window[0]]
    assert sum(sample.value[0] for sample in read.sample) == len(begun) == sum(row.count for row in rows)


def sums(rows: Iterable[tuple[str, str, int]]) -> Sum:
    found: Sum = Counter()
    for phase, tid, ns in rows:
        found[phase, tid] += ns
    return found


def test_sides_phases_threads_and_frames() -> None:
    recording, analysis = loaded(QEMU)
    known = {target.pid: target.role for target in recording.header.targets}
    of = {e.tid: known[e.pid] for e in recording.events if isinstance(e, OffCpu)}
    for frames, _ in lines(folded.render(observe(analysis))):
        kind, side, phase, thread, *stack = frames
        assert kind == "off-CPU" and side == of[int(thread.rpartition(" ")[2])] and stack
        assert phase in {p.phase for p in analysis.breakdown.phases}
        assert stack[0] in ("entry_SYSCALL_64_after_hwframe", "(runnable, not running)"), "outermost first"


def call_of_the_final_fetch() -> tuple[int, int, int]:
    """Begin, pid and tid of a call that was made in the blackout."""
    _, analysis = loaded(QEMU)
    at = analysis.origin_ns + analysis.breakdown.dirty_log.fetches[0].ioctls[0].begin
    source = analysis.traced.source
    assert source is not None
    return at, source.pid, next(i.tid for i in source.ioctls if i.begin_ns == at)


def test_samples_are_rows_of_their_own() -> None:
    at, pid, tid = call_of_the_final_fetch()
    whole = with_events(
        Samples(at, pid, tid, PERIOD, 7, WALK),
        Samples(at, pid, tid, PERIOD, 2, ()),
        Samples(at - 60_000_000, pid, tid, PERIOD, 9, WALK),  # before the window
    )
    rows = [row for row in observe(whole) if row.kind == Kind.ON_CPU]
    assert [(r.side, r.phase, r.frames, r.duration_ns, r.count) for r in rows] == [
        ("source", "fetch.kernel", ("(no stack)",), 200_000, 2),
        ("source", "fetch.kernel", WALK, 700_000, 7),
    ]
    text = folded.render(rows)
    assert text.splitlines()[1] == f"on-CPU;source;fetch.kernel;{tid};{';'.join(reversed(WALK))} 700000"
    profiles = json.loads(speedscope.render(observe(whole), "x"))["profiles"]
    assert [sum(p["weights"]) for p in profiles][1:] == [900_000]
    values = [list(s.value)[2:] for s in decoded(pprof.render(rows, whole.header, None)).sample]
    assert values == [[2, 200_000], [7, 700_000]]


HOSTILE = "a;b 7\n<c>\x1b[31m\u202e "


def hostile() -> Analysis:
    at, pid, tid = call_of_the_final_fetch()
    return with_events(Thread(pid, tid, HOSTILE), OffCpu(at, at + 5, pid, tid, (HOSTILE, "", " ; ")))


def test_a_name_cannot_be_taken_for_two_frames_or_for_a_line() -> None:
    rows = [row for row in observe(hostile()) if HOSTILE.strip() in row.thread]
    ((frames, ns),) = [line for line in lines(folded.render(rows)) if "?" in line[0]]
    assert ns == 5 and len(frames) == 7 and frames[-3:] == [":", "?", r"a:b 7\n<c>\x1b[31m\u202e"]


def test_speedscope_reads_it() -> None:
    """What speedscope's importer needs (src/import/speedscope.ts, src/lib/file-format-spec.ts)."""
    shown = speedscope.render(observe(hostile()), HOSTILE)
    assert shown.isascii()
    whole = json.loads(shown)
    assert set(whole) == {"$schema", "name", "exporter", "activeProfileIndex", "shared", "profiles"}
    assert whole["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    names = [frame["name"] for frame in whole["shared"]["frames"]]
    assert len(set(names)) == len(names)
    for profile in whole["profiles"]:
        assert set(profile) == {"type", "name", "unit", "startValue", "endValue", "samples", "weights"}
        assert (profile["type"], profile["unit"]) == ("sampled", "nanoseconds")
        assert len(profile["samples"]) == len(profile["weights"])
        assert profile["endValue"] - profile["startValue"] == sum(profile["weights"])
        assert all(0 <= at < len(names) for stack in profile["samples"] for at in stack)
        assert {names[stack[0]] for stack in profile["samples"]} == {"source", "destination"}


@requires("speedscope (npm -g)")
def test_speedscope_is_valid_by_its_published_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="missing: jsonschema (PyPI)")
    folder = npm_package("speedscope")
    assert folder is not None
    schema = json.loads((folder / "dist/release/file-format-schema.json").read_text())
    for analysis in (hostile(), loaded(DATA / "qemu-7.2-cancelled.rec")[1]):
        jsonschema.validate(json.loads(speedscope.render(observe(analysis), "x")), schema)


def decoded(data: bytes) -> Any:
    """A profile, read by Google's own protobuf with the fields of proto/profile.proto."""
    message = pytest.importorskip("google.protobuf.message_factory", reason="missing: protobuf (PyPI)")
    return message.GetMessageClass(profile_descriptor()).FromString(gzip.decompress(data))


@cache
def profile_descriptor() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool

    file = descriptor_pb2.FileDescriptorProto(name="profile.proto", package="t", syntax="proto3")
    messages = {
        "ValueType": "type=1 unit=2",
        "Label": "key=1 str=2 num=3 num_unit=4",
        "Sample": "location_id=1* value=2* label=3*Label",
        "Mapping": "id=1 memory_start=2 memory_limit=3 file_offset=4 filename=5 build_id=6 has_functions=7",
        "Line": "function_id=1 line=2",
        "Location": "id=1 mapping_id=2 address=3 line=4*Line",
        "Function": "id=1 name=2 system_name=3 filename=4 start_line=5",
        "Profile": "sample_type=1*ValueType sample=2*Sample mapping=3*Mapping location=4*Location function=5*Function "
        "string_table=6*string time_nanos=9 duration_nanos=10 comment=13* default_sample_type=14",
    }
    for name, fields in messages.items():
        made = file.message_type.add(name=name)
        for field in fields.split():
            match = re.fullmatch(r"(\w+)=(\d+)(\*?)(\w*)", field)
            assert match is not None
            one = made.field.add(name=match[1], number=int(match[2]), label=3 if match[3] else 1)
            one.type = {"": one.TYPE_INT64, "string": one.TYPE_STRING}.get(match[4], one.TYPE_MESSAGE)
            if one.type == one.TYPE_MESSAGE:
                one.type_name = f".t.{match[4]}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool.FindMessageTypeByName("t.Profile")


def test_pprof_is_consistent() -> None:
    analysis = hostile()
    window, clock = analysis.attribution.window, analysis.header.clock
    assert window is not None and clock is not None
    read = decoded(pprof.render(observe(analysis), analysis.header, window))
    text = list(read.string_table)
    assert text[0] == "" and len(set(text)) == len(text) and "\x1b" not in "".join(text)
    assert [(text[v.type], text[v.unit]) for v in read.sample_type] == list(pprof.VALUES)
    assert text[read.default_sample_type] == "off_cpu"
    assert read.duration_nanos == analysis.breakdown.window_ns
    assert read.time_nanos - clock.realtime_ns == window[0] - clock.monotonic_ns
    functions = {f.id: text[f.name] for f in read.function}
    locations = {loc.id: functions[loc.line[0].function_id] for loc in read.location}
    assert {loc.mapping_id for loc in read.location} == {1} == {m.id for m in read.mapping}
    for sample, row in zip(read.sample, observe(analysis), strict=True):
        assert len(sample.value) == 4 and len(sample.location_id) == len(row.frames)
        assert {text[label.key] for label in sample.label} == {"side", "phase", "thread"}
        assert [locations[at] for at in sample.location_id][-1] == row.frames[-1] or row.frames[-1] == " ; "
    assert pprof.render(observe(analysis), analysis.header, window) == pprof.render(
        observe(analysis), analysis.header, window
    )


@requires("go")
def test_go_reads_it(tmp_path: Path) -> None:
    _, analysis = loaded(QEMU)
    rows = observe(analysis)
    file = tmp_path / "p.pb.gz"
    file.write_bytes(pprof.render(rows, analysis.header, analysis.attribution.window))
    done = subprocess.run(
        ["go", "tool", "pprof", "-unit=ns", "-tags", str(file)], capture_output=True, text=True, check=True
    )
    for label, name in (("side", "source"), ("phase", "handover"), ("thread", "CPU 0/KVM 27498")):
        ns = sum(row.duration_ns for row in rows if name in (row.side, row.phase, row.thread))
        assert re.search(rf"^ {label}: Total ", done.stdout, re.MULTILINE)
        assert re.search(rf"^ +{ns}ns .*: {re.escape(name)}$", done.stdout, re.MULTILINE), name


def test_the_command_says_why_there_is_nothing() -> None:
    none = str(DATA / "qemu-7.2-cancelled.rec")
    done = run("report", none, "--format", "folded")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == (
        "ebpf-mig: no stacks: there is no window to show (No downtime: the migration ended before the vCPUs stopped)\n"
    )
    empty = json.loads(run("report", none, "--format", "speedscope").stdout)
    assert [(p["samples"], p["weights"]) for p in empty["profiles"]] == [([], [])]
    assert lines(run("report", str(QEMU), "--format", "folded").stdout)
