# SPDX-License-Identifier: Apache-2.0
"""The terminal report, line by line, for the breakdowns written out in `breakdowns.py`."""

from __future__ import annotations

import re

import msgspec
import pytest

from ebpf_mig import breakdown as b
from ebpf_mig.report.canvas import Canvas
from ebpf_mig.report.rows import phase_rows
from ebpf_mig.report.text import render
from ebpf_mig.report.waterfall import bar, ruler
from tests.unit import breakdowns

ALL = [breakdowns.precopy, breakdowns.many_vcpus, breakdowns.cancelled_early, breakdowns.aborted]


def lines_of(breakdown: b.Breakdown, *, width: int = 80, colour: bool = False, unicode: bool = True) -> list[str]:
    text = render(breakdown, Canvas(width, colour, unicode))
    assert text.endswith("\n")
    return text.split("\n")[:-1]


def test_a_whole_migration_on_one_screen() -> None:
    assert lines_of(breakdowns.precopy()) == [
        "Downtime 42.700 ms                                       complete: no event lost",
        "QEMU 10.0.13, pre-copy over TCP, 1 vCPU; completed after 1534.200 ms",
        "source pid 4242 on alpha -> destination pid 777 on beta",
        "",
        "phase        what happens                    ms  share  ├────── downtime ──────┤",
        "pause        stop the vCPUs               0.412 before  ▎",
        "quiesce      settle devices               0.310    1 %  ▏",
        "fetch.kernel read the dirty log           1.200    3 %  ▐▎",
        "fetch.user   scan its bitmap              0.545    1 %  ▕▏",
        "memory.send  send the last pages         30.001   70 %   ▐████████████████▏",
        "state.save   save VM state                1.532    4 %                    █",
        "state.send   send VM state                0.112   <1 %                    ▕",
        "handover     destination waits            2.000    5 %                    ▕█▏",
        "state.load   load VM state                5.500   13 %                      ███▎",
        "resume       start the vCPUs              1.000    2 %                         ▐",
        "unattributed not explained                0.500    1 %                         ▏",
        "downtime                                 42.700  100 %",
        "",
        "dirty log    last fetch 1.745 ms (kernel 1.200, user 0.545), then 4096 dirty",
        "             pages, 16.1 MiB sent in 30.001 ms; before that 3 passes with",
        "             192.0 MiB",
        "network      source in send calls for 28.601 ms",
        "cross-check  qmp.downtime_ms 44.000 ms, ours 42.700 (+1.300): whole",
        "             milliseconds; from before the kick until the source is done",
        "tracing      cost 0.021 ms in the whole recording (fentry, tracepoint (vcpu))",
    ]


def test_each_of_several_vcpus_and_no_more_than_four() -> None:
    lines = lines_of(breakdowns.many_vcpus())
    at = lines.index("vCPU             downtime ms    kick to stop      stop at     start at")
    assert lines[at - 1 : at + 7] == [
        "",
        "vCPU             downtime ms    kick to stop      stop at     start at",
        "5                          -               -        0.350            -",
        "0                     42.900           0.100        0.100       43.000",
        "1                     42.870           0.150        0.150       43.020",
        "2                     42.840           0.200        0.200       43.040",
        "... 2 more, slowest first",
        "",
    ]


def test_cancelled_before_the_vcpus_stopped() -> None:
    assert lines_of(breakdowns.cancelled_early()) == [
        "No downtime: the migration ended before the vCPUs stopped",
        "complete: no event lost",
        "QEMU 10.0.13, pre-copy over TCP; cancelled after 812.000 ms",
        "source pid 4242 on alpha -> destination pid 777 on beta",
        "",
        "dirty log    3 passes with 192.0 MiB",
        "tracing      cost 0.021 ms in the whole recording (fentry, tracepoint (vcpu))",
    ]


@pytest.mark.parametrize(
    ("transport", "through", "expected"),
    [
        (
            "pipe",
            ["libvirtd 412", "libvirtd 530"],
            "pre-copy over a pipe through libvirtd 412, libvirtd 530; cancelled",
        ),
        ("file", [], "pre-copy over a file; cancelled"),
        ("unix", ["a\x1b[2J 5"], "pre-copy over a UNIX socket through a\\x1b[2J 5; cancelled"),
    ],
)
def test_what_carried_it_and_through_whom(transport: b.Transport, through: list[str], expected: str) -> None:
    whole = breakdowns.cancelled_early()
    facts = msgspec.structs.replace(whole.migration, transport=transport, through=through)
    assert expected in " ".join(lines_of(msgspec.structs.replace(whole, migration=facts))[1:3])


