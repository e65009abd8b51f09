# SPDX-License-Identifier: Apache-2.0
"""Counters outlive the process that counts: whatever the moment of its death, each migration is counted once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.exposition import generate_latest

from ebpf_mig.exporter import checkpoint
from ebpf_mig.exporter.analyst import socket_pair
from ebpf_mig.exporter.checkpoint import PLACE_BYTES, Checkpoint
from ebpf_mig.exporter.listener_messages import Found, Processes
from ebpf_mig.exporter.metrics import DEAD_S, SILENT_S, VMS, Metrics
from ebpf_mig.exporter.observation import RESULTS, ROLES, Observation, Status, vmms
from ebpf_mig.exporter.serve import receive
from ebpf_mig.exporter.totals import Totals
from tests.unit.exporter.observations import observation, status
from tests.unit.exporter.test_metrics import samples


class Killed(BaseException):
    """The process ends here."""


def found(number: int, run: str = "a", **changes: object) -> Found:
    return Found(run=run, number=number, observation=observation(**changes), trace=None)


@pytest.fixture
def memory() -> int:
    return checkpoint.create()


def test_what_was_saved_last_is_found_again(memory: int) -> None:
    assert Checkpoint(memory).saved == b""
    for body in (b"one", b"", b"three" * 1000, b"x" * (PLACE_BYTES - 16)):
        Checkpoint(memory).save(body)
        assert Checkpoint(memory).saved == body
    with pytest.raises(ValueError, match="counters"):
        Checkpoint(memory).save(b"x" * PLACE_BYTES)
    with pytest.raises(OSError, match=r".*"):
        os.ftruncate(memory, 10)


@given(st.integers(0, 200), st.binary(min_size=1, max_size=200))
def test_a_write_that_was_cut_leaves_what_was_saved_before(cut: int, body: bytes) -> None:
    fd = checkpoint.create()
    try:
        kept = Checkpoint(fd)
        kept.save(b"older")
        kept.save(b"before")
        at = PLACE_BYTES  # the third goes where the first was
        old = os.pread(fd, 300, at)
        kept.save(body)
        written = os.pread(fd, 300, at)
        os.pwrite(fd, written[:cut] + old[cut:], at)
        whole = written[:cut] + old[cut:] == written
        assert Checkpoint(fd).saved == (body if whole else b"before")
    finally:
        os.close(fd)


def test_the_largest_counters_have_room(memory: int) -> None:
    metrics = Metrics(checkpoint=Checkpoint(memory))
    for vmm in vmms():
        for role in ROLES:
            for result in RESULTS:
                metrics.migration(observation(vmm=vmm, role=role, result=result, recording="r" * 300))
    for number in range(VMS):
        metrics.migration(observation(vm=f"{number:03}" + "\U0001f600" * 100))
    metrics.text(generate_latest)
    assert 0 < len(Checkpoint(memory).saved) < PLACE_BYTES / 2


@pytest.mark.parametrize("moment", ["before", "counted", "saved", "removed"])
def test_a_listener_that_is_killed_counts_each_migration_once(
    moment: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`moment`: the last thing that it does with the second of three migrations."""
    inbox, outbox = socket_pair()
    for number in (1, 2, 3):
        outbox.send(msgspec.json.encode(found(number)))
    outbox.shutdown(socket.SHUT_WR)
    first = Metrics(checkpoint=Checkpoint(memory))

    def dies(method: Callable[..., object], after: bool, when: int) -> Callable[..., object]:
        calls: list[int] = []

        def called(*arguments: object) -> object:
            calls.append(1)
            if len(calls) == when and not after:
                raise Killed
            result = method(*arguments)
            if len(calls) == when:
                raise Killed
            return result

        return called

    match moment:
        case "before":
            monkeypatch.setattr(first, "found", dies(first.found, False, 2))
        case "counted":
            monkeypatch.setattr(first, "_save", dies(first._save, False, 2))
        case "saved":
            monkeypatch.setattr(first, "_save", dies(first._save, True, 2))
        case "removed":
            monkeypatch.setattr(first, "found", dies(first.found, False, 3))
    with pytest.raises(Killed):
        receive(inbox, first, None, lambda: None)
    second = Metrics(checkpoint=Checkpoint(memory))
    receive(inbox, second, None, lambda: None)
    got = samples(second)
    both = (("role", "both"), ("vmm", "qemu"))
    assert got["ebpf_mig_migrations_total", (("result", "completed"), *both)] == 3
    assert got["ebpf_mig_blackout_seconds_count", both] == 3
    assert got["ebpf_mig_blackout_seconds_sum", both] == pytest.approx(3 * 0.012345678)
    assert got["ebpf_mig_last_migration_complete", (("vm", "vm1"),)] == 1


