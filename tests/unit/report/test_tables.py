# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig export`: the tables, read by other programs, agree with each recording's own report."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from ebpf_mig.recording.events import LATEST, ClockPair, Ending, Header, Ioctl, Target
from ebpf_mig.recording.file import RecordingWriter
from ebpf_mig.report import tables
from tests.unit.commands.test_cli import ROOT, run

DATA = ROOT / "tests" / "data"
NAMES = ("qemu-7.2-3vcpus.rec", "qemu-10.0-ring.rec", "cloud-hypervisor-54-tcp.rec", "qemu-7.2-cancelled.rec")


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    directory = tmp_path / "in" / "node 1"
    directory.mkdir(parents=True)
    for name in NAMES:
        shutil.copy(DATA / name, directory)
    return tmp_path / "in"


def test_duckdb_finds_what_the_reports_say(recordings: Path, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="missing: duckdb (PyPI)")
    pytest.importorskip("pyarrow", reason="missing: pyarrow (PyPI)")
    done = run("export", str(recordings), "-o", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (0, "") and "4 migrations" in done.stderr
    table, phases = (f"'{tmp_path}/out/{name}.parquet'" for name in ("migrations", "phases"))
    for name in NAMES:
        b = json.loads(run("report", str(DATA / name), "--format", "json").stdout)
        query = f"SELECT blackout_ns, window_ns, total_ns, result, vcpus, passes, vmm_version FROM {table}"
        row = duckdb.sql(f"{query} WHERE recording = 'node 1/{name}'").fetchall()
        assert row == [
            (
                b["blackout_ns"], b["window_ns"], b["migration"]["total_ns"], b["migration"]["result"],
                len(b["vcpus"]), len(b["dirty_log"]["passes"]), b["migration"]["vmm_version"],
            )
        ]  # fmt: skip
        query = f"SELECT phase, duration_ns FROM {phases} WHERE recording = 'node 1/{name}' ORDER BY position"
        expected = [(p["phase"], p["duration_ns"]) for p in b["phases"]] if b["window_ns"] is not None else []
        assert duckdb.sql(query).fetchall() == expected
    wrong = f"""SELECT recording FROM {table} JOIN {phases} USING (recording)
        GROUP BY recording, window_ns HAVING sum(duration_ns) <> window_ns"""
    assert duckdb.sql(wrong).fetchall() == []
    (began,) = duckdb.sql(f"SELECT DISTINCT typeof(began) FROM {table}").fetchall()
    assert began == ("TIMESTAMP WITH TIME ZONE",)


def test_csv_has_the_same_rows(recordings: Path, tmp_path: Path) -> None:
    assert run("export", str(recordings), "--format", "csv", "-o", str(tmp_path)).returncode == 0
    with (tmp_path / "migrations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["recording"] for row in rows] == sorted(f"node 1/{name}" for name in NAMES)
    assert list(rows[0]) == list(tables.MIGRATIONS)
    cancelled = next(row for row in rows if row["result"] == "cancelled")
    assert (cancelled["blackout_ns"], cancelled["window_ns"]) == ("", "")
    assert re.fullmatch(r"2026-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", cancelled["began"])
    done = run("export", str(recordings), "--format", "csv", "-o", str(tmp_path))
    assert done.returncode == 2 and "migrations.csv exists; not overwritten" in done.stderr
    assert run("export", str(recordings), "--format", "csv", "-o", str(tmp_path), "--force").returncode == 0


def test_what_cannot_be_read_is_a_row_too(recordings: Path, tmp_path: Path) -> None:
    (recordings / "cut.rec").write_bytes((DATA / NAMES[0]).read_bytes()[:60])
    (recordings / "noise.rec").write_bytes(b"noise")
    done = run("export", str(recordings), "--format", "csv", "-o", str(tmp_path), "--strict")
    assert done.returncode == 5 and "2 of 6 are incomplete or unreadable: cut.rec" in done.stderr
    with (tmp_path / "migrations.csv").open(newline="") as file:
        bad = [row for row in csv.DictReader(file) if row["verdict"] == "unreadable"]
    assert [row["recording"] for row in bad] == ["cut.rec", "noise.rec"] and all(row["error"] for row in bad)
    assert run("export", str(tmp_path), "-o", str(tmp_path / "none"), "--format", "csv", "--force").returncode == 0
    (tmp_path / "empty").mkdir()
    done = run("export", str(tmp_path / "empty"), "--format", "csv")
    assert done.returncode == 2 and "there is no *.rec below" in done.stderr


def test_hostile_recordings_do_no_harm(tmp_path: Path) -> None:
    for name, huge in (("formula", 0), ("huge", LATEST)):
        header = Header(
            host="=cmd|'/c calc'!A1", begin_ns=huge, clock=ClockPair(1, LATEST, 0),
            targets=[Target(pid=7, role="source", vmm="+1\x1b[31m")],
        )  # fmt: skip
        with RecordingWriter(tmp_path / f"{name}.rec", header) as writer:
            writer.write(Ending(at_ns=1, reason="failed", lost={"a": huge, "b": huge}))
    done = run("export", str(tmp_path), "--format", "csv", "-o", str(tmp_path))
    text = (tmp_path / "migrations.csv").read_text()
    assert done.returncode == 0 and "\x1b" not in text and ",+1" not in text and ",=cmd" not in text
    assert "huge.rec: its figures are beyond 64 bits" in done.stderr


def test_redacted_hosts_stay_apart(tmp_path: Path) -> None:
    for name, host in (("a", "secret-1"), ("b", "secret-2"), ("c", "secret-1")):
        header = Header(host=host, begin_ns=1, targets=[Target(pid=7, role="source")])
        with RecordingWriter(tmp_path / f"secret-{name}.rec", header) as writer:
            writer.write(Ioctl(10, 50, 7, 8, 3, 0x4010AE42, 0))
            writer.write(Ending(at_ns=99, reason="failed"))
    assert run("export", str(tmp_path), "--format", "csv", "-o", str(tmp_path), "--redact").returncode == 0
    text = (tmp_path / "migrations.csv").read_text()
    hosts = [row["source_host"] for row in csv.DictReader(text.splitlines())]
    assert hosts == ["host-1", "host-2", "host-1"] and "secret" not in text


def test_every_column_is_described() -> None:
    page = (ROOT / "docs" / "fleet.md").read_text().partition("## The tables")[2]
    assert {name for name in tables.MIGRATIONS | tables.PHASES if not re.search(rf"\b{name}\b", page)} == set()
