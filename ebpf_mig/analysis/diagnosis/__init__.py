# SPDX-License-Identifier: Apache-2.0
"""The diagnosis: what dominates the downtime, why, what is innocent, and what would help.

In: a breakdown, the waits and long calls near its window, the link's use. Out: a `Diagnosis`. Each rule claims the
instants that its evidence explains. An instant that an earlier rule claimed is not claimed again, so the causes never
add up to more than the blackout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ebpf_mig.analysis.bandwidth import LinkUse
from ebpf_mig.analysis.diagnosis import facts as known_facts
from ebpf_mig.analysis.diagnosis import innocent
from ebpf_mig.analysis.diagnosis.claims import sleepers
from ebpf_mig.analysis.diagnosis.facts import Claim, Facts, cut, shared, without
from ebpf_mig.analysis.diagnosis.rules import RULES, Rule
from ebpf_mig.analysis.long_calls import LongCall
from ebpf_mig.analysis.spans import Cover, merged, total
from ebpf_mig.analysis.waits import Sleep
from ebpf_mig.breakdown import SINGLE, Breakdown, Cause, Diagnosis, Mode, Mostly, PhaseName, Result, Side, Span, bounds
from ebpf_mig.text import ms

__all__ = ["diagnose", "explained", "headline"]
MOST_CAUSES = 5
_LEAST_SHARE = 0.02
_HELPS = 0.15
"""What would help is said for causes of at least this share."""
_GUILTY = 0.05
_SIDES = {Side.SOURCE: "the source", Side.DESTINATION: "the destination"}


def diagnose(
    breakdown: Breakdown,
    sleeps: Sequence[Sleep] | None,
    calls: Sequence[LongCall],
    link: LinkUse | str,
    origin: int,
    rules: Sequence[Rule] = RULES,
) -> Diagnosis:
    """The diagnosis. `origin` is the breakdown's instant 0 on the clock of `sleeps`, `calls` and `link`."""
    facts = known_facts.gather(breakdown, sleeps, calls, link, origin)
    if facts is None:
        return Diagnosis(headline=headline(breakdown), mostly=None, single=False, because=[], not_=[], help=[])
    causes = sorted(_causes(facts, rules), key=lambda cause: (-cause.duration_ns, cause.rule, cause.what))
    shown = [cause for cause in causes if cause.share >= _LEAST_SHARE][:MOST_CAUSES]
    single = bool(shown) and shown[0].share >= SINGLE
    guilty = frozenset(cause.rule for cause in causes if cause.share >= _GUILTY)
    helps = {rule.name: rule.help for rule in rules}
    useful = [cause.rule for at, cause in enumerate(shown) if cause.share >= _HELPS or (single and not at)]
    return Diagnosis(
        headline=headline(breakdown),
        mostly=_mostly(facts),
        single=single,
        because=shown,
        not_=list(innocent.rows(facts, guilty)),
        help=[text for name in dict.fromkeys(useful) if (text := helps[name])],
    )


def headline(breakdown: Breakdown) -> str:
    """The downtime with its error bound, or why there is none."""
    result = breakdown.migration.result
    if breakdown.blackout_ns is None:
        if breakdown.migration.paused_before and breakdown.window_ns is None:
            return "No downtime: the guest was paused before the migration"
        if breakdown.migration.stopped_early and breakdown.window_ns is None:
            return "No downtime: the guest stopped before the switchover (it shut down, or was paused)"
        if result in (Result.FAILED, Result.CANCELLED) and breakdown.window_ns is None:
            return "No downtime: the migration ended before the vCPUs stopped"
        if breakdown.migration.mode == Mode.RESTORE and breakdown.window_ns is not None:
            return f"Restored in {ms(breakdown.window_ns)} ms"
        alone = breakdown.migration.source is None
        nothing = breakdown.migration.mode == Mode.UNKNOWN and result == Result.UNKNOWN and not breakdown.sockets
        if nothing and breakdown.window_ns is None and not alone and not breakdown.dirty_log.passes:
            return "Downtime not measured: no migration was seen"
        missing = "stop" if breakdown.window_ns is None or alone else "start on the destination"
        return f"Downtime not measured: no vCPU {missing} was seen"
    aborted = breakdown.came_back and result not in (Result.SAVED, Result.COMPLETED)
    return f"{'Aborted downtime' if aborted else 'Downtime'} {bounds.blackout(breakdown)}"


def _mostly(facts: Facts) -> Mostly | None:
    took = [(total(shared(p.spans, [facts.blackout])), p.phase) for p in facts.breakdown.phases if p.spans]
    if not took:
        return None
    ns, phase = max(took, key=lambda item: item[0])
    return Mostly(phase=phase, duration_ns=ns, share=_share(ns, facts))


class _Explained(NamedTuple):
    """What one rule explains."""

    rule: Rule
    what: str
    side: Side
    claims: list[Claim]
    spans: list[Span]
    """Instants that no earlier rule explained, relative to the window's begin."""
    slept: list[tuple[Sleep, int]]
    """The waits in them, with the ns of each."""


def explained(
    breakdown: Breakdown,
    sleeps: Sequence[Sleep] | None,
    calls: Sequence[LongCall],
    link: LinkUse | str,
    origin: int,
) -> dict[str, list[Span]]:
    """The instants of the blackout that each rule explains, by its name. The arguments are those of `diagnose`."""
    facts = known_facts.gather(breakdown, sleeps, calls, link, origin)
    found: dict[str, list[Span]] = defaultdict(list)
    for one in _explained(facts, RULES) if facts else ():
        found[one.rule.name] = merged([*found[one.rule.name], *one.spans])
    return dict(found)


def _explained(facts: Facts, rules: Sequence[Rule]) -> Iterator[_Explained]:
    taken: list[Span] = []
    for rule in rules:
        for (what, side), claims in _grouped(rule.find(facts)).items():
            parts = [(claim, cut(merged(claim.spans), facts.blackout)) for claim in claims]
            spans = without((span for _, cuts in parts for span in cuts), taken)
            if not spans:
                continue
            others = Cover(taken)
            left = [(c.sleep, sum(e - b - others.within(b, e) for b, e in cuts)) for c, cuts in parts if c.sleep]
            taken = merged([*taken, *spans])
            yield _Explained(rule, what or rule.what, side, claims, spans, [(s, ns) for s, ns in left if ns])


def _causes(facts: Facts, rules: Sequence[Rule]) -> Iterator[Cause]:
    for one in _explained(facts, rules):
        yield Cause(
            rule=one.rule.name,
            what=one.what.replace("{side}", _SIDES.get(one.side, "the VMM")),
            side=one.side,
            phase=_phase(facts, one.spans),
            duration_ns=total(one.spans),
            share=_share(total(one.spans), facts),
            known=one.rule.known,
            evidence=[*sleepers(one.slept), *(line for claim in one.claims for line in claim.evidence)],
        )


def _grouped(claims: Iterable[Claim]) -> dict[tuple[str, Side], list[Claim]]:
    groups: dict[tuple[str, Side], list[Claim]] = defaultdict(list)
    for claim in claims:
        groups[claim.what, claim.side].append(claim)
    return groups


def _phase(facts: Facts, spans: Sequence[Span]) -> PhaseName:
    return max(facts.breakdown.phases, key=lambda p: total(shared(p.spans, spans))).phase


def _share(ns: int, facts: Facts) -> float:
    return round(ns / (facts.blackout[1] - facts.blackout[0]), 4)
