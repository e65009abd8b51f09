# SPDX-License-Identifier: Apache-2.0
"""A C half that differs from the Python half does not compile, and the compiler's message names what differs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from ebpf_mig.errors import PreflightError
from ebpf_mig.probes import source, trigger
from ebpf_mig.probes.loader import Program
from ebpf_mig.probes.macros import defines
from ebpf_mig.probes.records import CONTRACT
from ebpf_mig.recording.thresholds import SHARED
from tests.conftest import requires

pytestmark = requires("root", "bcc", "kernel BTF")


@pytest.fixture
def bpf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the C that the loader compiles."""
    copy = tmp_path / "bpf"
    shutil.copytree(source.BPF_DIR, copy)
    monkeypatch.setattr(source, "BPF_DIR", copy)
    return copy


def compile_trace() -> None:
    Program("trace.bpf.c", defines([1], set()), CONTRACT).close()


def compile_trigger() -> None:
    Program("trigger.bpf.c", {"OFF_skc_num": 14}, trigger.CONTRACT).close()


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1, f"{before!r} is no longer in {path.name} once: change this test, too"
    path.write_text(text.replace(before, after))


@pytest.mark.parametrize("compiled", [compile_trace, compile_trigger])
def test_the_two_halves_agree(bpf: Path, compiled: type[None]) -> None:
    assert bpf.exists()
    compiled()


@pytest.mark.parametrize(
    ("file", "before", "after", "named"),
    [
        ("kvm.h", "kind, begin_ns, end_ns, pid, tid, fd, cmd;", "kind, end_ns, begin_ns, pid, tid, fd, cmd;",
         "ioctl_record.begin_ns: not at 8"),
        ("kvm.h", "u64 slot, flags, addr, size;", "u64 slot, flags, size, addr;", "ioctl_record.addr: not at 80"),
        ("sockets.h", "local_port, remote_port, peer;", "remote_port, local_port, peer;",
         "socket_record.local_port: not at 80"),
        ("tcp.bpf.c", "window, seq, ack, received;", "window, ack, seq, received;", "segment_record.seq: not at 72"),
        ("stack_sampler.bpf.c", "begin_ns, period_ns, frames", "period_ns, begin_ns, frames",
         "sample_record.begin_ns: not at 32"),
        ("common.h", "KIND_KICK = 5", "KIND_KICK = 4", "KIND_KICK is not 5"),
        ("common.h", "KIND_SAMPLE = 10,\n\tKIND_VCPU_SPAN = 11", "KIND_SAMPLE = 11,\n\tKIND_VCPU_SPAN = 10",
         "KIND_VCPU_SPAN is not 11"),
        ("common.h", "KIND_MAX = 23", "KIND_NEW = 23,\n\tKIND_MAX = 24", "KIND_MAX is not 23"),
        ("kvm.h", "target_tid, signal;", "target_tid, signal, more;", "kick_record: not 48 bytes"),
        ("kvm.h", "longest_ns, gaps;", "longest_ns, gaps, more;", "vcpu_span_record.lock_ns: not at 64"),
        ("stack_sampler.bpf.c", "#define SAMPLE_FRAMES 24", "#define SAMPLE_FRAMES 25", "sample_record.frames: not"),
        ("kvm.h", "last_exit_ns;\n\ts64 last_ret;", "last_exit_ns;\n\tu64 last_ret;",
         "vcpu_enter_record.last_ret: not s64"),
        ("common.h", "s64 run_ret;", "u64 run_ret;", "thread_state.run_ret: not s64"),
        ("sockets.h", "#define SEND 0\n#define RECEIVE 1", "#define SEND 1\n#define RECEIVE 0", "SEND is not 0"),
        ("sched.bpf.c", "#define NO_STACK 0xffffffffULL", "#define NO_STACK 0xfffffffeULL", "NO_STACK is not"),
    ],
)  # fmt: skip
def test_a_difference_is_an_error_that_names_it(
    bpf: Path, capfd: pytest.CaptureFixture[str], file: str, before: str, after: str, named: str
) -> None:
    change(bpf / file, before, after)
    with pytest.raises(PreflightError, match=r"trace\.bpf\.c does not compile"):
        compile_trace()
    assert named in capfd.readouterr().err


def test_a_member_that_is_gone_is_named(bpf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A member is renamed: the C code alone still compiles, but the member that Python reads is missing."""
    for path in bpf.glob("*.[ch]"):
        path.write_text(path.read_text().replace("max_gap_ns", "widest_gap_ns"))
    with pytest.raises(PreflightError):
        compile_trace()
    assert "no member named 'max_gap_ns'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("u64 at_ns, pid, sign;", "u64 at_ns, sign, pid;", "node_record.pid: not at 8"),
        ("SIGN_ACCEPT = 4", "SIGN_ACCEPT = 7", "SIGN_ACCEPT is not 4"),
    ],
)
def test_the_standing_trigger_likewise(
    bpf: Path, capfd: pytest.CaptureFixture[str], before: str, after: str, named: str
) -> None:
    change(bpf / "trigger.bpf.c", before, after)
    with pytest.raises(PreflightError):
        compile_trigger()
    assert named in capfd.readouterr().err


def test_the_order_of_a_table_s_members_is_free(bpf: Path) -> None:
    """Members are read by name, through the types that the compiler made."""
    change(
        bpf / "common.h",
        "u64 runs, in_ns, out_ns, max_gap_ns, counted;",
        "u64 counted, max_gap_ns, out_ns, in_ns, runs;",
    )
    program = Program("trace.bpf.c", defines([1], set()), CONTRACT)
    leaf = program.table("threads").Leaf(runs=7, in_ns=8, max_gap_ns=9)
    assert (leaf.runs, leaf.in_ns, leaf.max_gap_ns, leaf.counted) == (7, 8, 9, 0)
    program.close()


def test_each_shared_threshold_has_one_value() -> None:
    """C uses each threshold and defines none: a definition in C would silently replace the value."""
    text = "\n".join(path.read_text() for path in source.BPF_DIR.glob("*.[ch]"))
    for name in SHARED:
        assert re.search(rf"\b{name}\b", text), f"C does not use {name}"
        assert not re.search(rf"#define\s+{name}\b", text), f"C defines {name}"
    macros = defines([1], set())
    assert {name: macros[name] for name in SHARED} == {name: f"{value}ULL" for name, value in SHARED.items()}
