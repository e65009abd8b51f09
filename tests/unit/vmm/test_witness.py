# SPDX-License-Identifier: Apache-2.0
"""The VMM's own figures beside the kernel's spans, on scripts whose numbers are worked out by hand (us)."""

from __future__ import annotations

import pytest

from ebpf_mig.breakdown import Witness
from tests.unit.script import Script
from tests.unit.scripts import cloud_hypervisor_53, cloud_hypervisor_local

US = 1000
LOGGED = {
    "downtime": 52, "final_iter": 2, "overhead": 0, "state": 0, "send_state": 47, "complete": 0,
    "recv_snapshot": 44, "restore": 1, "resume": 0, "state_to_resume": 47,
}  # fmt: skip


def rows(script: Script, logged: dict[str, int] | None = None) -> dict[str, Witness]:
    for name, ms in (LOGGED if logged is None else logged).items():
        script.mark(60_000, 1000, f"ch.{name}_ms", ms)
    return {w.name.removeprefix("ch.").removesuffix("_ms"): w for w in script.result().breakdown.witnesses}


def span(witness: Witness) -> tuple[float, float]:
    assert witness.span is not None
    return witness.span[0] / US, witness.span[1] / US


def with_header(script: Script) -> Script:
    """The script's destination reads header and payload of the state in one receive; here they are two."""
    destination = script.vms[1]
    destination.events = [e for e in destination.events if getattr(e, "bytes", 0) != 43_047]
    destination.receive(5503, 5506, 16, socket=80)
    destination.receive(5508, 49_600, 43_047, socket=80)
    destination.send(52_850, 52_860, 16, socket=80)
    return script


def test_an_answer_that_was_not_seen_shifts_nothing() -> None:
    script = with_header(cloud_hypervisor_53())
    script.vms[1].events.pop()
    assert not rows(script).keys() & {"recv_snapshot", "restore", "resume", "state_to_resume"}


def test_each_part_has_its_place() -> None:
    found = rows(with_header(cloud_hypervisor_53(second=True)))
    assert {name: span(w) for name, w in found.items() if w.span} == {
        "downtime": (0, 52_900),
        "final_iter": (1400, 3900),
        "overhead": (1400, 1500),
        "state": (4000, 4800),
        "send_state": (4800, 52_000),
        "complete": (52_010, 52_900),
        "recv_snapshot": (5508, 49_800),
        "restore": (49_800, 51_500),
        "resume": (52_030, 52_850),
        "state_to_resume": (5506, 52_850),
    }


def test_a_second_fetch_is_told_from_the_saving() -> None:
    found = rows(cloud_hypervisor_53(second=True))["state"]
    assert "of which 0.300 ms is a second dirty-log fetch" in found.explanation
    assert "state.save" in found.explanation and "memory.send" in found.explanation
    assert found.difference_ns == -800 * US


def test_where_it_found_nothing_the_fetch_alone_counts() -> None:
    found = rows(cloud_hypervisor_53())["state"]
    assert span(found) == (4000, 4520) and "0.020 ms is a second dirty-log fetch" in found.explanation


def test_what_no_part_has_is_the_pause() -> None:
    found = rows(cloud_hypervisor_53(second=True))["unnamed"]
    # 52.9 - 2.5 - 0.8 - 47.2 - 0.89, and in whole ms 52 - 2 - 0 - 47 - 0
    assert found.value_ns - found.difference_ns == 1510 * US and found.value_ns == 3_000_000
    assert "quiesce" in found.explanation and "pause 0.040" in found.explanation


def test_the_downtime_is_compared_with_the_blackout_and_explained() -> None:
    found = rows(cloud_hypervisor_53())["downtime"]
    assert found.difference_ns == 52_000 * US - (52_400 - 40) * US
    assert "52.900 by the kernel: 0.040 before the stop to 0.500 after the start" in found.explanation


def test_without_a_second_fetch_the_vmms_own_word_ends_the_saving() -> None:
    script = cloud_hypervisor_local()
    script.mark(1700, 1000, "ch.event.snapshotted")
    found = rows(script, {"state": 0, "send_state": 1})
    assert span(found["state"]) == (1300, 1700) and span(found["send_state"]) == (1700, 3500)
    script = cloud_hypervisor_local()
    assert span(rows(script, {"state": 0})["state"]) == (1300, 1540)


@pytest.mark.parametrize("missing", ["kick", "send", "ioctl", "receive"])
def test_without_its_signals_a_part_has_no_row(missing: str) -> None:
    script = cloud_hypervisor_53()
    source = script.vms[0]
    keep = {
        "kick": lambda e: type(e).__name__ != "Kick",
        "send": lambda e: getattr(e, "direction", None) != 0 or type(e).__name__ != "Transfer",
        "receive": lambda e: getattr(e, "direction", None) != 1,
        "ioctl": lambda e: type(e).__name__ != "Ioctl",
    }[missing]
    source.events = [e for e in source.events if keep(e)]
    found = rows(script)
    assert not found.keys() & {"state", "send_state", "complete", "final_iter", "unnamed"}


def test_other_vmms_have_none() -> None:
    assert rows(cloud_hypervisor_53(), {}) == {}


def test_paused_and_resumed_as_the_events_say() -> None:
    script = cloud_hypervisor_53()
    script.mark(1200, 1000, "ch.event.paused", doubt_us=300)
    script.mark(52_800, 2000, "ch.event.resumed", doubt_us=400)
    (found,) = (w for w in script.result().breakdown.witnesses if w.name == "ch.paused..resumed")
    assert found.value_ns == 51_600 * US
    assert found.explanation == "1.160 ms after the stop, 0.400 ms after the start, doubt 0.400 ms"


def test_noticing_the_stop_is_a_figure_of_its_own() -> None:
    from ebpf_mig.recording.events import OffCpu
    from tests.unit.script import at

    script = cloud_hypervisor_53()
    source = script.vms[0]
    tid = source.pid + 1
    source.events.append(OffCpu(at(20), at(1090), source.pid, tid, ("do_nanosleep",)))
    source.events.append(OffCpu(at(-2500), at(-10), source.pid, tid, (), True))
    found = script.result().breakdown.pausing
    assert found is not None
    assert (found.stop_ns, found.noticed_ns, found.asleep_ns) == (40 * US, 1060 * US, 1050 * US)
    assert (found.naps, found.polling, found.kicked_late_ns) == (1, True, 2490 * US)
    assert cloud_hypervisor_53().result().breakdown.pausing is not None
    source.events = [e for e in source.events if type(e).__name__ != "Kick"]
    assert script.result().breakdown.pausing is None