def test_failed_after_the_vcpus_stopped_and_in_ascii() -> None:
    assert lines_of(breakdowns.aborted(), unicode=False) == [
        "Aborted downtime 12.000 ms                                            incomplete",
        "QEMU 10.0.13, pre-copy over TCP, 1 vCPU; failed after 1534.200 ms",
        "source pid 4242 on alpha -> destination not traced",
        "",
        "phase        what happens                    ms  share  |------ downtime ------|",
        "pause        stop the vCPUs               0.412 before  #",
        "fetch.kernel read the dirty log           1.000    8 %  :##",
        "memory.send  send the last pages          8.000   67 %    :###############:",
        "unattributed not explained                3.000   25 %                    ######",
        "downtime                                 12.000  100 %",
        "",
        "dirty log    last fetch 1.000 ms (kernel 1.000, user 0.000), then 8.0 MiB sent",
        "             in 8.000 ms; before that 1 pass with 64.0 MiB",
        "incomplete   lost socket 12; 12 events of the socket probe were lost: the ring",
        "             buffer was full",
        "tracing      cost not measured (fentry, tracepoint (vcpu))",
        "note         the destination died 9.412 ms into the window",
    ]


@pytest.mark.parametrize(
    ("result", "window_ns", "headline"),
    [
        ("failed", None, "No downtime: the migration ended before the vCPUs stopped"),
        ("unknown", None, "Downtime not measured: no vCPU stop was seen"),
        ("completed", None, "Downtime not measured: no vCPU stop was seen"),
        ("completed", 9_000_000, "Downtime not measured: no vCPU start on the destination was seen"),
    ],
)
def test_headline_without_a_blackout(result: str, window_ns: int | None, headline: str) -> None:
    whole = breakdowns.cancelled_early()
    migration = msgspec.structs.replace(whole.migration, result=result)
    assert lines_of(msgspec.structs.replace(whole, migration=migration, window_ns=window_ns))[0].startswith(headline)


def test_rows_that_say_nothing_are_shown_with_v() -> None:
    whole = breakdowns.precopy()
    log = b.DirtyLog(mode="none", slots=[], passes=[], final=None, fetches=[])
    only_pause = msgspec.structs.replace(whole, phases=breakdowns.phases(pause=[(0, 43_112_000)]), dirty_log=log)
    short, long = render(only_pause), render(only_pause, verbose=True)
    assert "unattributed" not in short and "unpaired" not in short and "window" not in short
    assert "unattributed not explained                0.000    0 %" in long
    assert "unpaired     ioctl 2: harmless" in long
    assert "not seen     quiesce, fetch.kernel" in long
    assert "window       43.112 ms, from the pause request to the last vCPU's start" in long
    assert "dirty log    not used" in short
    manual = msgspec.structs.replace(only_pause, dirty_log=msgspec.structs.replace(log, mode="manual"))
    assert "dirty log    no fetch was seen after the last vCPU stopped" in render(manual)


def test_what_lies_outside_the_downtime_says_so_and_the_rest_adds_up() -> None:
    whole = breakdowns.precopy()
    late = msgspec.structs.replace(whole, blackout=(412_000, 42_612_000), blackout_ns=42_200_000)
    lines = lines_of(late)
    at = next(at for at, line in enumerate(lines) if line.startswith("resume"))
    assert lines[at].split()[4:7] == ["0.500", "1", "%"]
    assert lines[at + 1].startswith("             its part after               0.500  after")
    inside = [row for row in phase_rows(late) if not row.place]
    assert sum(row.duration_ns for row in inside) == late.blackout_ns
    assert sum(row.share or 0 for row in inside) == pytest.approx(1)


def diagnosed(**changes: object) -> b.Breakdown:
    """A diagnosis with one cause, as a rule would find it."""
    cause = b.Cause(
        rule="srcu",
        what="KVM waits in synchronize_srcu",
        side="destination",
        phase="state.load",
        duration_ns=19_400_000,
        share=0.6,
        known=True,
        evidence=["19.400 ms in 6 sleeps of main 2 in synchronize_srcu (kvm_swap_active_memslots)"],
    )
    values: dict[str, object] = {
        "headline": "Downtime 32.510 ms",
        "mostly": b.Mostly(phase="state.load", duration_ns=24_477_000, share=0.753),
        "single": True,
        "because": [cause],
        "not_": [b.Innocent(what="the final dirty-log fetch", why="0.069 ms")],
        "help": ["fewer memslots"],
    }
    return msgspec.structs.replace(breakdowns.precopy(), diagnosis=b.Diagnosis(**(values | changes)))  # type: ignore[arg-type]


