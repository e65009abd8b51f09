# SPDX-License-Identifier: Apache-2.0
"""A real QEMU whose threads have a name with bytes that are no text and that a terminal would act on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.companion import Companion
from tests.conftest import TRACING, requires
from tests.integration.exporters import OURS, PROGRAM, SETTLED_S, exporter, fetch, until, value
from tests.integration.migrations import QUICK
from tests.integration.test_results import Qmp, complete

pytestmark = requires(*TRACING)

NAME = b"\xff\n\x1b[31m<b>|`"
"""A byte that is no UTF-8, a line's end, a terminal's red, and the marks of HTML and Markdown."""
VM = f"{OURS}odd"
INHERITED = ["-name", f"guest={VM},debug-threads=off,process=" + os.fsdecode(NAME)]
"""QEMU names its first thread, and the others, vCPUs too, inherit the name."""
ALWAYS = {"html": b"\\n\\x1b[31m&lt;b&gt;|`", "perfetto": b"\\n\\x1b[31m<b>|`"}
"""The name as the kinds of report have it that show each thread; others have it if the thread waited."""
BINARY = {"perfetto", "pprof"}
KINDS = ("text", "json", "html", "csv", "markdown", "svg", "folded", "speedscope", *sorted(BINARY))


@contextlib.contextmanager
def named() -> Iterator[QemuPair]:
    with QemuPair(QUICK, None, INHERITED) as pair:
        tasks = Path(f"/proc/{pair.source.pid}/task")
        assert [(task / "comm").read_bytes() for task in tasks.iterdir()].count(NAME + b"\n") >= 3
        yield pair


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `record` has of a migration; `watch` and `exporter` see it too, and nothing of theirs ends."""
    place = tmp_path_factory.mktemp("odd")
    watch = [*PROGRAM, "watch", "--vm", f"{OURS}*", "--state-directory", str(place / "watch")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with exporter(place / "exporter") as (served, port), subprocess.Popen(watch, **pipes) as watching:  # type: ignore[call-overload]
        with named() as pair:
            source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
            time.sleep(SETTLED_S)
            with Companion(
                [*PROGRAM, "record", "--vm", VM, "-o", str(place / "x.rec")], stderr=subprocess.PIPE
            ) as recording:
                assert recording.stderr is not None and b"tracing" in recording.stderr.readline()
                complete(pair, source, destination)
                said = recording.communicate(timeout=60)[1]
            assert recording.returncode == 0, said
            time.sleep(2)
        until(lambda: value(port, "ebpf_mig_migrations_total"))
        assert b"\x1b" not in fetch(f"http://127.0.0.1:{port}/metrics").encode()
        assert served.poll() is None and watching.poll() is None
        watching.send_signal(signal.SIGTERM)
        lines, said = watching.communicate(timeout=30)
    assert len(lines.splitlines()) == 1 and b"\x1b" not in lines + said, (lines, said)
    return place / "x.rec"


def test_its_program_tells_the_vmm(recording: Path) -> None:
    """The process's own name is not one of a VMM."""
    targets = read_recording(recording).header.targets
    assert [(target.vmm, target.role) for target in targets] == [("qemu", "source"), ("qemu", "destination")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_has_the_name_escaped(kind: str, recording: Path) -> None:
    command = [*PROGRAM, "report", str(recording), "--format", kind, *(["-v"] if kind == "text" else [])]
    done = subprocess.run(command, check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert ALWAYS.get(kind, b"") in done.stdout
    if kind not in BINARY:
        assert b"\x1b" not in done.stdout and b"\xff" not in done.stdout
    if kind in ("html", "svg"):
        assert b"<b>|" not in done.stdout
