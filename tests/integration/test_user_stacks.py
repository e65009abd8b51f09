# SPDX-License-Identifier: Apache-2.0
"""The user half of a wait's stack, in native programs whose functions are known, and in a VMM."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ebpf_mig.analysis.stacks import Kind, observe
from ebpf_mig.collector import analyse
from ebpf_mig.linux import btf
from ebpf_mig.probes import attach
from ebpf_mig.probes.hook_points import EXTRAS
from ebpf_mig.probes.loader import Program
from ebpf_mig.probes.macros import defines
from ebpf_mig.probes.plan import Plan
from ebpf_mig.probes.records import CONTRACT
from ebpf_mig.probes.tiers import Choice
from ebpf_mig.probes.tracer import Tracer
from ebpf_mig.recording.events import AnyEvent, Module, OffCpu, UserStack
from ebpf_mig.recording.file import read_recording
from tests.conftest import TRACING, requires

pytestmark = requires("root", "bcc", "kernel BTF")
pytest.importorskip("elftools", reason="missing feature: pyelftools")
SOURCE = """
#include <stdio.h>
#include <time.h>
static volatile int count;
__attribute__((noinline)) void sleeps_on_purpose(void)
{
	struct timespec two_ms = { 0, 2000000 };

	nanosleep(&two_ms, 0);
	count++;
}
__attribute__((noinline)) void calls_it(int n)
{
	volatile char room[200];

	for (int i = 0; i < n; i++) {
		room[i % 200] = i;
		sleeps_on_purpose();
	}
	count++;
}
int main(void)
{
	puts("ready");
	fflush(stdout);
	calls_it(1000000);
	return count;
}
"""
WHEN_BACK = "sched_exit_tp"
OWN = ("sleeps_on_purpose", "calls_it", "main")


NO_TABLES = ("-fno-asynchronous-unwind-tables", "-fno-unwind-tables")
BUILDS = {
    "frame pointers": ("-fno-omit-frame-pointer",),
    "only frame pointers": ("-fno-omit-frame-pointer", *NO_TABLES),
    "unwind tables": ("-fomit-frame-pointer",),
    "neither": ("-fomit-frame-pointer", *NO_TABLES),
}


@contextlib.contextmanager
def sleeping(directory: Path) -> Iterator[dict[int, str]]:
    """The program, built in each way and started; the way by its pid."""
    with contextlib.ExitStack() as stack:
        found = {}
        for at, (name, options) in enumerate(BUILDS.items()):
            program = directory / str(at)
            command = ["gcc", "-O1", *options, "-x", "c", "-o", str(program), "-"]
            subprocess.run(command, input=SOURCE, text=True, check=True)
            process = stack.enter_context(subprocess.Popen([str(program)], stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            found[process.pid] = name
        yield found


def traced(pids: Sequence[int], *without: str) -> list[AnyEvent]:
    """What a tracer recorded in 0.3 s without some tracepoints."""
    here = btf.tracepoints(btf.VMLINUX, [name for extra in EXTRAS for name, _ in extra.all_hooks]) - set(without)
    program = Program(attach.FAMILY, defines(pids, here, user_stacks=True), CONTRACT)
    hooks = tuple(attach._hooks(Choice(), here))
    for hook in hooks:
        program.load_hook(hook)
    with Tracer(pids, Plan(hooks, program, attach._tiers(Choice(), here)), user_stacks=True) as tracer:
        tracer.arm()
        events, end = [], time.monotonic() + 0.3
        while time.monotonic() < end:
            events += tracer.poll(10)
        return events + tracer.finish()


@requires("gcc")
@pytest.mark.parametrize("without", [(), (WHEN_BACK,)], ids=["when back", "as it leaves"])
def test_the_function_that_sleeps_is_found_or_it_is_said_why_not(tmp_path: Path, without: tuple[str, ...]) -> None:
    with sleeping(tmp_path) as builds:
        events = traced(list(builds), *without)
    waits = {(event.tid, event.end_ns) for event in events if isinstance(event, OffCpu)}
    files = {(event.pid, event.number): event for event in events if isinstance(event, Module)}
    for pid, build in builds.items():
        stacks = [event for event in events if isinstance(event, UserStack) and event.pid == pid]
        assert len(stacks) > 20 and {(stack.tid, stack.at_ns) for stack in stacks} <= waits
        counts = Counter((stack.names, stack.modules, stack.end) for stack in stacks)
        (names, modules, end), _ = counts.most_common(1)[0]
        first = names.index(OWN[0])
        assert first <= 2 and "nanosleep" in names[0], names  # in libc, as it was called
        own = files[pid, modules[first]]
        assert own.frame_pointers == int("frame pointers" in build), build
        shown = subprocess.run(["readelf", "-n", own.path], capture_output=True, text=True, check=False).stdout
        assert f"Build ID: {own.build_id}" in shown
        if build == "neither":  # libc's tables give its caller, and nothing gives the caller's
            assert (names[first:], end) == (OWN[:1], "unavailable: no frame pointers")
        else:
            assert (names[first : first + len(OWN)], end) == (OWN, ""), build


@requires(*TRACING)
def test_the_vmms_own_functions_stand_in_the_report(tmp_path: Path) -> None:
    name = tmp_path / "x.rec"
    # The last send waits for its reader.
    much = ["--dirty-rate", "0", "--working-set", "64MiB", "--downtime-limit", "2s"]
    command = [sys.executable, "-m", "ebpf_mig", "demo", "--user-stacks", *much, "-o", str(name)]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    analysis = analyse(read_recording(name))
    rows = [row for row in observe(analysis) if row.kind is Kind.OFF_CPU]
    named = {frame for row in rows for frame in row.frames}
    assert {"main_loop_wait", "qemu_main_loop"} <= named
    assert any(function.startswith("qemu_savevm_state_complete") for function in named)
    assert "user half of" in "".join(analysis.breakdown.notes)
