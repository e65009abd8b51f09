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


def largest(run: Run) -> Cause:
    """The first cause, whose time must be that of the call."""
    assert run.wrong() == {}
    assert run.breakdown.diagnosis is not None
    cause = run.breakdown.diagnosis.because[0]
    assert (cause.side, cause.phase, cause.known) == (Side.DESTINATION, "state.load", True)
    assert cause.duration_ns == pytest.approx(run.injected["state.load"], abs=run.tolerance("state.load"))
    return cause


def test_a_large_memslot_is_named() -> None:
    run = undisturbed(Plan(added_slot_bytes=64 * kvm.GIB))
    if run.injected["state.load"] < 10 * MS:
        pytest.skip("missing feature: large memslots that take long (shadow paging)")
    cause = largest(run)
    assert (cause.rule, cause.what) == ("ioctl", "the destination is inside KVM's ioctl SET_USER_MEMORY_REGION")


@requires("x86-64")
def test_a_memslot_beside_a_reader_is_srcu() -> None:
    cause = largest(undisturbed(Plan(srcu_ns=50 * MS)))
    assert cause.rule == "srcu"
