# SPDX-License-Identifier: Apache-2.0
"""Each rule of the diagnosis on a real recording or on a breakdown built for it, and what the diagnosis never does.

`CASES` has one row for each rule: the evidence goes in, and the rule must be the first cause.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from ebpf_mig import breakdown as b
from ebpf_mig.analysis import bandwidth
from ebpf_mig.analysis.bandwidth import LinkUse
from ebpf_mig.analysis.diagnosis import diagnose
from ebpf_mig.analysis.diagnosis.frames import described, meaningful
from ebpf_mig.analysis.diagnosis.rules import RULES
from ebpf_mig.analysis.long_calls import LongCall
from ebpf_mig.analysis.lost_cpu import CPU_QUOTA, PREEMPTED, QUEUED, RT_THROTTLED, RUNNABLE, STOLEN
from ebpf_mig.analysis.waits import Sleep
from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import read_recording
from tests.unit import breakdowns
from tests.unit.analysis.test_whatif import migration

DATA = Path(__file__).parents[2] / "data"
MS = 1_000_000
SRC = tuple(name for name, side in b.PHASES if side == b.Side.SOURCE)
DST = (b.PhaseName.HANDOVER, b.PhaseName.STATE_LOAD, b.PhaseName.RESUME)
END = ("do_syscall_64", "entry_SYSCALL_64_after_hwframe")
FUTEX = ("futex_do_wait", "__futex_wait", "futex_wait", "do_futex", "__x64_sys_futex", *END)
POLL = ("schedule_hrtimeout_range_clock", "poll_schedule_timeout.constprop.0", "do_sys_poll", "__x64_sys_ppoll", *END)


def src(begin: float, end: float, *stack: str, phases: tuple[b.PhaseName, ...] = SRC) -> Sleep:
    return Sleep(round(begin * MS), round(end * MS), b.Side.SOURCE, "migration 1", stack, phases)


def dst(begin: float, end: float, *stack: str, thread: str = "main 2", vcpu: bool = False) -> Sleep:
    phases = (b.PhaseName.RESUME,) if vcpu else DST
    return Sleep(round(begin * MS), round(end * MS), b.Side.DESTINATION, thread, stack, phases, vcpu)


def called(begin: float, end: float, name: str = "SET_USER_MEMORY_REGION") -> LongCall:
    return LongCall(int(begin * MS), int(end * MS), b.Side.DESTINATION, "vmm 2", name, (b.PhaseName.STATE_LOAD,))


def spent(**milliseconds: float) -> b.Breakdown:
    """A blackout of 100 ms: the phases in order with their ms, handover for the rest."""
    at, spans = 0, {}
    for name, one in milliseconds.items():
        spans[name] = [(at, at + round(one * MS))]
        at += round(one * MS)
    spans["handover"] = [*spans.get("handover", []), (at, 100 * MS)]
    whole = breakdowns.precopy()
    log = replace(whole.dirty_log, fetches=[])
    return replace(
        whole,
        window_ns=100 * MS,
        blackout_ns=100 * MS,
        blackout=(0, 100 * MS),
        phases=breakdowns.phases(**spans),
        dirty_log=log,
        sockets=[],
        wire=[],
    )


def flight(reason: str, evidence: str = "seen") -> b.Breakdown:
    row = b.Wire(bytes=9, sent=2 * MS, received=90 * MS, in_flight_ns=88 * MS, reason=reason, evidence=evidence)
    return replace(spent(state__send=1), wire=[row])


def held(lock: str) -> b.Breakdown:
    whole = spent(fetch__kernel=80)
    ioctl = b.FetchIoctl(ioctl="GET_DIRTY_LOG", slot=0, begin=0, duration_ns=80 * MS, lock_wait_ns={lock: 70 * MS})
    fetch = b.Fetch(begin=0, end=80 * MS, kernel_ns=80 * MS, ioctls=[ioctl])
    return replace(whole, dirty_log=replace(whole.dirty_log, fetches=[fetch]))


def managed() -> b.Breakdown:
    wait = b.ManagerWait(side=b.Side.DESTINATION, begin=5 * MS, duration_ns=80 * MS, commands=2)
    return replace(spent(management=90), management=[wait])


def far(local: str = "10.0.0.1:1", remote: str = "10.0.0.2:2") -> b.Breakdown:
    ends = replace(breakdowns.precopy().sockets[0], local=local, remote=remote)
    return replace(spent(memory__send=90), sockets=[ends])


LINK = LinkUse(((0, 80 * MS),), 10_000_000, 90 * MS, 11_000_000, MS, MS, queued_bytes=1_000_000, steadiness=0.9)


def windowed() -> b.Breakdown:
    info = {"busy_us": 90_000, "rwnd_limited_us": 80_000, "from": 0, "until": 90 * MS}
    return replace(spent(memory__send=90), sockets=[replace(breakdowns.precopy().sockets[0], tcp_info=info)])


@cache
def recorded(name: str) -> b.Diagnosis:
    found = analyse(read_recording(DATA / f"{name}.rec")).breakdown.diagnosis
    assert found is not None
    return found


def built(
    whole: b.Breakdown, *sleeps: Sleep, link: LinkUse | str = "unknown", calls: Sequence[LongCall] = ()
) -> b.Diagnosis:
    return diagnose(whole, sleeps, calls, link, 0)


SIDES_AT = ((b.Side.SOURCE, 0), (b.Side.DESTINATION, 40))
Case = Callable[[], b.Diagnosis]
WAITS = ("schedule_timeout", "wait_for_completion")
CASES: dict[str, Case] = {
    "management": lambda: built(managed()),
    "slots_lock": lambda: built(held("slots_lock")),
    "mmu_lock": lambda: built(held("mmu_lock")),
    "nagle": lambda: recorded("cloud-hypervisor-54-tcp"),
    "retransmission": lambda: built(flight("retransmission")),
    "quota": lambda: built(spent(state__save=90), src(0, 80, CPU_QUOTA)),
    "steal": lambda: built(spent(state__save=90), src(0, 80, STOLEN)),
    "real-time": lambda: built(spent(state__save=90), src(0, 80, RT_THROTTLED)),
    "vcpus": lambda: built(
        spent(resume=90),
        dst(0, 40, RUNNABLE, thread="CPU 0/KVM 3", vcpu=True),
        dst(30, 80, RUNNABLE, thread="CPU 1/KVM 4", vcpu=True),
    ),
    "cpu": lambda: recorded("qemu-11.1-multifd"),
    "srcu": lambda: built(spent(state__load=90), dst(0, 80, *WAITS, "__synchronize_srcu.part.0", "kvm_set_memslot")),
    "rcu": lambda: built(spent(state__load=90), dst(0, 80, *WAITS, "__wait_rcu_gp", "synchronize_rcu", "f")),
    "block": lambda: built(
        spent(quiesce=90), src(0, 88, *POLL), src(5, 85, "io_schedule", "blkdev_issue_flush", "ext4_sync", phases=())
    ),
    "link": lambda: built(far(), link=LINK),
    "window": lambda: built(flight("receive window")),
    "reader": lambda: built(windowed(), src(1, 80, "wait_woken", "sk_stream_wait_memory", "tcp_sendmsg_locked")),
    "buffer": lambda: built(spent(memory__send=90), src(1, 80, "wait_woken", "sk_stream_wait_memory", "tcp_sendmsg")),
    "fault": lambda: built(spent(state__load=90), dst(1, 80, "schedule", "handle_userfault", "handle_mm_fault")),
    "timer": lambda: built(spent(quiesce=90), src(1, 80, "do_nanosleep", "hrtimer_nanosleep", "common_nsleep", *END)),
    "wait": lambda: built(spent(state__load=90), dst(1, 80, "__lock_sock", "lock_sock_nested", "tcp_sendmsg", *END)),
    "fetch": lambda: built(spent(fetch__kernel=70, fetch__user=10)),
    "ioctl": lambda: built(spent(state__load=90), calls=[called(0, 50), called(50, 80)]),
    "late": lambda: built(flight("late reader")),
    "data": lambda: built(spent(state__send=1), dst(1, 90, "wait_woken", "sk_wait_data", "tcp_recvmsg")),
    "flight": lambda: built(flight("unknown")),
    "thread": lambda: built(spent(state__save=90), src(1, 80, *FUTEX)),
    "settle": lambda: built(spent(quiesce=90), src(1, 80, *POLL)),
    "asleep": lambda: built(spent(state__save=90), src(1, 80)),
    "work": lambda: built(spent(state__save=90)),
}  # fmt: skip


def test_each_rule_has_a_case() -> None:
    assert list(CASES) == [rule.name for rule in RULES]


@pytest.mark.parametrize("name", CASES)
def test_each_rule_finds_its_cause(name: str) -> None:
    found = CASES[name]()
    first = found.because[0]
    rule = next(rule for rule in RULES if rule.name == name)
    assert (first.rule, first.known, found.single) == (name, rule.known, True)
    assert "{" not in first.what
    assert (rule.help in found.help) is bool(rule.help)


@pytest.mark.parametrize("name", [name for name in CASES if name != "work"])
def test_a_cause_has_evidence(name: str) -> None:
    assert CASES[name]().because[0].evidence


def test_without_the_evidence_no_cause_is_known() -> None:
    """The same phases as in the cases, but nothing recorded in them: no rule guesses."""
    for whole in (spent(state__load=90), spent(quiesce=90), spent(memory__send=90), spent(state__send=1)):
        assert not any(cause.known for cause in built(whole).because)
        assert diagnose(whole, None, [], "unknown", 0).because == []


def test_below_40_per_cent_there_is_no_single_cause() -> None:
    srcu = (*WAITS, "__synchronize_srcu", "kvm_set_irq_routing")
    for end, single in ((39.9, False), (40.1, True)):
        found = built(spent(quiesce=20, state__load=60), dst(20, 20 + end, *srcu))
        assert (found.because[0].rule, found.single) == ("srcu", single)


def test_within_one_host_the_link_is_never_the_cause() -> None:
    found = built(far("127.0.0.1:1", "127.0.0.1:2"), link=LINK)
    assert "link" not in {cause.rule for cause in found.because}


def test_a_short_queue_does_not_make_a_link_slow() -> None:
    """10 MB in 80 ms: 600 kB are 4.8 ms of the link's time."""
    short = dataclasses.replace(LINK, queued_bytes=600_000)
    assert "link" not in {cause.rule for cause in built(far(), link=short).because}


