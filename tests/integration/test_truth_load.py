# SPDX-License-Identifier: Apache-2.0
"""Memslots that the truth machine's destination adds while it loads the state: the diagnosis names what takes the time.

The witness is the machine's own clock around its call: see tests/truth.
"""

from __future__ import annotations

import pytest

from ebpf_mig.breakdown import Cause, Side
from tests.conftest import requires
from tests.truth import kvm
from tests.truth.harness import Run, undisturbed
from tests.truth.parts import Plan

pytestmark = [requires("root", "/dev/kvm", "bcc", "kernel BTF")]

MS = 1_000_000


def named(run: Run, rule: str) -> Cause:
    """The cause by this rule. Its time, with that in which the thread had no CPU, must be that of the call."""
    assert run.wrong() == {}
    assert run.breakdown.diagnosis is not None
    causes = {cause.rule: cause for cause in run.breakdown.diagnosis.because if cause.side == Side.DESTINATION}
    cause = causes[rule]
    assert (cause.phase, cause.known) == ("state.load", True)
    no_cpu = causes["cpu"].duration_ns if "cpu" in causes else 0
    near = run.tolerance("state.load")
    assert cause.duration_ns - near <= run.injected["state.load"] <= cause.duration_ns + no_cpu + near
    return cause


def test_a_large_memslot_is_named() -> None:
    run = undisturbed(Plan(added_slot_bytes=64 * kvm.GIB))
    if run.injected["state.load"] < 10 * MS:
        pytest.skip("missing feature: large memslots that take long (shadow paging)")
    assert named(run, "ioctl").what == "the destination is inside KVM's ioctl SET_USER_MEMORY_REGION"


@requires("x86-64")
def test_a_memslot_beside_a_reader_is_srcu() -> None:
    assert "synchronize_srcu" in named(undisturbed(Plan(srcu_ns=50 * MS)), "srcu").what
