# SPDX-License-Identifier: Apache-2.0
"""The smaller views: CSV, redaction, schema, completion, man page, and binary reports on stdout."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.cli import COMMANDS, cli
from ebpf_mig.collector import analyse
from ebpf_mig.commands.formats import FORMATS
from ebpf_mig.commands.man import page
from ebpf_mig.compare.benchmark import Benchmark
from ebpf_mig.joining.merge import read_both
from ebpf_mig.recording.events import Mark, Socket, Target, Thread
from ebpf_mig.recording.file import RecordingWriter, read_recording
from ebpf_mig.recording.redact import Names, redacted
from ebpf_mig.report import csv as csv_report
from ebpf_mig.vmm import words as vmm_words
from tests.conftest import requires
from tests.unit import breakdowns
from tests.unit.commands.test_cli import ROOT, every_command, run

DATA = Path(__file__).parents[2] / "data"
RECORDING = DATA / "qemu-10.0-tcp.rec"


def test_csv_has_a_line_a_phase_and_adds_up() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_report.render(breakdowns.precopy()))))
    took = {row["phase"]: int(row["duration_ns"]) for row in rows}
    assert took.pop("blackout") == 42_700_000
    assert took.pop("window") == sum(took.values()) == 43_112_000
    fetch = next(row for row in rows if row["phase"] == "fetch.kernel")
    assert (fetch["side"], fetch["spans"], fetch["begin_ns"], fetch["end_ns"]) == ("source", "2", "722000", "2022000")
    assert fetch["verdict"] == "complete" and fetch["share"] == "0.027834"
    none = list(csv.DictReader(io.StringIO(csv_report.render(breakdowns.cancelled_early()))))
    assert {row["share"] for row in none} == {""} and "window" not in {row["phase"] for row in none}


def test_redacted_recording_names_nobody_and_measures_the_same(tmp_path: Path) -> None:
    recording = read_recording(RECORDING)
    header = msgspec.structs.replace(
        recording.header,
        host="secret-host",
        targets=[msgspec.structs.replace(t, comm="secret-comm") for t in recording.header.targets],
        notes=["secret-note"],
    )
    pid = header.targets[0].pid
    events = [
        *recording.events,
        Thread(pid, 99, "secret-thread"),
        Socket(1, pid, 3, 4, 2, "10.99.88.77:4444", "[fe80::5ec]:555"),
        Mark(1, pid, "qmp.error", "secret-detail"),
    ]
    file = tmp_path / "secret.rec"
    with RecordingWriter(file, header) as writer:
        writer.write_many(events)
    for form in FORMATS:
        done = subprocess.run(
            [sys.executable, "-m", "ebpf_mig.cli", "report", str(file), "--redact", "--format", form],
            capture_output=True, check=True, cwd=ROOT,
        )  # fmt: skip
        for name in (b"secret", b"10.99.88.77", b"fe80", header.boot_id.encode()):
            assert name not in (gzip.decompress(done.stdout) if form == "pprof" else done.stdout), form
    plain, clean = (analyse(r).breakdown for r in (recording, redacted(recording, Names(vmm_words()))))
    assert (clean.phases, clean.blackout_ns, clean.vcpus) == (plain.phases, plain.blackout_ns, plain.vcpus)
    assert (clean.migration.transport, clean.migration.connections) == ("tcp", 1)


def test_same_name_same_stand_in() -> None:
    recording = read_recording(RECORDING)
    sockets = [e for e in redacted(recording).events if isinstance(e, Socket) and e.local]
    assert sockets and {e.local.rpartition(":")[0] for e in sockets} == {"address-1"}
    assert {e.local.rpartition(":")[2] for e in sockets} >= {
        e.remote.rpartition(":")[2] for e in recording.events if isinstance(e, Socket) and e.remote
    }
    assert [t.pid for t in redacted(recording).header.targets] == [t.pid for t in recording.header.targets]
    assert isinstance(redacted(recording).header.targets[0], Target)


def test_schema_describes_every_field() -> None:
    for kind, struct in (("breakdown", Breakdown), ("bench", Benchmark)):
        done = run("schema", kind)
        assert done.returncode == 0
        printed = json.loads(done.stdout)
        assert printed["title"] == f"ebpf-mig/{kind}/1"
        assert set(printed["$defs"][struct.__name__]["properties"]) == set(struct.__struct_fields__)
    assert run("schema", "nonsense").returncode == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    done = run("completion", shell)
    assert done.returncode == 0 and "_EBPF_MIG_COMPLETE" in done.stdout and "ebpf-mig" in done.stdout
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=done.stdout.encode(), check=False).returncode == 0


@requires("fish")
def test_fish_completes(tmp_path: Path) -> None:
    script = tmp_path / "ebpf-mig.fish"
    script.write_text(run("completion", "fish").stdout)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ask = f"source {script}; complete -C 'ebpf-mig exp'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", ask], capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["export", "exporter"]


def test_completion_completes() -> None:
    done = run(_EBPF_MIG_COMPLETE="bash_complete", COMP_WORDS="ebpf-mig rep", COMP_CWORD="1")
    assert done.stdout.split() == ["plain,report"]
    done = run(_EBPF_MIG_COMPLETE="zsh_complete", COMP_WORDS="ebpf-mig exp", COMP_CWORD="1")
    assert done.stdout.splitlines()[:2] == ["plain", "export"] and "exporter" in done.stdout
    done = run(_EBPF_MIG_COMPLETE="bash_complete", COMP_WORDS="ebpf-mig report --format ", COMP_CWORD="3")
    assert done.stdout.split() == [f"plain,{form}" for form in FORMATS]


def test_man_page_tells_of_every_command_and_is_clean_troff() -> None:
    text = page(cli)
    for command in COMMANDS:
        assert f".SS ebpf\\-mig {command}" in text
    assert "\\-\\-fail\\-if CONDITION" in text and "\n.B 6\na regression" in text
    if shutil.which("man"):
        done = subprocess.run(["man", "--warnings", "-l", "-"], input=text.encode(), capture_output=True, check=False)
        assert done.returncode == 0 and done.stderr == b"", done.stderr


def test_man_page_has_every_option_of_every_command() -> None:
    """The man page is generated on request, so it always matches the command line."""
    text = subprocess.run(
        [sys.executable, "-m", "ebpf_mig", "man"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert text == page(cli)
    for words in every_command(cli):
        helped = run(*words, "--help").stdout
        section = text.partition(f".SS {' '.join(('ebpf-mig', *words))} ".replace("-", "\\-"))[2].partition("\n.SS ")[0]
        grouped = len(words) == 0 or "COMMAND [ARGS]" in helped.splitlines()[0]
        for option in re.findall(r"^  (?:-\w, )?(--[\w.-]+)", helped, re.MULTILINE):
            found = text if grouped else section
            assert option.replace("-", "\\-") in found, f"{words} {option}"


def test_each_command_has_its_man_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ebpf_mig", "man", "--directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert {path.name for path in tmp_path.iterdir()} == {"ebpf-mig.1", *(f"ebpf-mig-{name}.1" for name in COMMANDS)}
    join = (tmp_path / "ebpf-mig-join.1").read_text()
    assert "\n.B ebpf\\-mig join\n" in join and "\n.B \\-\\-clock\\-offset" in join and "Examples:" in join
    if shutil.which("man"):
        for path in tmp_path.iterdir():
            done = subprocess.run(["man", "--warnings", "-l", str(path)], capture_output=True, check=False)
            assert done.returncode == 0 and done.stderr == b"", (path, done.stderr)


def test_bundled_libraries_are_found_before_those_of_the_distribution(tmp_path: Path) -> None:
    """Debian's package bundles what the suite lacks. Directories that come before the package's keep their place."""
    package, earlier = tmp_path / "dist" / "ebpf_mig", tmp_path / "earlier"
    (package / "bundled").mkdir(parents=True)
    earlier.mkdir()
    shutil.copy(ROOT / "ebpf_mig" / "__init__.py", package)
    for folder, name in ((package / "bundled", "library"), (package.parent, "library"), (earlier, "other"),
                         (package / "bundled", "other")):  # fmt: skip
        (folder / f"{name}.py").write_text("")
    script = "import ebpf_mig, library, other; print(library.__file__, other.__file__, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-Pc", script], env={"PYTHONPATH": f"{earlier}:{package.parent}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(package / "bundled" / "library.py"), str(earlier / "other.py")]


def test_binary_report_keeps_off_the_terminal() -> None:
    main, other = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "ebpf_mig.cli", "report", str(RECORDING), "--format", "perfetto"],
        stdout=other, stderr=subprocess.PIPE, check=False, cwd=ROOT,
    )  # fmt: skip
    os.close(main)
    os.close(other)
    assert done.returncode == 2 and b"stdout is a terminal; use -o FILE" in done.stderr


def test_every_file_that_is_no_code_is_packaged() -> None:
    """A wheel that lacks a header or a style sheet fails only after installation."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ebpf_mig"]
    package = ROOT / "ebpf_mig"
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    others = {p for p in package.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}}
    assert others == packaged


def test_no_name_of_either_host_is_left_in_a_joined_recording() -> None:
    hosts = ROOT / "tests/data/hosts"
    both = read_both(str(hosts / "source.rec"), str(hosts / "destination.rec"))
    assert both.header.remote is not None
    named = msgspec.structs.replace(both.header, remote=msgspec.structs.replace(both.header.remote, host="secret-far"))
    clean = redacted(msgspec.structs.replace(both, header=named))
    assert clean.header.remote is not None and clean.header.remote.host == "host-2"
    text = msgspec.json.encode(clean.header)
    for secret in (both.header.host, "secret-far", both.header.boot_id, both.header.remote.boot_id):
        assert not secret or f'"{secret}"'.encode() not in text