def test_an_even_stream_on_a_built_recording_and_bursts_on_real_ones() -> None:
    """60 segments, one per millisecond; and every recording here went over the loopback device."""
    even = bandwidth.observe(analyse(migration().recording).traced)
    assert not isinstance(even, str) and even.steadiness > 0.8
    for path in sorted(DATA.glob("qemu-1*-tcp.rec")):
        use = bandwidth.observe(analyse(read_recording(path)).traced)
        assert not isinstance(use, str) and use.steadiness < 0.1, path.name


def test_a_stream_in_bursts_is_not_limited_by_the_link() -> None:
    bursts = dataclasses.replace(LINK, steadiness=0.4)
    assert "link" not in {cause.rule for cause in built(far(), link=bursts).because}


def test_of_several_sleepers_no_instant_counts_twice() -> None:
    both = [
        dst(10, 50, *WAITS, "__synchronize_srcu", "a"),
        dst(30, 70, *WAITS, "__synchronize_srcu", "b", thread="t 9"),
    ]
    first = built(spent(state__load=90), *both).because[0]
    assert (first.duration_ns, first.share) == (60 * MS, 0.6)
    assert first.evidence == ["40.000 ms in 1 sleep of main 2 in synchronize_srcu (a)",
                              "40.000 ms in 1 sleep of t 9 in synchronize_srcu (b)"]  # fmt: skip


