# SPDX-License-Identifier: Apache-2.0
"""Predictions on a migration written by hand: 6 MB over a link of 100 MB/s, worked out on paper (times in us)."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import msgspec
import pytest

from ebpf_mig.analysis.whatif import PAYLOAD, Hypothesis, predict
from ebpf_mig.breakdown import Split, WhatIf
from ebpf_mig.collector import analyse
from ebpf_mig.commands.changes import parse_changes
from ebpf_mig.errors import UsageError
from ebpf_mig.recording import events as ev
from ebpf_mig.report import whatif
from tests.unit.commands.test_cli import ROOT, run
from tests.unit.script import Script, Vm, at
from tests.unit.scripts import READS, VCPU, WRITES

RECORDING = str(ROOT / "tests" / "data" / "qemu-10.0-tcp.rec")
PAGES, EACH = 60, 100_000
"""Segments, one per millisecond, and the bytes of each."""


def arrival(vm: Vm, us: float, size: int) -> None:
    vm.events.append(ev.Segment(at(us), vm.pid, 80, size, 0, 0, 0, 1 << 20))


def migration(*, wait_us: int = 54_000, unix: bool = False) -> Script:
    """Stop at 1000; fetch 1100 to 1500; 6 MB offered at 1500, arriving 2500 to 61,500; state; start at 70,000."""
    script = Script()
    source, destination = script.pair(unix=unix)
    source.logging(-100_000)
    source.gets(-99_900)
    source.send(-98_000, -97_000, 1_000_000)
    destination.receive(-98_000, -96_000, 1_000_000, socket=80)
    source.kick(9)
    source.interrupted(1000)
    source.gets(1100, took=100, step=100)
    source.ioctl("CLEAR_DIRTY_LOG", 1400, 100)
    source.send(1500, 61_500, PAGES * EACH, off_cpu_us=wait_us)
    if not unix:
        arrival(destination, -97_500, 1_000_000)
        for number in range(PAGES):
            arrival(destination, 2500 + number * 1000, EACH)
        arrival(destination, 62_600, 30_000)
    destination.receive(1600, 61_510, PAGES * EACH, socket=80, in_call_us=2000, off_cpu_us=0)
    source.ioctls(READS, 61_600, 62_400, tid=VCPU)
    source.send(62_500, 62_550, 30_000, off_cpu_us=0)
    destination.receive(62_500, 62_650, 30_000, socket=80)
    destination.ioctls(WRITES, 63_000, 65_000, tid=VCPU)
    destination.ioctl("SET_CLOCK", 66_000)
    destination.entered(70_000)
    return script


def change(script: Script, **changes: int | Fraction) -> WhatIf:
    found = analyse(script.recording)
    assert found.breakdown.blackout_ns == 69_000_000
    return predict(found, Hypothesis(**changes))  # type: ignore[arg-type]


def line(payload_bytes_per_s: int) -> int:
    """The bandwidth of an Ethernet link that carries so much payload."""
    return round(payload_bytes_per_s / PAYLOAD)


def test_a_link_twice_as_fast_halves_what_it_limits() -> None:
    found = change(migration(), bandwidth=line(200_000_000))
    # Limited from 1500, when the bytes are offered, to 61,500, when the last has arrived: 60 ms, 6 MB.
    assert found.changes[0].change_ns == pytest.approx(-30_000_000, abs=1000)
    assert found.blackout_ns == pytest.approx(39_000_000, abs=1000)
    assert "limit for 60.000 ms, in which it carried 5.7 MiB at 800 Mbit/s" in found.changes[0].why


def test_no_link_makes_the_source_faster_than_it_is() -> None:
    found = change(migration(), bandwidth=line(10**12))
    assert found.changes[0].change_ns == -54_000_000, "of 60 ms the source was blocked for 54"
    assert "still take 6.000 ms for it" in found.changes[0].why


def test_a_slower_link_takes_longer_for_everything() -> None:
    found = change(migration(), bandwidth=line(50_000_000))
    # Stop to last arrival: 61.6 ms for 6.03 MB; at 50 MB/s that takes 120.6 ms, and what followed the 60 ms follows.
    assert found.changes[0].change_ns == pytest.approx(60_000_000, abs=2000)


def test_a_link_that_was_not_the_limit() -> None:
    script = migration()
    (source, destination) = script.vms
    destination.events = [e for e in destination.events if not (isinstance(e, ev.Segment) and e.at_ns > at(0))]
    for number in range(PAGES):
        arrival(destination, 1500.5 + number * 0.1, EACH)
    arrival(destination, 62_600, 30_000)
    source.events = [
        msgspec.structs.replace(e, end_ns=at(1510), in_call_ns=10_000, off_cpu_ns=0)
        if isinstance(e, ev.Transfer) and e.bytes == PAGES * EACH
        else e
        for e in source.events
    ]
    found = change(script, bandwidth=line(10**12))
    assert abs(found.changes[0].change_ns or 0) < 10_000


def test_a_free_fetch_and_no_re_arming() -> None:
    # Gets 1100 to 1300, clear 1400 to 1500: the fetch is 400 us up to the first send; nothing was in the queue yet.
    assert change(migration(), fetch=Fraction(0)).blackout_ns == 68_600_000
    assert change(migration(), fetch=Fraction(1, 2)).blackout_ns == 68_800_000
    assert change(migration(), rearm=Fraction(0)).blackout_ns == 68_900_000
    both = change(migration(), fetch=Fraction(0), rearm=Fraction(0))
    assert both.blackout_ns == 68_600_000 and both.changes[1].why.startswith("part of the final fetch")
    everything = change(migration(), fetch=Fraction(0), bandwidth=line(200_000_000))
    assert everything.blackout_ns == pytest.approx(38_600_000, abs=1000)


def test_re_arming_inside_get_dirty_log_needs_its_parts() -> None:
    measured = analyse(migration().recording)
    b = measured.breakdown
    log = msgspec.structs.replace(b.dirty_log, mode="legacy")
    found = predict(
        replace(measured, breakdown=msgspec.structs.replace(b, dirty_log=log)), Hypothesis(rearm=Fraction(0))
    )
    assert found.blackout_ns is None and "its parts were not measured" in found.changes[0].why
    split = Split(walk=40_000, flush=30_000, copy=20_000, other=10_000, samples=12)
    gets = [
        msgspec.structs.replace(fetch, ioctls=[msgspec.structs.replace(i, split=split) for i in fetch.ioctls])
        for fetch in b.dirty_log.fetches
    ]
    log = msgspec.structs.replace(log, fetches=gets)
    found = predict(
        replace(measured, breakdown=msgspec.structs.replace(b, dirty_log=log)), Hypothesis(rearm=Fraction(0))
    )
    assert found.changes[0].change_ns == -140_000, "walk and flush of two calls"
    assert "known from 24 samples" in found.changes[0].why


def test_what_is_unknown_is_not_predicted() -> None:
    found = change(migration(unix=True), bandwidth=10**9)
    assert found.blackout_ns is None and found.changes[0].why == "cannot be predicted: the transport is unix, not TCP"
    script = migration()
    script.vms[0].events, script.vms[1].events = [], []
    with pytest.raises(UsageError):
        predict(analyse(script.recording), Hypothesis(fetch=Fraction(0)))


def test_changes_as_users_write_them() -> None:
    hypothesis = parse_changes(["bandwidth=25Gbit", "fetch=0", "rearm=12.5%"])
    assert (hypothesis.bandwidth, hypothesis.fetch, hypothesis.rearm) == (3_125_000_000, 0, Fraction(1, 8))
    for bad in ("", "bandwidth", "fetch=1ms", "speed=2", "fetch=-1", "bandwidth=0", "fetch=", "rearm=5"):
        done = run("report", RECORDING, "--what-if", bad)
        assert done.returncode == 2 and done.stdout == "", bad
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 5, done.stderr
    assert run("report", RECORDING, "--what-if", "fetch=0", "--what-if", "fetch=0").returncode == 2
    assert run("report", RECORDING, "--what-if", "fetch=0", "--format", "csv").returncode == 2


def test_every_form_says_that_it_is_predicted_and_what_was_assumed() -> None:
    args = ("report", RECORDING, "--what-if", "fetch=0")
    plain, text = run("report", RECORDING).stdout, run(*args).stdout
    assert text.startswith(plain) and "(predicted, not measured)" in text and text.count("\nassumed  ") == 2
    assert all(len(line) <= 80 for line in text.splitlines())
    whole = json.loads(run(*args, "--format", "json").stdout)
    measured, fetch = whole["blackout_ns"], sum(p["duration_ns"] for p in whole["phases"] if "fetch" in p["phase"])
    assert 0 < measured - whole["what_if"]["blackout_ns"] <= fetch
    html = run(*args, "--format", "html").stdout
    assert "<h2>What if</h2>" in html and f"{whole['what_if']['blackout_ns'] / 1e6:.3f} ms" in html
    assert json.loads(run("report", RECORDING, "--format", "json").stdout)["what_if"] is None
    assert whatif.text(analyse(Script().recording).breakdown) == ""