def test_the_answer_comes_first() -> None:
    assert lines_of(diagnosed())[:13] == [
        "Downtime 32.510 ms                                       complete: no event lost",
        "QEMU 10.0.13, pre-copy over TCP, 1 vCPU; completed after 1534.200 ms",
        "source pid 4242 on alpha -> destination pid 777 on beta",
        "",
        "  mostly   state.load (load VM state): 24.477 ms, 75 %",
        "  because  KVM waits in synchronize_srcu: 19.400 ms, 60 %",
        "           19.400 ms in 6 sleeps of main 2 in synchronize_srcu",
        "           (kvm_swap_active_memslots)",
        "  not      the final dirty-log fetch (0.069 ms)",
        "  help     fewer memslots",
        "  see      --explain state.load, -v",
        "",
        "phase        what happens                    ms  share  ├────── downtime ──────┤",
    ]


def test_what_is_not_known_is_not_a_cause() -> None:
    found = diagnosed().diagnosis
    assert found is not None
    first = msgspec.structs.replace(found.because[0], known=False, what="the destination waits for data")
    second = msgspec.structs.replace(found.because[0], share=0.2)
    text = render(diagnosed(because=[first, second]))
    assert "  because  not known; the destination waits for data: 19.400 ms, 60 %" in text
    assert "           KVM waits in synchronize_srcu: 19.400 ms, 20 %" in text
    text = render(diagnosed(single=False))
    assert "  because  no single cause; the largest:\n           KVM waits in" in text
    assert "  because  not known: nothing was traced that shows a cause" in render(diagnosed(because=[]))


def test_what_is_measured_only_sometimes() -> None:
    whole = breakdowns.precopy()
    busy = msgspec.structs.replace(whole.sockets[0], calls=1, copy_ns=3_100_000, blocked_ns=25_501_000)
    wire = b.Wire(bytes=2048, sent=1, received=2, in_flight_ns=40_000_000, reason="delayed ACK", evidence="1 < MSS")
    late = b.Wire(bytes=9, sent=1, received=2, in_flight_ns=41_000_000, reason="late reader", evidence="window 0")
    full = msgspec.structs.replace(
        whole,
        sockets=[busy] * 6 + [msgspec.structs.replace(busy, role="source control")],
        wire=[wire],
        waits=[
            b.Wait(phase="pause", thread="t", duration_ns=4_000_000, stack=["futex_do_wait", "futex_wait"]),
            b.Wait(phase="state.save", thread="u", duration_ns=3_000_000, stack=["schedule", "a", "b", "c", "d"]),
            b.Wait(phase="state.save", thread="u", duration_ns=3_000_000, stack=["schedule_timeout", "a", "b", "c"]),
            b.Wait(phase="handover", thread="v", duration_ns=9_000_000, stack=["wait_woken", "sk_wait_data"]),
            b.Wait(phase="resume", thread="w", duration_ns=1, stack=[]),
        ],
        clock=b.Clock(offset_ns=-1_234_567, bound_ns=20_000, pairs_there=12, pairs_back=3),
    )
    flat = " ".join(render(full).split())
    assert (
        "network source blocked in sends for 153.006 ms; 2.0 KiB in flight for 40.000 ms: delayed ACK (1 < MSS)" in flat
    )
    assert "also waited state.save: u in a (b < c), 6.000 ms in 2 sleeps pause: t in futex_wait, 4.000 ms" in flat
    assert "sk_wait_data" not in flat, "it waits for data: that is what the network's row is about"
    assert "clocks destination -1.235 ms ± 0.020 ms, by 12 pairs of events there and 3 back" in flat
    flat = " ".join(render(full, verbose=True).split())
    assert "source's migration socket: 16.1 MiB in 1 call, copying 3.100 ms, blocked 25.501 ms" in flat
    assert "2 more sockets" in flat and "sk_wait_data" in flat
    unread = " ".join(render(msgspec.structs.replace(full, wire=[late])).split())
    assert "destination read late: 9 B had arrived, and lay unread for up to 41.000 ms" in unread


@pytest.mark.parametrize("make", ALL)
def test_every_width_is_kept(make: object) -> None:
    for width in range(50, 121):
        lines = lines_of(make(), width=width)  # type: ignore[operator]
        assert max(map(len, lines)) <= min(max(width, 60), 100)
        assert not [line for line in lines if line != line.rstrip()]


@pytest.mark.parametrize("make", ALL)
def test_colour_adds_nothing_but_escapes(make: object) -> None:
    coloured = lines_of(make(), colour=True)  # type: ignore[operator]
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in coloured]
    assert plain == lines_of(make())  # type: ignore[operator]
    assert coloured != plain