def test_only_what_lies_in_the_blackout_counts() -> None:
    whole = replace(spent(pause=50, state__save=40), blackout=(50 * MS, 100 * MS), blackout_ns=50 * MS)
    found = built(whole, src(0, 60, *FUTEX))
    assert found.mostly is not None and found.mostly.phase == "state.save"
    assert {cause.rule: cause.duration_ns for cause in found.because}["thread"] == 10 * MS


def test_a_sender_counts_only_while_the_driver_waits_for_it() -> None:
    sender = src(0, 80, RUNNABLE, phases=(b.PhaseName.MEMORY_SEND,))
    alone = built(spent(memory__send=90), sender)
    assert "cpu" not in {cause.rule for cause in alone.because}
    waited = built(spent(memory__send=90), sender, src(20, 60, *FUTEX))
    assert next(c for c in waited.because if c.rule == "cpu").duration_ns == 40 * MS


@pytest.mark.parametrize(
    ("transport", "stack"),
    [
        (b.Transport.UNIX, ("schedule_timeout", "sock_alloc_send_pskb", "unix_stream_sendmsg")),
        (b.Transport.VSOCK, ("schedule_timeout", "wait_woken", "vsock_connectible_sendmsg")),  # of an emulated 6.1
    ],
)
def test_behind_a_forwarder_neither_the_reader_nor_the_network_is_judged(
    transport: b.Transport, stack: tuple[str, ...]
) -> None:
    """A socket to socat or to a manager: what is behind it was not seen."""
    whole = spent(memory__send=90)
    full = src(1, 80, *stack)
    near = replace(whole, migration=replace(whole.migration, transport=transport))
    found = built(near, full)
    assert found.because[0].rule == "reader" and "the network" in {one.what for one in found.not_}
    stream = b.Pairing(by=b.PairedBy.STREAM, bytes=9)
    for changes in ({"through": ["socat 5"]}, {"pairing": stream}, {"destination": None}):
        found = built(replace(near, migration=replace(near.migration, **changes)), full)
        assert found.because[0].rule == "buffer", changes
        assert "the network" not in {one.what for one in found.not_}, changes


