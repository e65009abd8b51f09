# SPDX-License-Identifier: Apache-2.0
"""The calls by which probes are seen to fire."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import requires

FILTERED = """
import ctypes
from ebpf_mig.probes import selftest
seccomp = ctypes.CDLL("libseccomp.so.2")
seccomp.seccomp_init.restype = ctypes.c_void_p
allow, kill = 0x7FFF0000, 0x80000000
rules = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(allow)))
for name in (b"mincore", b"io_submit"):
    assert seccomp.seccomp_rule_add(rules, ctypes.c_uint32(kill), seccomp.seccomp_syscall_resolve_name(name), 0) == 0
assert seccomp.seccomp_load(rules) == 0
selftest.fire_all()
"""


@requires("libseccomp")
def test_a_filter_that_kills_for_rare_calls_does_not_kill_us() -> None:
    subprocess.run([sys.executable, "-c", FILTERED], check=True)
