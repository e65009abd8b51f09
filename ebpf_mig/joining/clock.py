# SPDX-License-Identifier: Apache-2.0
"""Hard bounds on the clock offset of two hosts: every byte was sent before it was received.

In: pairs of instants, one on each clock; the first is known to come before the second. Out: `Bounds` on the
offset (the destination's clock minus the source's) at any instant. The model and its proof are in docs/clock.md: during
a migration the offset is a line, apart from a small drift of the rate. Each pair means that the line passes below or
above a point. Only the convex hull of the points is kept. The result is a convex region of lines. At any instant the
offset lies between the lowest and the highest of them. All arithmetic is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

MAX_DRIFT = Fraction(1, 1000)
"""How much the rates of two clocks can differ: adjtimex(2) allows +-500 ppm each (MAXFREQ, include/linux/timex.h)."""
WANDER = Fraction(1, 10**6)
"""How much the rate can change: the bound of a pair is loosened by this share of its distance in time."""
MOST_CORNERS = 256
"""Points of a hull that are used. Real hulls have a few dozen. Leaving some out makes the bound wider, never wrong."""
_FAR = Fraction(1 << 66)

Point = tuple[int, int]
"""An instant on the source's clock, and a limit of the offset there; ns."""


@dataclass
class Hull:
    """The lower convex hull of points that are added in order of time. The lines lie below all of them."""

    points: list[Point] = field(default_factory=list)
    count: int = 0
    """The number of points that were added."""

    def add(self, x: int, y: int) -> None:
        """Adds the next point."""
        self.count += 1
        points = self.points
        while points and (x <= points[-1][0] and y <= points[-1][1]):
            points.pop()
        if points and x <= points[-1][0]:
            return
        while len(points) > 1:
            (x1, y1), (x2, y2) = points[-2], points[-1]
            if (x2 - x1) * (y - y1) > (y2 - y1) * (x - x1):
                break
            points.pop()
        points.append((x, y))


@dataclass
class Evidence:
    """The known limits of the offset: it lies below each point of `most` and above each of `least`."""

    most: list[Hull] = field(default_factory=list)
    least: list[Hull] = field(default_factory=list)
    """With the offsets negated, so that both are lower hulls."""

    @property
    def pairs(self) -> tuple[int, int]:
        """The number of pairs that bound the offset from above, and from below."""
        return sum(hull.count for hull in self.most), sum(hull.count for hull in self.least)

    def add(self, other: Evidence) -> None:
        """Adds the evidence of another connection."""
        self.most += other.most
        self.least += other.least

    def limit(self, at: int, least: int, most: int) -> Evidence:
        """The same evidence, plus that the offset lies in [least, most] at one instant."""
        return Evidence([*self.most, Hull([(at, most)], 1)], [*self.least, Hull([(at, -least)], 1)])


@dataclass(frozen=True)
class Bounds:
    """The offset at one instant. None: nothing bounds it on that side."""

    at: int
    least: int | None
    most: int | None
    drift: tuple[Fraction, Fraction]
    """The least and the greatest difference of the rates."""

    @property
    def offset(self) -> int:
        """The middle of the limits, or the only known limit."""
        if self.least is None or self.most is None:
            return self.most if self.most is not None else self.least or 0
        return (self.least + self.most) // 2

    @property
    def bound(self) -> int | None:
        """How far `offset` can be off, in ns; None if one side has no limit."""
        if self.least is None or self.most is None:
            return None
        return max(self.most - self.offset, self.offset - self.least)


class ContradictionError(ValueError):
    """No two clocks can produce these pairs: something was received before it was sent."""


def bounds(evidence: Evidence, at: int) -> Bounds:
    """The offset at `at`, an instant on the source's clock. ContradictionError if the pairs fit no line."""
    region = _region(evidence, at)
    if not region:
        raise ContradictionError
    heights = [height for height, _ in region]
    slopes = [slope for _, slope in region]
    above, below = (sum(len(hull.points) for hull in hulls) for hulls in (evidence.most, evidence.least))
    return Bounds(
        at,
        _floor(min(heights)) if below else None,
        -_floor(-max(heights)) if above else None,
        (min(slopes), max(slopes)),
    )


Line = tuple[Fraction, Fraction]
"""The offset at the instant of interest, and its rate of change."""


def _region(evidence: Evidence, at: int) -> list[Line]:
    """The corners of the set of lines that pass below `most` and above `least`; empty if there are none."""
    corners: list[Line] = [
        (-_FAR, -MAX_DRIFT),
        (_FAR, -MAX_DRIFT),
        (_FAR, MAX_DRIFT),
        (-_FAR, MAX_DRIFT),
    ]
    for sign, hulls in ((1, evidence.most), (-1, evidence.least)):
        for hull in hulls:
            for x, y in _thinned(hull.points):
                limit = y + WANDER * abs(x - at)
                corners = _cut(corners, sign, sign * (x - at), limit)
    return corners


def _cut(corners: Sequence[Line], a: int, b: int, limit: Fraction) -> list[Line]:
    """The part of a convex polygon where a * height + b * slope <= limit."""
    kept: list[Line] = []
    over = [a * height + b * slope - limit for height, slope in corners]
    for index, corner in enumerate(corners):
        before, here = over[index - 1], over[index]
        if (before > 0) != (here > 0):
            last = corners[index - 1]
            share = before / (before - here)
            kept.append((last[0] + share * (corner[0] - last[0]), last[1] + share * (corner[1] - last[1])))
        if here <= 0:
            kept.append(corner)
    return kept


def _thinned(points: Sequence[Point]) -> Iterable[Point]:
    if len(points) <= MOST_CORNERS:
        return points
    step = len(points) / MOST_CORNERS
    return [points[int(number * step)] for number in range(MOST_CORNERS)]


def _floor(value: Fraction) -> int:
    return value.numerator // value.denominator