FULL = src(0, 80, "wait_woken", "sk_stream_wait_memory", "tcp_sendmsg_locked")


def through(whole: b.Breakdown) -> b.Breakdown:
    """The same with a program in between."""
    return replace(whole, migration=replace(whole.migration, through=["socat 5"]))


def test_behind_a_forwarder_a_full_window_is_not_the_destinations() -> None:
    """It is the forwarder that does not read."""
    assert built(windowed(), FULL).because[0].rule == "reader"
    assert built(through(windowed()), FULL).because[0].rule == "buffer"


def test_behind_a_forwarder_an_even_stream_is_not_the_links() -> None:
    assert built(far(), link=LINK).because[0].rule == "link"
    assert "link" not in {cause.rule for cause in built(through(far()), link=LINK).because}


@pytest.mark.parametrize(("unread", "rule"), [(39, "buffer"), (40, "reader")])
def test_what_has_arrived_and_is_not_read_is_the_readers(unread: int, rule: str) -> None:
    lies = dataclasses.replace(LINK, limited=(), limited_bytes=0, unread=((0, unread * MS),))
    for whole, answer in ((far(), rule), (through(far()), "buffer")):
        assert built(whole, FULL, link=lies).because[0].rule == answer


def test_a_link_whose_bytes_lie_unread_is_not_slow() -> None:
    for unread, rule in ((39, "link"), (41, "reader")):
        use = dataclasses.replace(LINK, unread=((0, unread * MS),))
        assert built(far(), FULL, link=use).because[0].rule == rule


