# SPDX-License-Identifier: Apache-2.0
"""Migrations in quick succession: `watch` reports each of them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import TRACING, requires
from tests.integration.exporters import NAMED, OURS, PROGRAM, SETTLED_S, running
from tests.integration.test_results import Qmp

pytestmark = requires(*TRACING)
ROUNDS = int(os.environ.get("EBPF_MIG_CHAINS", "2"))
SMALL = Scenario(memory_bytes=128 * MIB, working_set_bytes=2 * MIB, pages_per_s=1000)
SLOW = 16 << 20


@contextlib.contextmanager
def watching(state: Path) -> Iterator[subprocess.Popen[str]]:
    command = [*PROGRAM, "watch", "--format", "json", "--vm", f"{OURS}*", "--state-directory", str(state)]
    with running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None and "watching" in process.stderr.readline()
        yield process


def seen(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """All lines printed, once no more are added."""
    time.sleep(4)
    process.terminate()
    return [json.loads(line) for line in process.communicate(timeout=30)[0].splitlines()]


def start(source: Qmp, destination: Qmp, uri: str) -> None:
    destination("migrate-incoming", uri=uri)
    source("migrate", uri=uri)


def test_a_chain_without_a_rest(tmp_path: Path) -> None:
    """A to B to C, where B migrates on as soon as its guest runs: two migrations."""
    for number in range(ROUNDS):
        state = tmp_path / str(number)
        with watching(state) as process, QemuPair(SMALL, None, NAMED) as one, QemuPair(SMALL, None, NAMED) as other:
            time.sleep(SETTLED_S)
            a, b, c = Qmp(one.source.qmp), Qmp(one.destination.qmp), Qmp(other.destination.qmp)
            for source in (a, b):
                source("migrate-set-parameters", **{"max-bandwidth": SLOW})
            start(a, b, one.uri)
            while not b.runs():
                pass
            start(b, c, other.uri)
            while not c.runs():
                time.sleep(0.01)
            found = seen(process)
        assert [(o["role"], o["result"]) for o in found] == [("both", "completed")] * 2, (number, found)


def test_a_try_that_is_cancelled_and_repeated_at_once(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        state = tmp_path / str(number)
        with watching(state) as process, QemuPair(SMALL, None, NAMED) as one, QemuPair(SMALL, None, NAMED) as other:
            time.sleep(SETTLED_S)
            a, b, c = Qmp(one.source.qmp), Qmp(one.destination.qmp), Qmp(other.destination.qmp)
            a("migrate-set-parameters", **{"max-bandwidth": 1 << 18})
            start(a, b, one.uri)
            time.sleep(0.5)
            a("migrate_cancel")
            while a.status() != "cancelled":
                pass
            a("migrate-set-parameters", **{"max-bandwidth": SLOW})
            start(a, c, other.uri)
            while not c.runs():
                time.sleep(0.01)
            found = seen(process)
        tries = [o for o in found if o["role"] != "destination"]
        assert [o["result"] for o in tries[1:]] == ["completed"], (number, found)
        assert tries[0]["result"] in ("unknown", "failed") and tries[0]["blackout_ns"] is None, tries[0]
