# SPDX-License-Identifier: Apache-2.0
"""`watch` at a terminal: one line for a migration, whatever its VM is called."""

from __future__ import annotations

from ebpf_mig.commands.watch import line
from tests.unit.exporter.observations import observation


def test_one_line_says_who_how_long_and_where_the_recording_is() -> None:
    said = line(observation(at=1767225600.5))
    assert said == (
        "2026-01-01T00:00:00Z vm1 qemu both completed: blackout 12.346 ms, final fetch 0.000 ms, complete, "
        "20260101T000000.000Z-1.rec"
    )


def test_what_is_not_known_is_not_a_number() -> None:
    said = line(observation(blackout_ns=None, fetch={}, vm="", recording="", result="failed", role="source"))
    assert said.split(" ", 1)[1] == "- qemu source failed: blackout not known, complete, -"


def test_a_name_cannot_begin_another_line() -> None:
    said = line(observation(vm="a\nb\x1b[2J" + "x" * 1000))
    assert said.isprintable() and len(said) < 250


def test_the_diagnosis_stands_on_the_line() -> None:
    said = line(observation(at=1767225600.5, vm="web", diagnosis="mostly handover (84 %): x\n (82 %)"))
    assert said == (
        "2026-01-01T00:00:00Z web qemu both completed: blackout 12.346 ms, final fetch 0.000 ms, "
        "mostly handover (84 %): x\\n (82 %), complete, 20260101T000000.000Z-1.rec"
    )


def test_a_live_update_and_a_snapshot_have_a_word_each() -> None:
    for mode, word in (("cpr", " live update"), ("snapshot", " snapshot"), ("precopy", ""), ("of later", "")):
        said = line(observation(mode=mode, role="source", result="saved"))
        assert f" source{word} saved: " in said, said
