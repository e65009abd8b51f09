# SPDX-License-Identifier: Apache-2.0
"""A witness of the kernel's own: one of its tracepoints, read by tracefs in an instance of the trace buffer of its own.

In: the tracepoint. Out: its lines, once the block is over. No other reader of tracefs is disturbed.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator

from tests.companion import Companion

_WITNESS = """
[ -d /sys/kernel/tracing/instances ] || mount -t tracefs nodev /sys/kernel/tracing
cd /sys/kernel/tracing/instances && mkdir "$1" && cd "$1" || exit
[ -d events/$2 ] || { echo absent; cd .. && rmdir "$1"; exit; }
echo mono >trace_clock && echo 1 >events/$2/enable && echo ready && read line
echo 0 >events/$2/enable
cat trace
cd .. && rmdir "$1"
"""
_LINE = re.compile(r" (\d+)\.(\d{6}): \w+: (.*)")


@contextlib.contextmanager
def traced(tracepoint: str) -> Iterator[list[tuple[int, str]] | None]:
    """(instant in ns, rounded to microseconds; fields as text) of each event of `GROUP/NAME`, once the block is over.

    None if the kernel has no such tracepoint.
    """
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        _WITNESS,
        "sh",
        f"ebpf-mig-{os.getpid()}-{tracepoint.replace('/', '-')}",
        tracepoint,
    ]
    found: list[tuple[int, str]] = []
    with Companion(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace") as witness:
        assert witness.stdout is not None
        if (said := witness.stdout.readline()) != "ready\n":
            assert said == "absent\n", said
            yield None
            return
        yield found
        for seconds, us, fields in _LINE.findall(witness.communicate("\n")[0]):
            found.append((int(seconds) * 10**9 + int(us) * 1000, fields))