def test_colour_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    first = render(breakdowns.precopy(), Canvas(80, True))
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb"), ("COLUMNS", "40"), ("COLORTERM", "truecolor")):
        monkeypatch.setenv(name, value)
    assert render(breakdowns.precopy(), Canvas(80, True)) == first


def test_ascii_has_no_other_characters() -> None:
    whole = breakdowns.precopy()
    odd = msgspec.structs.replace(whole, notes=["± 3 … für 東京"], clock=b.Clock(offset_ns=1, bound_ns=2))
    text = render(odd, Canvas(80, False, False))
    assert text.isascii()
    assert r"note         +- 3 ... f\xfcr \u6771\u4eac" in text


def test_tiers_are_told_apart_only_where_they_differ_and_notes_are_capped() -> None:
    whole = breakdowns.precopy()
    state = msgspec.structs.replace(whole.completeness, attach={"vcpu": "tracepoint", "socket": "tracepoint"})
    lines = lines_of(msgspec.structs.replace(whole, completeness=state, notes=list("abcde")))
    assert lines[-5:] == [
        "tracing      cost 0.021 ms in the whole recording (tracepoint)",
        "note         a",
        "             b",
        "             c",
        "             2 more notes with -v",
    ]


def test_names_cannot_reach_the_terminal_as_escapes() -> None:
    evil = "\x1b]0;owned\x07\x9b31m\r\n\u202egnp.exe [bold]x[/bold]"
    whole = breakdowns.precopy()
    everywhere = msgspec.structs.replace(
        whole,
        migration=msgspec.structs.replace(
            whole.migration,
            **dict.fromkeys(("vmm", "vmm_version", "mode", "transport", "result"), evil),
            source=b.Endpoint(host=evil, pid=1),
        ),
        sockets=[msgspec.structs.replace(whole.sockets[0], role=evil)],
        wire=[b.Wire(bytes=1, sent=1, received=1, in_flight_ns=1, reason=evil, evidence=evil)],
        waits=[b.Wait(phase=evil, thread=evil, duration_ns=1, stack=[evil])],
        witnesses=[b.Witness(name=evil, value_ns=1, difference_ns=0, explanation=evil)],
        completeness=b.Completeness(
            verdict=evil, lost={evil: 1}, unpaired={evil: 1}, attach={evil: evil}, observer_ns=0, reasons=[evil]
        ),
        notes=[evil],
    )
    for width in (60, 100):
        for line in lines_of(everywhere, width=width):
            assert line.isprintable()
    assert "[bold]x[/bold]" in render(everywhere)


def test_bars_are_placed_to_an_eighth() -> None:
    assert bar([(0, 80)], 80, 10) == "██████████"
    assert bar([(0, 1)], 80, 10) == "▏         "
    assert bar([(79, 80)], 80, 10) == "         ▕"
    assert bar([(4, 20), (36, 44)], 80, 10) == "▐█▌ ▐▌    "
    assert bar([(12, 13), (18, 19)], 80, 10) == " ▕▏       "
    assert bar([(10, 15)], 80, 10) == " ▌        "
    assert bar([(4, 20), (78, 80)], 80, 10, unicode=False) == "###      :"
    assert bar([], 80, 10) == " " * 10


def test_bars_stay_inside_whatever_the_spans() -> None:
    for spans in ([(-50, 200)], [(80, 80)], [(100, 300)], [(-9, -5)], [(5, 5)]):
        assert len(bar(spans, 80, 10)) == 10
        assert bar(spans, 80, 10).strip()


def test_ruler_is_over_its_span_and_labelled_if_there_is_room() -> None:
    assert ruler((20, 80), 80, 20, "blackout") == "     ├── blackout ─┤"
    assert ruler((0, 30), 80, 20, "blackout") == "├──────┤            "
    assert ruler((0, 8), 80, 20, "x") == "├┤                  "
    assert ruler((79, 80), 80, 20, "x") == "                   │"
    assert ruler((0, 80), 80, 20, "x", unicode=False) == "|------- x --------|"