@pytest.mark.parametrize(("lost", "rule"), [(39, "buffer"), (41, "reader")])
def test_a_reader_without_a_cpu_is_why_the_buffer_is_full(lost: int, rule: str) -> None:
    """Its wait lies in a phase of the source, so it explains nothing by itself."""
    for word in (PREEMPTED, QUEUED, CPU_QUOTA, RUNNABLE):
        found = built(spent(memory__send=90), FULL, dst(5, 5 + lost, word)).because[0]
        assert (found.rule, any("had no CPU" in line for line in found.evidence)) == (rule, rule == "reader")
    vcpu = dst(5, 5 + lost, PREEMPTED, vcpu=True)
    assert built(spent(memory__send=90), FULL, vcpu).because[0].rule == "buffer", "it reads nothing"


def test_waits_of_both_sides_for_their_manager_are_one_cause() -> None:
    waits = [b.ManagerWait(side=side, begin=at * MS, duration_ns=30 * MS, commands=1) for side, at in SIDES_AT]
    found = built(replace(spent(management=90), management=waits))
    assert (found.because[0].rule, found.because[0].share) == ("management", 0.6)
    assert len(found.because[0].evidence) == 2


def test_lost_cpu_is_other_load_only_where_that_is_proven() -> None:
    sure = built(spent(state__save=90), src(0, 40, PREEMPTED), src(40, 80, QUEUED))
    assert "others use" in sure.because[0].what
    doubtful = built(spent(state__save=90), src(0, 70, PREEMPTED), src(70, 80, RUNNABLE))
    assert "(other load, a quota, or a hypervisor)" in doubtful.because[0].what


def test_a_thread_that_seems_to_be_at_work_may_have_lost_its_cpu_to_a_hypervisor() -> None:
    whole = spent(state__save=90)
    taken = [
        b.Stolen(side=side, cpu=1, stolen_ns=60 * MS, between_ns=120 * MS)
        for side in (b.Side.BOTH, b.Side.SOURCE, b.Side.DESTINATION)
    ]
    for row, told in zip(taken, (1, 1, 0), strict=True):
        found = built(replace(whole, stolen=[row])).because[0]
        assert found.rule == "work"
        assert found.evidence == ["a hypervisor withheld 60.000 ms of CPU 1 around the window"] * told


FLUSH = ("io_schedule", "wait_for_completion_io_timeout", "blkdev_issue_flush", "ext4_sync_file", "do_fsync")


@pytest.mark.parametrize(
    ("phase", "mode", "rule"),
    [
        pytest.param("sync", b.Mode.SNAPSHOT, "block", id="flush"),
        pytest.param("memory__send", b.Mode.SNAPSHOT, "block", id="file"),
        pytest.param("memory__send", b.Mode.PRECOPY, "asleep", id="network"),
    ],
)
def test_a_worker_at_the_disk_holds_up_what_goes_through_files(phase: str, mode: b.Mode, rule: str) -> None:
    whole = spent(**{phase: 90})
    whole = replace(whole, migration=replace(whole.migration, mode=mode))
    found = built(whole, src(0, 88, *POLL), src(5, 85, *FLUSH, phases=()))
    assert [cause.rule for cause in found.because][:1] == [rule]


@pytest.mark.parametrize(("since", "rule"), [(20, "cpu"), (25, "asleep")])
def test_a_worker_without_a_cpu_counts_once_its_disk_has_answered(since: float, rule: str) -> None:
    """Another worker that has no CPU may have nothing to do with what the VMM waits for."""
    found = built(spent(sync=90), src(0, 88, *POLL), src(5, 20, *FLUSH, phases=()), src(since, 85, QUEUED, phases=()))
    assert found.because[0].rule == rule


def test_clocks_that_allow_anything_prove_nothing_in_flight() -> None:
    whole = flight("Nagle, delayed ACK")
    assert whole.wire is not None
    for bound in (None, 30 * MS):
        unsure = replace(whole, wire=[replace(whole.wire[0], bound_ns=bound)])
        assert "nagle" not in {cause.rule for cause in built(unsure).because}


