# SPDX-License-Identifier: Apache-2.0
"""What the exporter's processes import. Each module that creeps in costs memory on every node, all the time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ebpf_mig.exporter import spawn

HEAVY = {"bcc", "click", "rich", "pyroute2", "qemu", "yaml", "bcrypt", "opentelemetry", "asyncio", "multiprocessing"}
CRYPTO = {"ssl", "hashlib", "prometheus_client", "http"}
ANALYSIS = {"ebpf_mig.collector"}
LARGE = {"msgspec", "inspect", "pathlib", "tempfile", "urllib"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("supervisor", HEAVY | CRYPTO | LARGE),
        ("watch_process", HEAVY | CRYPTO | ANALYSIS),
        ("serve", HEAVY),
        ("analyst", HEAVY),
    ],
)
def test_a_process_does_not_import_what_it_does_not_need(module: str, unwanted: set[str]) -> None:
    code = f"import json, sys, ebpf_mig.exporter.{module}; print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, spawn._OPTIONS.replace("m", "c"), code]
    found = subprocess.run(command, env=spawn._environment(), cwd="/", check=True, capture_output=True, text=True)
    assert not unwanted & set(json.loads(found.stdout))


def test_a_child_imports_from_where_we_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same directories in the same order, but never from the current one."""
    own = str(Path(spawn.__file__).parents[2])
    monkeypatch.setattr(sys, "path", ["/", *(way for way in sys.path if way not in ("", own)), own])
    monkeypatch.chdir("/")
    path = spawn._import_path()
    assert "/" not in path and "" not in path and len(path) == len(set(path))
    assert [way for way in dict.fromkeys(sys.path) if way in path] == path


def test_our_own_directory_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a virtual environment it holds other packages, too, and comes before the distribution's."""
    own = str(Path(spawn.__file__).parents[2])
    monkeypatch.setattr(sys, "path", ["/first", own, "/last", "/first", "", "relative"])
    assert spawn._import_path() == ["/first", own, "/last"]
    monkeypatch.setattr(sys, "path", ["/first"])
    assert spawn._import_path() == ["/first", own]
