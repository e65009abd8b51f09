# SPDX-License-Identifier: Apache-2.0
"""The budget of a VM whose signs are often false: it cannot keep the costly probes armed."""

from __future__ import annotations

from ebpf_mig.exporter.discovery import Vm
from ebpf_mig.exporter.known import BURST, REFILL_S, Known


def test_signs_that_prove_wrong_are_rationed() -> None:
    known = Known(Vm(1, 2, "qemu", "a"), fresh=False)
    assert [known.may_try() for _ in range(BURST + 2)] == [True] * BURST + [False] * 2
    known.credited -= REFILL_S
    assert [known.may_try() for _ in range(2)] == [True, False]
