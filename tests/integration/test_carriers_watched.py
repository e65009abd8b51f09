# SPDX-License-Identifier: Apache-2.0
"""What carries a migration, as in `test_carriers.py`, seen by `watch` on the node."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import TRACING, requires
from tests.integration.exporters import NAMED, OURS, PROGRAM, SETTLED_S, running, until
from tests.integration.live_updates import NEWER
from tests.integration.migrations import LASTING
from tests.integration.shapes import ALL, FULL, watched
from tests.integration.test_carriers import (
    PIPED,
    Act,
    done,
    fifo_of_two_commands,
    given,
    left,
    needs_newer,
    proxied,
    socket_pair,
    whole,
)
from tests.integration.test_results import Qmp

pytestmark = requires(*TRACING)


@pytest.mark.skipif(not shutil.which("socat"), reason="missing feature: socat")
def test_watch_makes_one_migration_of_the_halves_beside_a_proxy(tmp_path: Path) -> None:
    command = [*PROGRAM, "watch", "--format", "json", "--count", "1", "--vm", f"{OURS}*"]
    command += ["--state-directory", str(tmp_path / "state")]
    with QemuPair(LASTING, extra=NAMED) as pair, running(*command, stdout=PIPED, stderr=PIPED) as watch:
        assert watch.stderr is not None and watch.stdout is not None and "watching" in watch.stderr.readline()
        source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
        source("migrate-set-parameters", **{"max-bandwidth": LASTING.bandwidth_bytes})
        time.sleep(SETTLED_S)
        proxied(tmp_path)(pair, source, destination)
        (said,) = [json.loads(line) for line in watch.stdout.read().splitlines()]
    b = analyse(read_recording(tmp_path / "state" / said["recording"])).breakdown
    # The watch may be armed later than QEMU switches logging on, as docs/exporter.md says.
    whole(b, "unix", begun=b.migration.total_ns is not None)
    assert (said["role"], said["result"], said["blackout_ns"]) == ("both", "completed", b.blackout_ns)
    assert len(b.migration.through) == 1 and b.migration.through[0].startswith("socat ")


WATCHED: dict[str, tuple[str, Callable[[Path], Act]]] = {
    "exec": ("pipe", fifo_of_two_commands),
    "fd, a pipe": ("pipe", lambda _: given(os.pipe)),
    "fd, a socket": ("unix", lambda _: given(socket_pair)),
}


@pytest.mark.long
@pytest.mark.parametrize("name", WATCHED if ALL else ["exec"])
def test_watch_sees_each_carrier(name: str, tmp_path: Path) -> None:
    transport, make = WATCHED[name]
    with QemuPair(LASTING, extra=NAMED) as pair, watched(pair, tmp_path) as found:
        source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
        source("migrate-set-parameters", **FULL)
        make(tmp_path)(pair, source, destination)
        until(destination.runs)
        b = found()
    whole(b, transport, begun=b.migration.total_ns is not None)
    assert b.migration.source and b.migration.destination
    assert [re.sub(r"\d+", "N", who) for who in b.migration.through] == (["cat N"] * 2 if name == "exec" else [])


@pytest.mark.long
@pytest.mark.parametrize("capabilities", [(), ("mapped-ram",)], ids="-".join)
def test_watch_says_that_a_file_was_saved(capabilities: tuple[str, ...], tmp_path: Path) -> None:
    """Who may load it, and when, is not known."""
    needs_newer()
    with QemuPair(LASTING, NEWER, NAMED) as pair, watched(pair, tmp_path) as found:
        source = Qmp(pair.source.qmp)
        source.capability(*capabilities)
        source("migrate", uri=f"file:{tmp_path}/carrier")
        done(source)
        b = found()
    assert (b.migration.result, b.migration.transport, b.blackout_ns) == ("saved", "file", None)
    assert b.window_ns and left(b) <= 0.02 * b.window_ns
