# SPDX-License-Identifier: Apache-2.0
"""Cloud Hypervisor's log lines, in the shapes that v52.0 and 54.0.0 really wrote."""

from __future__ import annotations

from pathlib import Path

from ebpf_mig.vmm.cloud_hypervisor.log import LogPlace

SOURCE = (
    "cloud-hypervisor: 1.2s: <migration-worker> INFO:vmm/src/lib.rs:1792 -- Precopy complete: iter=2 curr=4MiB "
    "total=132MiB bw=1800.00MiB/s transfer=0.01s overhead=56ms est_downtime=2ms elapsed=6.14s\r\n"
    "x INFO -- Migration completed after 2.2s with a downtime of 298ms (goal was 300ms)\r\n"
    "x DEBUG -- Downtime breakdown: 298ms (final_iter:269ms state:7ms send_state:19ms complete:1ms)\r\n"
)
DESTINATION = (
    "x DEBUG -- Migration (incoming): recv_snapshot:3ms restore:10ms\r\n"
    "x DEBUG -- Migration (incoming): resume:1ms\r\n"
    "x DEBUG -- Migration (incoming): Receiving final state and resuming the VM took 15ms\r\n"
)


def figures(tmp_path: Path, text: str, before: str = "") -> dict[str, int]:
    log = tmp_path / "log"
    log.write_text(before)
    place = LogPlace.now(str(log))
    with log.open("a") as file:
        file.write(text)
    return place.figures()


def test_both_sides_by_key(tmp_path: Path) -> None:
    assert figures(tmp_path, SOURCE) == {
        "downtime": 298, "final_iter": 269, "state": 7, "send_state": 19, "complete": 1, "overhead": 56,
    }  # fmt: skip
    assert figures(tmp_path, DESTINATION) == {"recv_snapshot": 3, "restore": 10, "resume": 1, "state_to_resume": 15}


def test_another_order_of_the_keys(tmp_path: Path) -> None:
    line = "x -- Downtime breakdown: 9ms (complete:4ms new:7ms state:2ms)\r\n"
    assert figures(tmp_path, line) == {"complete": 4, "state": 2}


def test_an_earlier_migration_in_the_same_log_does_not_count(tmp_path: Path) -> None:
    assert figures(tmp_path, "nothing new\r\n", before=SOURCE) == {}


def test_a_log_that_began_anew(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(SOURCE * 3)
    place = LogPlace.now(str(log))
    log.write_text(SOURCE)
    assert place.figures()["downtime"] == 298


def test_no_log(tmp_path: Path) -> None:
    assert LogPlace.now(str(tmp_path / "none")).figures() == {} and LogPlace("/nonexistent", 0).failure() == ""


def test_why_it_failed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("x ERROR -- Migration failed: outer: middle: Connection refused (os error 111)\r\n")
    assert LogPlace(str(log), 0).failure() == "outer: middle: Connection refused (os error 111)"
