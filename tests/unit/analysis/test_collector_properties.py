# SPDX-License-Identifier: Apache-2.0
"""What holds for any recording, sensible or not: no exception, an exact partition, nothing negative, no order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebpf_mig import breakdown as b
from ebpf_mig.collector import analyse
from ebpf_mig.linux import kvm
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.file import Recording
from ebpf_mig.recording.kinds import BY_TYPE
from tests.unit import scripts
from tests.unit.script import ATTACH, BASE, Script, cmd

PIDS = (1000, 2000, 3000)
NAMES = (  # noqa: SIM905
    "GET_DIRTY_LOG CLEAR_DIRTY_LOG RESET_DIRTY_RINGS SET_USER_MEMORY_REGION GET_REGS GET_MSRS GET_CLOCK SET_CLOCK "
    "KVMCLOCK_CTRL SET_REGS SET_MSRS CREATE_VCPU SET_GSI_ROUTING GET_IRQCHIP IOEVENTFD"
).split()

# Few distinct instants, so that ties, zeros and calls that end before they begin are frequent.
moment = st.one_of(st.just(0), st.integers(1, 40).map(lambda n: BASE + n * 300_000), st.integers(1, 1 << 40))
pid = st.sampled_from(PIDS)
tid = st.sampled_from([1, 2, 100, 101])
small = st.integers(0, 5)
inode = st.sampled_from([0, 70, 71, 80, 81])
ret = st.sampled_from([0, -4, -14])
size = st.sampled_from([0, 1, 16, 4096, 100_000, 256 << 20])


@st.composite
def threads(draw: st.DrawFn) -> tuple[int, int]:
    process = draw(pid)
    return process, process + draw(tid)


@st.composite
def event(draw: st.DrawFn) -> ev.AnyEvent:
    process, thread = draw(threads())
    match draw(st.integers(0, 10)):
        case 0 | 1:
            return ev.Ioctl(
                draw(moment), draw(moment), process, thread, 9, cmd(draw(st.sampled_from(NAMES))), 0,
                draw(small), draw(st.integers(0, 3)), 0, draw(size),
            )  # fmt: skip
        case 2 | 3:
            return ev.VcpuEnter(draw(moment), process, thread, 9, draw(moment), draw(ret), 1)
        case 4 | 5:
            return ev.VcpuExit(draw(moment), process, thread, 9, draw(moment), draw(ret))
        case 6:
            return ev.VcpuState(draw(moment), process, thread, 9, draw(moment), draw(moment), draw(ret), 1, 0, 0, 0)
        case 7:
            return ev.Kick(draw(moment), process, thread, process + draw(tid), 10)
        case 8:
            return ev.Transfer(
                draw(moment), draw(moment), process, thread, 7, draw(st.integers(0, 1)), draw(inode),
                draw(st.integers(1, 9)), draw(size), draw(st.sampled_from([0, 10, 10_000_000])), 0, draw(small), 0,
                draw(st.sampled_from([-1, 0, 10_000_000])),
            )  # fmt: skip
        case 9:
            address = st.sampled_from(["", "127.0.0.1:4444", "[::1]:5", "nonsense"])
            return ev.Socket(
                draw(moment), process, 7, draw(inode), draw(st.sampled_from([1, 2, 10, 40])), draw(address),
                draw(address), draw(inode),
            )  # fmt: skip
        case _:
            return draw(
                st.one_of(
                    st.builds(ev.Thread, st.just(process), st.just(thread), st.just("x"), st.integers(-1, 2)),
                    st.builds(
                        ev.Mark,
                        moment,
                        st.just(process),
                        st.sampled_from(["qmp.STOP", "qmp.RESUME", "qmp.downtime_ms", "qmp.MIGRATION.failed", ""]),
                        st.just(""),
                        small,
                    ),
                    st.builds(ev.Slot, moment, st.just(process), small, small, size, small),
                    st.builds(ev.OffCpu, moment, moment, st.just(process), st.just(thread), st.just(("f", "g"))),
                    st.builds(ev.Ending, moment, st.sampled_from(["migrated", "target-died"])),
                )
            )


def header(roles: Sequence[str]) -> ev.Header:
    targets = [ev.Target(pid=process, role=role) for process, role in zip(PIDS, roles, strict=False)]
    return ev.Header(begin_ns=BASE, targets=targets, attach=ATTACH)


roles = st.lists(st.sampled_from(["source", "destination", "unknown"]), max_size=3)


def check(found: b.Breakdown) -> None:
    """The promises that every breakdown keeps."""
    sides = tuple((p.phase, p.side) for p in found.phases)
    assert sides in (b.sides_of(False), b.sides_of(True))
    assert all((p.duration_ns or 0) == sum(end - begin for begin, end in p.spans) for p in found.phases)
    assert all(p.duration_ns is None for p in found.phases) == (found.window_ns is None)
    spans = sorted(span for phase in found.phases for span in phase.spans)
    assert all(begin < end for begin, end in spans)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
    assert sum(p.duration_ns or 0 for p in found.phases) == (found.window_ns or 0)
    if spans:
        assert (spans[0][0], spans[-1][1]) == (0, found.window_ns)
    if found.blackout is not None:
        assert found.window_ns is not None
        assert 0 <= found.blackout[0] <= found.blackout[1] <= found.window_ns
        assert found.blackout_ns == found.blackout[1] - found.blackout[0]
    for vcpu in found.vcpus:
        assert (vcpu.kick_ns or 0) >= 0 and (vcpu.blackout_ns or 0) >= 0
    for made in found.dirty_log.passes:
        assert min(made.kernel_ns, made.user_ns, made.bytes, made.send_ns, made.blocked_ns or 0) >= 0
    for fetch in found.dirty_log.fetches:
        assert fetch.begin <= fetch.end and fetch.kernel_ns >= 0
    for used in found.sockets:
        assert min(used.bytes, used.calls, used.in_call_ns, used.between_ns) >= 0
        assert (used.copy_ns or 0) >= 0 and (used.blocked_ns or 0) >= 0
    for wait in found.waits or []:
        assert 0 < wait.duration_ns <= found.phase_ns(wait.phase)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(roles, st.lists(event(), max_size=40), st.randoms(use_true_random=False))
def test_any_events_in_any_order(names: list[str], events: list[ev.AnyEvent], chance) -> None:  # type: ignore[no-untyped-def]
    found = analyse(Recording(header=header(names), events=events)).breakdown
    check(found)
    shuffled = list(events)
    chance.shuffle(shuffled)
    assert analyse(Recording(header=header(names), events=shuffled)).breakdown == found


@st.composite
def step(draw: st.DrawFn) -> ev.AnyEvent:
    """An action that either side may take in a switchover, on its migration socket or elsewhere."""
    begin = BASE + draw(st.integers(0, 500)) * 20_000
    end = begin + draw(st.sampled_from([0, 1000, 50_000, 3_000_000]))
    process = draw(st.sampled_from(PIDS[:2]))
    thread = process + draw(st.sampled_from([1, 2]))
    match draw(st.integers(0, 4)):
        case 0 | 1:
            name = draw(st.sampled_from(NAMES))
            return ev.Ioctl(begin, end, process, thread, 9, cmd(name), 0, draw(small), draw(small), 0, draw(size))
        case 2 | 3:
            return ev.Transfer(
                begin, end, process, thread, 7, draw(st.integers(0, 1)), 70 if process == 1000 else 80,
                draw(st.integers(1, 3)), draw(size), draw(st.integers(0, end - begin)), 0, draw(small), 0, 0,
            )  # fmt: skip
        case _:
            return ev.OffCpu(begin, end, process, thread, ("f",), draw(st.booleans()))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(step(), max_size=60), st.integers(1, 3), st.sampled_from([None, 2000, 1000]), st.data())
def test_any_steps_of_a_switchover(
    steps: list[ev.AnyEvent], vcpus: int, runs_again: int | None, data: st.DataObject
) -> None:
    """The source stops within 2 ms, and a guest runs (again) after 10 ms: that is the blackout in every case."""
    script = Script()
    source, destination = script.pair(vcpus)
    stops = [data.draw(st.integers(0, 2000)) for _ in range(vcpus)]
    starts = [data.draw(st.integers(10_100, 12_000)) for _ in range(vcpus)]
    for index in range(vcpus):
        source.kick(stops[index] - 50, index)
        source.interrupted(stops[index], index)
        if runs_again == 2000:
            destination.entered(starts[index], index)
        elif runs_again == 1000:
            source.entered(starts[index], index, left=stops[index], ret=-4)
    source.ioctl("GET_CLOCK", 2001)
    source.ioctl("GET_REGS", 2020)
    source.gets(2050)
    destination.ioctl("SET_REGS", 10_050)
    # A guest that does not run when logging is switched on was paused before: the next property.
    steps = [s for s in steps if not _logs(s, source.pid)]
    found = analyse(Recording(header=script.header, events=script.events + steps)).breakdown
    check(found)
    assert found.window_ns is not None
    if runs_again is None:
        assert found.blackout is None
    else:
        assert found.blackout_ns == (min(starts) - max(stops)) * 1000
        assert found.window_ns == (max(starts) - min(stops) + 50) * 1000


def _logs(event: ev.AnyEvent, pid: int) -> bool:
    """Whether it may switch dirty logging on."""
    return isinstance(event, ev.Ioctl) and event.cmd in kvm.MEMSLOT and event.pid == pid


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(step(), max_size=60), st.sampled_from([None, 2000, 1000]), st.integers(0, 9000))
def test_any_steps_of_the_migration_of_a_paused_guest(
    steps: list[ev.AnyEvent], runs_again: int | None, began: int
) -> None:
    """The source was stopped before logging: no blackout, whatever follows, and whoever runs at last."""
    script = Script()
    source, destination = script.pair()
    source.kick(-500, tid=3)
    source.interrupted(-450)
    source.logging(began)
    source.gets(began + 100)
    source.send(began + 150, began + 160, 100_000)
    destination.ioctl("SET_REGS", 10_050)
    if runs_again == 2000:
        destination.entered(10_100)
    elif runs_again == 1000:
        source.entered(10_100, left=-450, ret=-4)
    steps = [s for s in steps if not _logs(s, source.pid)]
    found = analyse(Recording(header=script.header, events=script.events + steps)).breakdown
    check(found)
    assert (found.window_ns, found.blackout_ns, found.throttled) == (None, None, None)
    assert found.migration.paused_before is True


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(scripts.ALL),
    st.lists(st.integers(0, 10_000), max_size=8),
    st.lists(event(), max_size=6),
    st.randoms(use_true_random=False),
)
def test_migrations_with_events_missing_and_foreign_ones_added(  # type: ignore[no-untyped-def]
    make, missing: list[int], foreign: list[ev.AnyEvent], chance
) -> None:
    script: Script = make()
    events = script.events
    for index in missing:
        events.pop(index % len(events))
    events += foreign
    found = analyse(Recording(header=script.header, events=events)).breakdown
    check(found)
    chance.shuffle(events)
    assert analyse(Recording(header=script.header, events=events)).breakdown == found


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(scripts.ALL), st.integers(-(10**9), 10**15))
def test_the_zero_of_the_clock_does_not_matter(make, shift: int) -> None:  # type: ignore[no-untyped-def]
    script: Script = make()
    moved = [_moved(e, shift) for e in script.events]
    begun = msgspec.structs.replace(script.header, begin_ns=script.header.begin_ns + shift)
    assert analyse(Recording(header=begun, events=moved)).breakdown == analyse(script.recording).breakdown


def _moved(event: ev.AnyEvent, shift: int) -> ev.AnyEvent:
    instants = BY_TYPE[type(event)].instants
    changes = {name: getattr(event, name) + shift for name in instants if getattr(event, name, 0)}
    return msgspec.structs.replace(event, **changes)