def test_another_watch_begins_at_one_and_counts_on(memory: int) -> None:
    metrics = Metrics(checkpoint=Checkpoint(memory))
    assert metrics.found(found(1)) and metrics.found(found(2)) and not metrics.found(found(2))
    assert metrics.found(found(1, run="b")) and not metrics.found(found(1, run="b"))
    assert samples(metrics)["ebpf_mig_final_memory_bytes_total", ()] == 3 * 4096


def test_counters_of_a_watch_go_on_with_the_next_one(memory: int) -> None:
    def counters(metrics: Metrics) -> dict[object, float]:
        return {
            key: number
            for key, number in samples(metrics).items()
            if key[0].endswith(("_total", "_count", "_sum", "_bucket"))
        }

    def seen(run: str, times: int) -> Status:
        return status(
            run=run,
            armed_seconds=1.5 * times,
            triggers={"born": {"nothing": times}, f"only-{run}": {"nothing": times}},
            errors={"vm": times},
            lost={run: times},
        )

    metrics = Metrics(checkpoint=Checkpoint(memory))
    previous: dict[object, float] = {}
    for run, times in (("a", 1), ("a", 5), ("b", 1), ("b", 2), ("c", 1)):
        metrics.status(seen(run, times))
        now = counters(metrics)
        assert all(now[key] >= number for key, number in previous.items())
        metrics.text(generate_latest)
        metrics = Metrics(checkpoint=Checkpoint(memory))  # and the listener is replaced as well
        assert counters(metrics) == now
        assert not metrics.ready, "it has not heard of the watch yet"
        previous = now
    assert previous["ebpf_mig_armed_seconds_total", ()] == 1.5 * (5 + 2 + 1)
    assert previous["ebpf_mig_triggers_total", (("outcome", "nothing"), ("sign", "born"))] == 8
    assert previous["ebpf_mig_errors_total", (("kind", "vm"),)] == 8


def test_what_a_scrape_has_shown_is_never_forgotten(memory: int) -> None:
    metrics = Metrics(checkpoint=Checkpoint(memory))
    metrics.processes(Processes({"listener": 3}, {}))
    metrics.rejected("idle")
    metrics.traces(True, 7)
    metrics.text(generate_latest)
    got = samples(Metrics(checkpoint=Checkpoint(memory)))
    assert got["ebpf_mig_exporter_connections_rejected_total", (("reason", "idle"),)] == 1
    assert got["ebpf_mig_exporter_restarts_total", (("process", "listener"),)] == 3
    assert got["ebpf_mig_exporter_spans_total", (("outcome", "sent"),)] == 7


def test_not_ready_says_why() -> None:
    now = [1000.0]
    metrics = Metrics(steady=lambda: now[0])
    assert metrics.unready == "the watch has not reported yet" and not metrics.dead
    metrics.status(status())
    assert metrics.unready == ""
    metrics.processes(Processes({"watch": 1}, {"analyst": "was killed by signal 9"}))
    assert metrics.unready == "the process analyst was killed by signal 9"
    assert samples(metrics)["ebpf_mig_up", ()] == 0
    assert samples(metrics)["ebpf_mig_exporter_restarts_total", (("process", "watch"),)] == 1
    metrics.processes(Processes({"watch": 1}, {}))
    assert metrics.unready == ""
    metrics.status(status(attached={"task_newtask": False, "inet_sock_set_state": True}))
    assert metrics.unready == "probes are not attached: task_newtask"
    now[0] += SILENT_S
    assert metrics.unready == "the watch has been silent for 5 s" and not metrics.dead
    now[0] += DEAD_S
    assert metrics.dead == "the watch has been silent for 65 s"


def test_totals_survive_their_encoding() -> None:
    totals = Totals()
    totals.observe("h", ("x", "y"), (0.1, 1.0), 200_000_000, {"recording": "r.rec"})
    totals.add("c", ("z",), 2)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(totals), type=Totals)
    assert again == totals


def test_observations_are_independent_of_the_public_json_of_watch() -> None:
    assert {"run", "number"}.isdisjoint(Observation.__struct_fields__)
