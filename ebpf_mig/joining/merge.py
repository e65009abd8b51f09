# SPDX-License-Identifier: Apache-2.0
"""Joins the recordings of a migration's two hosts into one, on the source's clock.

In: two recordings, in any order. Out: one recording that every report accepts. `remote` in its header describes how
the clocks were aligned. JoinError gives the reason why two recordings do not belong together. Recordings are
untrusted: nothing in them is used as a path or a command, and the work that they can cause is bounded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

from msgspec.structs import force_setattr, replace

from ebpf_mig.breakdown import Side
from ebpf_mig.errors import UsageError
from ebpf_mig.joining import clock
from ebpf_mig.joining import match as matching
from ebpf_mig.joining.clock import Bounds, ContradictionError, Evidence
from ebpf_mig.joining.evidence import Survey, gathered, rough, started, survey
from ebpf_mig.joining.match import JoinError, Match
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.coalesce import read_coalesced
from ebpf_mig.recording.events import LATEST
from ebpf_mig.recording.file import Recording
from ebpf_mig.recording.kinds import BY_TYPE, OF_A_PROCESS, pid_of
from ebpf_mig.text import printable

_OTHER_PID = 1 << 32
"""Added to the destination's pid if both pids are the same. No kernel assigns a pid this large."""
_SOURCE_ONLY = frozenset({"dirty-log", "kick", "brownout", "hidden-sends", "samples"})


@dataclass(frozen=True)
class Hint:
    """A hint from PTP or chrony: how far the destination's wall clock is ahead of the source's."""

    ahead_ns: int
    doubt_ns: int


def read_both(
    first: str, second: str, names: tuple[str, str] | None = None, hint: Hint | None = None, pid: int | None = None
) -> Recording:
    """Reads two files and joins them; see `joined`. RecordingError if one is not a recording."""
    both = read_coalesced(first, share=2), read_coalesced(second, share=2)
    return joined(*both, names or (printable(first), printable(second)), hint, pid)


def joined(
    first: Recording,
    second: Recording,
    names: tuple[str, str] = ("the first", "the second"),
    hint: Hint | None = None,
    pid: int | None = None,
) -> Recording:
    """One recording of both sides; the events of `first` and `second` are changed and must not be used again.

    `pid` (of the source or the destination) selects one of several migrations. Raises JoinError, UsageError.
    """
    first, second = _without_hops(first), _without_hops(second)
    near, far = survey(names[0], first), survey(names[1], second)
    _refuse_same(near, far)
    found = matching.matches(near.ends, far.ends, names)
    chosen = [match for match in found if pid is None or pid in (match.near, match.far)]
    if not chosen:
        both = ", ".join(f"{match.near} and {match.far}" for match in found)
        raise UsageError(f"no migration of process {pid} is in both recordings", f"they have migrations of {both}")
    match = chosen[0]
    if match.outward < 0:
        near, far = far, near
        match = Match(match.far, match.near, [(b, a) for a, b in match.ends], match.nat)
    bounds, evidence = _bounds(near, far, match, hint)
    notes = []
    if len(found) > 1 and pid is None:
        others = ", ".join(str(other.near) for other in found if other is not chosen[0])
        notes.append(f"both recordings also hold migrations of {others}; --pid chooses")
    return _merged(near, far, match, bounds, evidence, notes)


def _without_hops(recording: Recording) -> Recording:
    """The recording without the processes that passed the migration's bytes on: none of them is a side."""
    hops = {event.pid for event in recording.events if isinstance(event, ev.Mark) and event.name == ev.HOP}
    if not hops:
        return recording
    kept = [e for e in recording.events if pid_of(e) not in hops and not (isinstance(e, ev.Mark) and e.name == ev.HOP)]
    return replace(recording, events=kept)


def _refuse_same(near: Survey, far: Survey) -> None:
    a, b = near.header, far.header
    if a == b and a.boot_id:
        raise JoinError(f"{near.name} and {far.name} are the same recording")
    for one in (near, far):
        inside = {end.pid for end in one.ends}
        own = matching.matches_within(one.ends)
        if len(inside) > 1 and own:
            raise JoinError(f"{one.name} already has both sides of a migration", "show it with: ebpf-mig report")