def explained() -> b.Breakdown:
    """A pre-copy whose final fetch was sampled, re-armed pages, and lost the guest some time."""
    whole = breakdowns.precopy()
    log, window = whole.dirty_log, whole.window_ns or 0
    assert log.final is not None
    errors = {"walk_error": 960_000, "flush_error": 370_000, "copy_error": 950_000, "other_error": 400_000}
    split = b.Split(walk=6_000_000, flush=0, copy=3_600_000, other=400_000, samples=100, **errors)
    final = msgspec.structs.replace(
        log.final,
        user_off_cpu_ns=1000,
        split=split,
        rearm=b.Rearm(ns=window // 50, error_ns=960_000, samples=100, pages=1 << 18, ns_per_page=22.9, ms_per_gib=6.0),
    )
    lost = b.VcpuShare(vcpu=1, outside_ns=500_000, longest_gap_ns=400_000, lock_wait_ns=0)
    idle = b.VcpuShare(vcpu=1, outside_ns=20_000, longest_gap_ns=10_000, lock_wait_ns=0)
    passes = [
        msgspec.structs.replace(
            one,
            brownout=b.Stretch(begin=0, duration_ns=10_000_000, vcpus=[lost]),
            baseline=b.Stretch(begin=-5, duration_ns=10_000_000, vcpus=[idle]),
        )
        for one in log.passes
    ]
    off = b.Logging(on=False, begin=0, end=9_000_000, kernel_ns=8_000_000, slots=3, in_blackout_ns=7_000_000)
    log = msgspec.structs.replace(log, final=final, passes=passes, logging=[off])
    info = {"busy_us": 52_000, "rwnd_limited_us": 48_000, "sndbuf_limited_us": 2000, "retransmits": 2}
    info |= {"resolution_us": 4000, "from": -1_000_000, "until": 59_000_000}
    sockets = [msgspec.structs.replace(whole.sockets[0], tcp_info=info), *whole.sockets[1:]]
    return msgspec.structs.replace(whole, dirty_log=log, sockets=sockets)


def test_why_the_final_fetch_took_its_time() -> None:
    text = render(explained(), Canvas(80, False, True))
    flat = " ".join(text.split())
    assert "on CPU in ioctls 10.000 ms, walk 60%, copy 36%, other 4% (±10, n=100)" in flat
    assert "re-arming 0.862 ms, avoidable: 6 ms/GiB, 22.9 ns/page ±0.960" in flat
    assert "for comparison: published 1.5 ms/GiB" in " ".join(render(explained(), verbose=True).split())
    assert "logging 7.000 ms, switched off in the downtime, 3 memslots" in flat
    assert "TCP in 60 ms: rwnd-limited 48 of 52 ms busy, 2 retransmits (± 4 ms)" in flat
    assert "sndbuf" not in flat, "less than a tenth of the busy time"


def test_brownout_stands_beside_what_was_before() -> None:
    whole = explained()
    alone = msgspec.structs.replace(whole, sockets=[], waits=None, wire=None, vcpus=[], witnesses=[])
    flat = " ".join(render(alone, Canvas(80, False, True)).split())
    assert "brownout 0.500 ms, vCPU 1 out 5.0%, longest 0.400; before 0.2%" in flat


def test_exact_splits_say_so_and_small_matters_are_left_to_the_other_formats() -> None:
    whole = explained()
    final = whole.dirty_log.final
    assert final is not None and final.rearm is not None
    final = msgspec.structs.replace(
        final,
        split=b.Split(walk=1_000_000, flush=1_000_000, copy=0, other=0, samples="exact"),
        rearm=msgspec.structs.replace(final.rearm, ns=(whole.window_ns or 0) // 101),
    )
    log = msgspec.structs.replace(whole.dirty_log, final=final)
    flat = " ".join(render(msgspec.structs.replace(whole, dirty_log=log), Canvas(80, False, True)).split())
    assert "walk 50%, flush 50% (exact)" in flat
    assert "re-arming" not in flat


def test_a_crowded_report_keeps_to_one_screen_and_its_vcpus() -> None:
    waits = [b.Wait(phase="resume", thread=f"t{n}", duration_ns=10**7 + n, stack=["f"]) for n in range(5)]
    vcpus = breakdowns.many_vcpus().vcpus
    crowded = msgspec.structs.replace(explained(), waits=waits, vcpus=vcpus, diagnosis=diagnosed().diagnosis)
    lines = render(crowded, Canvas(80, False, True)).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert any("more, slowest first" in line for line in lines)
    assert any(line.startswith("re-arming") for line in lines)


def test_observers_cost_in_the_window_is_a_bound() -> None:
    whole = breakdowns.precopy()
    state = msgspec.structs.replace(whole.completeness, observer_window_ns=9_000)
    assert "tracing      cost at most 0.009 ms of it" in render(msgspec.structs.replace(whole, completeness=state))
    state = msgspec.structs.replace(state, observer_window_least_ns=1_000, observer_window_estimate_ns=4_000)
    whole = msgspec.structs.replace(whole, completeness=state)
    assert "tracing      cost about 0.004 ms of it" in render(whole)
    assert "0.001 to 0.009 ms by the readings around it" in render(whole, Canvas(80, False, True), verbose=True)