def test_what_is_innocent() -> None:
    cleared = {one.what: one.why for one in recorded("cloud-hypervisor-54-tcp").not_}
    assert cleared["the final dirty-log fetch"] == "0.062 ms" and "the bandwidth" in cleared
    assert "the network" not in cleared, "it is what held the data back"
    assert {one.what for one in recorded("qemu-11.1-unix").not_} == {"the final dirty-log fetch", "the network"}
    slow = CASES["fetch"]()
    assert "the final dirty-log fetch" not in {one.what for one in slow.not_}
    unseen = replace(spent(state__load=90), wire=None)
    assert "the network" not in {one.what for one in built(unseen).not_}, "one side only: nothing is known of it"


@pytest.mark.parametrize(
    ("name", "headline"),
    [
        ("qemu-7.2-cancelled", "No downtime: the migration ended before the vCPUs stopped"),
        ("cloud-hypervisor-54-local-source-died", "Downtime not measured: no vCPU start on the destination was seen"),
        ("aborted-qemu-7.2", "Aborted downtime 1181.524 ms"),
        ("qemu-10.0-ring", "Downtime 48.429 ms"),
    ],
)
def test_headlines(name: str, headline: str) -> None:
    assert recorded(name).headline == headline


def test_the_destination_of_an_aborted_migration_is_not_the_cause() -> None:
    assert all(cause.side != "destination" for cause in recorded("aborted-qemu-7.2").because)


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        (
            ("schedule_timeout", "wait_for_completion", "__synchronize_srcu.part.0", "kvm_swap_active_memslots",
             "kvm_set_memslot", "kvm_set_memory_region", *END),
            "synchronize_srcu (kvm_swap_active_memslots < kvm_set_memslot)",
        ),
        (FUTEX, "futex_wait"),
        (POLL, "do_sys_poll"),
        (("io_schedule", "folio_wait_bit_common", "filemap_fault", "__do_fault", "do_fault", "asm_exc_page_fault"),
         "filemap_fault (do_fault < do_fault)"),
        ((RUNNABLE,), RUNNABLE),
        (("schedule",), "schedule"),
        ((), ""),
    ],
)  # fmt: skip
def test_waits_are_named_by_the_function_that_says_something(stack: tuple[str, ...], words: str) -> None:
    assert described(stack) == words


@given(st.lists(st.text(max_size=20), max_size=12))
def test_any_stack_has_a_name_made_of_it(stack: list[str]) -> None:
    shown = meaningful(stack)
    assert len(shown) <= 3 and bool(shown) is bool(stack)


instants = st.integers(-10, 120)
stacks = st.sampled_from(
    [(), FUTEX, POLL, (RUNNABLE,), (CPU_QUOTA,), ("schedule", "__synchronize_srcu"), ("io_schedule",)]
)


@given(st.lists(st.tuples(instants, instants, stacks, st.booleans()), max_size=30))
@example([(0, 10, ("schedule", "__synchronize_srcu"), True), (0, 50, ("schedule", "__synchronize_srcu"), False)])
def test_causes_never_explain_more_than_the_blackout(rows: list[tuple[int, int, tuple[str, ...], bool]]) -> None:
    sleeps = [(src if here else dst)(min(x, y), max(x, y), *stack) for x, y, stack, here in rows]
    whole = spent(quiesce=20, memory__send=20, state__load=20, resume=20)
    found = built(whole, *sleeps)
    assert sum(cause.duration_ns for cause in found.because) <= 100 * MS
    assert sum(cause.share for cause in found.because) <= 1.001
    assert found == built(whole, *reversed(sleeps)), "the order of events does not matter"


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("qemu-7.2-cancelled", ""),
        (
            "cloud-hypervisor-54-tcp",
            "mostly handover (84 %): Nagle's algorithm holds data back until a delayed ACK (82 %)",
        ),
        ("qemu-10.0-postcopy", "mostly state.load (49 %), no single cause"),
    ],
)
def test_the_summary_fits_a_log_line(name: str, summary: str) -> None:
    assert recorded(name).summary == summary


def test_a_summary_never_states_what_is_not_known() -> None:
    assert ": cause not known, the source is at work" in CASES["work"]().summary