def _bounds(source: Survey, destination: Survey, match: Match, hint: Hint | None) -> tuple[Bounds, Evidence]:
    """The offset at the destination's start."""
    evidence = Evidence()
    for near, far in match.ends:
        evidence.add(gathered(source, destination, near, far))
    near_it = rough(evidence)
    if near_it is None and hint is None:
        raise JoinError(
            f"{source.name} and {destination.name}: the connections match, but nothing in them bounds the clocks",
            "record both from before the migration begins, or give --clock-offset",
        )
    wall = None if hint is None else _wall(source.header, destination.header, hint)
    at = started(destination, match) - (near_it if near_it is not None else wall[0] if wall else 0)
    try:
        bounds = clock.bounds(evidence, at)
    except ContradictionError:
        raise JoinError(
            f"{source.name} and {destination.name} are not of the same migration: whatever the clocks, bytes of "
            f"{match.ends[0][0].name} would have been received before they were sent"
        ) from None
    if wall is None:
        return bounds, evidence
    evidence = evidence.limit(at, wall[0] - wall[1], wall[0] + wall[1])
    try:
        return clock.bounds(evidence, at), evidence
    except ContradictionError:
        raise UsageError(_refused(bounds, wall), "leave it out, or give it a larger doubt: OFFSET+-DOUBT") from None


def _refused(bounds: Bounds, wall: tuple[int, int]) -> str:
    sides = []
    if bounds.least is not None:
        sides.append(f"at least {(bounds.least - wall[0]) / 1e6:+.3f} ms")
    if bounds.most is not None:
        sides.append(f"at most {(bounds.most - wall[0]) / 1e6:+.3f} ms")
    doubt = f"+-{wall[1] / 1e6:.3f} ms"
    return (
        f"--clock-offset contradicts what was sent and received: it is off by {', '.join(sides)}, its doubt is {doubt}"
    )


def _wall(source: ev.Header, destination: ev.Header, hint: Hint) -> tuple[int, int]:
    """(offset of the monotonic clocks, doubt) from a hint about the wall clocks."""
    if source.clock is None or destination.clock is None:
        raise UsageError("a recording without its wall clock cannot use --clock-offset", "leave it out")
    a, b = source.clock, destination.clock
    offset = (a.realtime_ns - a.monotonic_ns) - (b.realtime_ns - b.monotonic_ns) + hint.ahead_ns
    return offset, hint.doubt_ns + a.doubt_ns + b.doubt_ns


