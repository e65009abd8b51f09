# SPDX-License-Identifier: Apache-2.0
"""The layouts of io_uring's tracepoints in BTF assembled here, and those of the running kernel beside its tracefs.

The prototypes are those of include/trace/events/io_uring.h in the kernels that are named.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from ebpf_mig.linux import btf
from ebpf_mig.probes import uring
from ebpf_mig.probes.uring import Arguments
from tests.conftest import requires
from tests.unit.linux.test_btf import a_type, blob

P, N = True, False
SUBMIT, RENAMED, COMPLETE = "io_uring_submit_sqe", "io_uring_submit_req", "io_uring_complete"
KERNELS = {
    "5.10": ({SUBMIT: (P, N, N, N, N), COMPLETE: (P, N, N)}, None),
    "5.18": ({SUBMIT: (P, P, N, N, N, N, N), COMPLETE: (P, P, N, N, N)}, Arguments(1, 3)),
    "6.1": ({SUBMIT: (P, N), COMPLETE: (P, P, N, N, N, N, N)}, Arguments(0, 3)),
    "6.12": ({RENAMED: (P,), COMPLETE: (P, P, N, N, N, N, N)}, Arguments(0, 3)),
    "6.18": ({RENAMED: (P,), COMPLETE: (P, P, P)}, Arguments(0, 2)),
    "unknown": ({RENAMED: (P, P), COMPLETE: (P, P, P)}, None),
    "none": ({}, None),
}


def kernel(path: Path, tracepoints: dict[str, tuple[bool, ...]]) -> str:
    """BTF with these tracepoints."""
    strings, types, number = b"\0int\0", a_type(1, 1, 0, 4, struct.pack("=I", 32)) + a_type(0, 2, 0, 0), 3
    for name, arguments in tracepoints.items():
        entries = b"".join(struct.pack("=II", 0, 2 if pointer else 1) for pointer in (P, *arguments))
        types += a_type(0, 13, 1 + len(arguments), 0, entries) + a_type(0, 2, 0, number)
        types += a_type(len(strings), 8, 0, number + 1)
        strings += f"btf_trace_{name}".encode() + b"\0"
        number += 3
    path.write_bytes(blob(types, strings))
    return str(path)


@pytest.mark.parametrize("version", KERNELS)
def test_each_kernel_passes_the_request_elsewhere_or_not_at_all(version: str, tmp_path: Path) -> None:
    tracepoints, expected = KERNELS[version]
    path = kernel(tmp_path / "vmlinux", tracepoints)
    assert uring.arguments(path) == expected
    known = {*tracepoints, "sched_switch"}
    assert uring.usable(known, path) == (known if expected else {"sched_switch"})
    assert uring.defines(0xFFFF, path)["URING_RESULT_IN_CQE"] == (version == "6.18")


@requires("root", "kernel BTF")
def test_the_running_kernel_records_what_it_is_passed() -> None:
    """In its own trace event, `req` comes second, and the opcode that it reads is that of the request."""
    formats = Path("/sys/kernel/tracing/events/io_uring")
    if not formats.exists() or (found := uring.arguments()) is None:
        pytest.skip("missing feature: io_uring's requests (Linux 5.18), or tracefs")
    name = next(one for one in (RENAMED, SUBMIT) if (formats / one).exists())
    assert [bool(one) for one in btf.tracepoint_arguments(btf.VMLINUX, name)] in [[P], [P, N], [P, P, N, N, N, N, N]]
    fields = re.findall(r"field:.* \**(\w+);", (formats / COMPLETE / "format").read_text())
    own = [one for one in fields if not one.startswith("common")]
    assert own[:4] == ["ctx", "req", "user_data", "res"]
    assert found.in_cqe or found.result == own.index("res")
