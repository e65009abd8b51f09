# SPDX-License-Identifier: Apache-2.0
"""`bench.ablation`: what a table of rounds says. The measurement itself needs KVM, and is run by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import ablation
from bench.ablation import EVERYTHING, NO_STACKS, VARIANTS, rows


def test_each_round_is_compared_with_its_own_untraced_blackouts() -> None:
    """A machine that slows down between two rounds changes no figure."""
    rounds = [{EVERYTHING: [slow, slow + 500], NO_STACKS: [slow + 10, slow + 310]} for slow in (1000.0, 2000.0, 9000.0)]
    assert list(rows(rounds)) == [(EVERYTHING, [500.0] * 3, [0.0] * 3), (NO_STACKS, [300.0] * 3, [200.0] * 3)]


def test_no_two_variants_have_one_name() -> None:
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)


def test_kept_rounds_are_printed_in_the_order_of_the_variants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "rounds.jsonl"
    found = {NO_STACKS: [1_000_000.0, 1_300_000.0], EVERYTHING: [1_000_000.0, 1_500_000.0]}
    kept.write_text(f"{json.dumps(found)}\n" * 5)
    monkeypatch.setattr(sys, "argv", ["ablation", "--seconds", "0", "-o", str(kept)])
    assert ablation.main() == 0
    told = capsys.readouterr().out
    assert (
        f"| {EVERYTHING} | +500 (+500 to +500) |  |\n| {NO_STACKS} | +300 (+300 to +300) | +200 (+200 to +200) |"
        in told
    )
    monkeypatch.setattr(sys, "argv", ["ablation", "--seconds", "0", "-o", str(tmp_path / "none")])
    assert ablation.main() == 2