def _merged(
    source: Survey, destination: Survey, match: Match, bounds: Bounds, evidence: Evidence, notes: list[str]
) -> Recording:
    a, b = source.header, destination.header
    pid = match.far if match.far != match.near else match.far + _OTHER_PID
    offset = bounds.offset
    remote = ev.Remote(
        host=b.host,
        pid=pid,
        own_pid=match.far,
        boot_id=b.boot_id,
        kernel=b.kernel,
        machine=b.machine,
        offset_ns=max(-LATEST, min(offset, LATEST)),
        bound_ns=None if bounds.bound is None else _most(bounds.bound),
        open="least" if bounds.least is None else "most" if bounds.most is None else "",
        at_ns=_within(bounds.at),
        drift_ppb=_most(-int(-max(map(abs, bounds.drift)) * 10**9 // 1)),
        pairs=evidence.pairs,
        cpus=b.cpus,
    )
    if match.nat:
        notes.append("the connection's two ends have different addresses or ports (NAT): matched by bytes and times")
    if a.boot_id and a.boot_id == b.boot_id:
        notes.append(f"both were recorded on one kernel, so the true offset is 0: estimated {offset / 1e3:+.3f} us")
    header = replace(
        a,
        targets=[_target(a, match.near, Side.SOURCE, match.near), _target(b, match.far, Side.DESTINATION, pid)],
        attach=_attach(a.attach, b.attach),
        notes=[*a.notes, *(note for note in b.notes if note not in a.notes), *notes],
        remote=remote,
    )
    here, there = _of(source, match.near), _of(destination, match.far)
    _shift(there, -offset)
    if pid != match.far:
        for event in chain.from_iterable(there.values()):
            force_setattr(event, "pid", pid)
    peers = {(pid, far.inode): near.inode for near, far in match.ends}
    for sockets in (here.get(ev.Socket, []), there.get(ev.Socket, [])):
        sockets[:] = [replace(socket, peer=peers.get((socket.pid, socket.socket), 0)) for socket in sockets]
    events: list[ev.AnyEvent] = [*chain.from_iterable(here.values()), *chain.from_iterable(there.values())]
    events += _costs(source, 0, remote=False) + _costs(destination, offset, remote=True)
    events += _own(source, 0, remote=False) + _own(destination, offset, remote=True)
    ending = _ending(source.ending, destination.ending, offset)
    events += [ending] if ending else []
    recordings = (source, destination)
    return Recording(
        header=header,
        events=events,
        truncated=any(side.recording.truncated for side in recordings),
        reason="; ".join(f"{s.name}: {s.recording.reason}" for s in recordings if s.recording.truncated),
        unknown=sum(side.recording.unknown for side in recordings),
    )


def _target(header: ev.Header, own: int, role: str, pid: int) -> ev.Target:
    known = next((t for t in header.targets if t.pid == own), ev.Target(pid=own, role=role))
    given = known.role if known.role in (Side.SOURCE, Side.DESTINATION) else role
    return replace(known, pid=pid, role=given)


def _attach(source: dict[str, str], destination: dict[str, str]) -> dict[str, str]:
    """Attach tiers of both hosts. If both hosts need a signal and one lacks it, it is absent."""
    tiers: dict[str, str] = {}
    for signal in sorted(source.keys() | destination.keys()):
        here, there = source.get(signal, "absent: not known"), destination.get(signal, "absent: not known")
        if here == there or signal in _SOURCE_ONLY:
            tiers[signal] = here
        elif here.startswith("absent"):
            tiers[signal] = f"absent: on the source: {here.removeprefix('absent').lstrip(': ')}"
        elif there.startswith("absent"):
            tiers[signal] = f"absent: on the destination: {there.removeprefix('absent').lstrip(': ')}"
        else:
            tiers[signal] = f"{here} and {there}"
    return tiers


def _of(side: Survey, pid: int) -> dict[type, list[Any]]:
    """The events of one process."""
    wanted = (ev.Mark, *OF_A_PROCESS)
    return {kind: [e for e in side.kinds[kind] if e.pid == pid] for kind in wanted if kind in side.kinds}


def _shift(kinds: dict[type, list[Any]], by_ns: int) -> None:
    """Moves instants in place: a copy of a million events takes seconds. 0 means "not seen" and stays 0.

    Instants that would lie before this host's clock began, or after the end of any clock, are cut to that limit.
    """
    for kind, events in kinds.items():
        for name in BY_TYPE[kind].instants:
            for event, at in zip(events, map(attrgetter(name), events), strict=True):
                if at:
                    force_setattr(event, name, _within(at + by_ns))


def _most(count: int) -> int:
    """The count, at most the largest that a recording can hold."""
    return min(count, LATEST)


def _within(at: int) -> int:
    return min(max(at, 1), LATEST)


_OWN = (ev.OwnRuns, ev.OwnRates, ev.OwnTurn)


def _own(side: Survey, offset: int, *, remote: bool) -> list[ev.AnyEvent]:
    """What our programs and our process took on one host. Both hosts' are kept apart."""
    events = [event for kind in _OWN for event in side.kinds.get(kind, ())]
    _shift({kind: side.kinds.get(kind, []) for kind in _OWN}, -offset)
    for event in events:
        force_setattr(event, "remote", remote)
    return events


def _costs(side: Survey, offset: int, *, remote: bool) -> list[ev.AnyEvent]:
    """Our own cost on one host, including its last reading. Run times of two hosts are kept apart."""
    found: list[ev.AnyEvent] = [
        replace(event, at_ns=_within(event.at_ns - offset), remote=remote) for event in side.kinds.get(ev.OwnCost, ())
    ]
    if side.ending and side.ending.observer_ns:
        found.append(
            ev.OwnCost(_within(side.ending.at_ns - offset), _most(sum(side.ending.observer_ns.values())), 0, remote)
        )
    return found


_REASONS = ("cancelled", "failed", "migrated")
"""Ending reasons that state the result, the most certain last."""


def _ending(source: ev.Ending | None, destination: ev.Ending | None, offset: int) -> ev.Ending | None:
    if source is None or destination is None:
        return None
    decisive = max((source, destination), key=lambda e: _REASONS.index(e.reason) if e.reason in _REASONS else -1)

    def both(name: str) -> dict[str, int]:
        sums = Counter(getattr(source, name)) + Counter(getattr(destination, name))
        return {key: _most(count) for key, count in sums.items()}

    return ev.Ending(
        _within(max(source.at_ns, destination.at_ns - offset)),
        decisive.reason,
        both("lost"),
        both("unpaired"),
        both("observer_ns"),
        both("observer_runs"),
        both("missed_runs"),
    )
