# SPDX-License-Identifier: Apache-2.0
"""Redaction removes names from every text field of every kind of event."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ebpf_mig.linux import bpf
from ebpf_mig.probes import attach
from ebpf_mig.probes.hook_points import EXTRAS
from ebpf_mig.probes.tiers import Choice
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.events import Header, Mark, OffCpu, Target
from ebpf_mig.recording.file import Recording, RecordingWriter, read_recording
from ebpf_mig.recording.kinds import KINDS
from ebpf_mig.recording.redact import Names, redacted
from ebpf_mig.vmm import words
from tests.unit.recording.samples import filled

ROOT = Path(__file__).parents[3]
RECORDING = ROOT / "tests/data/qemu-7.2-tcp.rec"
MARKERS = (
    "Alice-7f3a", "alice-7f3a.example.org", "alice 7f3a", "tcp:alice7f3a:4444", "6.1.0-alice7f3a", "absent: alice7f3a",
    "qmp.alice7f3a", "on_Alice7f3a", "fentry (alice7f3a)", "/srv/alice7f3a",
)  # fmt: skip
SECRET = "7f3a"  # noqa: S105 - a part of each
"""A name that looks like part of a version, a probe, a tier or a mark."""


def marked(marker: str) -> Recording:
    """A recording with `marker` in every text."""
    plain = read_recording(RECORDING)
    pids = [target.pid for target in plain.header.targets]
    header = filled(Header, marker, 4096)
    targets = [filled(Target, marker, pid) for pid in pids]
    remote = msgspec.structs.replace(header.remote, pid=pids[1], own_pid=pids[1])
    events = [filled(kind.event, marker, pids[0]) for kind in KINDS] + [filled(Mark, marker, pid) for pid in pids]
    at = plain.events[len(plain.events) // 2].begin_ns if hasattr(plain.events[0], "begin_ns") else 1
    events += [OffCpu(at, at + 10**9, pid, pid, (marker,)) for pid in pids]
    return msgspec.structs.replace(
        plain,
        header=msgspec.structs.replace(header, format=1, begin_ns=1, targets=targets, remote=remote),
        events=[*plain.events, *events],
    )


def named(struct: object) -> bool:
    return SECRET in repr(msgspec.to_builtins(struct)).lower()


@pytest.mark.parametrize("marker", MARKERS)
def test_no_text_of_any_field_is_left(marker: str) -> None:
    recording = marked(marker)
    assert named(recording.header)
    clean = redacted(recording, Names(words()))
    assert not named(clean.header), clean.header
    for before, after in zip(recording.events, clean.events, strict=True):
        assert not named(after), after
        assert type(before) is type(after)


@pytest.mark.parametrize("form", ["text", "json", "html", "perfetto", "csv"])
def test_no_text_is_left_in_any_report(form: str, tmp_path: Path) -> None:
    recording = marked("Alice-7f3a")
    with RecordingWriter(tmp_path / "a.rec", recording.header) as writer:
        writer.write_many(recording.events)
    command = [sys.executable, "-m", "ebpf_mig.cli", "report", str(tmp_path / "a.rec"), "--format", form]
    plain, clean = (
        subprocess.run([*command, *more], capture_output=True, check=True, cwd=ROOT).stdout
        for more in ([], ["--redact"])
    )
    assert form == "csv" or b"7f3a" in plain, "without --redact the report must contain the name"
    assert b"7f3a" not in clean.lower()


def test_no_text_is_left_in_exported_tables(tmp_path: Path) -> None:
    recording = marked("Alice-7f3a")
    (tmp_path / "in").mkdir()
    with RecordingWriter(tmp_path / "in/7f3a.rec", recording.header) as writer:
        writer.write_many(recording.events)
    command = [sys.executable, "-m", "ebpf_mig.cli", "export", "in", "--format", "csv", "-o", "out", "--redact"]
    subprocess.run(command, capture_output=True, check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    tables = b"".join(file.read_bytes() for file in tmp_path.rglob("*.csv"))
    assert tables and b"7f3a" not in tables.lower()


@pytest.mark.parametrize("file", sorted((ROOT / "tests/data").rglob("*.rec")), ids=lambda f: f.stem)
def test_words_that_name_nobody_stay(file: Path) -> None:
    recording = read_recording(file)
    clean = redacted(recording, Names(words()))
    assert clean.header.attach == recording.header.attach
    assert [(t.vmm, t.vmm_version, t.role) for t in clean.header.targets] == [
        (t.vmm, t.vmm_version, t.role) for t in recording.header.targets
    ]
    for before, after in zip(recording.events, clean.events, strict=True):
        if not isinstance(before, (ev.Thread, ev.Socket, ev.Mark, ev.Module)):
            assert before == after
        if isinstance(before, ev.Mark):
            assert before.name == after.name


@pytest.mark.parametrize("way", ["tracepoint", bpf.FENTRY, bpf.KPROBE, bpf.ITERATOR, f"{bpf.FENTRY}+{bpf.KPROBE}"])
def test_each_way_to_attach_stays(way: str) -> None:
    header = Header(attach={"vcpu-inside": way})
    clean = redacted(Recording(header=header, events=[], truncated=False, reason="", unknown=0), Names(words())).header
    assert clean.attach == header.attach


def test_each_signal_stays() -> None:
    header = Header(attach=attach._tiers(Choice(), {name for extra in EXTRAS for name, _ in extra.all_hooks}))
    clean = redacted(Recording(header=header, events=[], truncated=False, reason="", unknown=0), Names(words())).header
    assert clean.attach == header.attach


def test_a_kernel_of_ones_own_keeps_its_numbers_and_absence_stays_absence() -> None:
    header = Header(kernel="6.1.0-alice", attach={"vcpu": "absent: /home/alice", "wire": "tracepoint"})
    clean = redacted(Recording(header=header, events=[], truncated=False, reason="", unknown=0), Names(words())).header
    assert clean.kernel == "6.1.0-custom"
    assert clean.attach == {"vcpu": "absent: reason-1", "wire": "tracepoint"}


def test_names_are_found_in_constant_time() -> None:
    names = Names(words())
    for number in range(200_000):
        names.of("host", str(number))
    assert names.of("host", "17") == "host-18"
