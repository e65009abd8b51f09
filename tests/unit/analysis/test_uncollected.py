# SPDX-License-Identifier: Apache-2.0
"""The analysis pauses Python's garbage collector, and leaves it as it was."""

from __future__ import annotations

import gc

import pytest

from ebpf_mig.analysis.uncollected import uncollected


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_pauses_and_is_then_as_it_was(was_on: bool) -> None:
    (gc.enable if was_on else gc.disable)()
    try:
        with pytest.raises(ValueError, match="broken"), uncollected():
            assert not gc.isenabled()
            raise ValueError("broken")
        assert gc.isenabled() is was_on
    finally:
        gc.enable()
