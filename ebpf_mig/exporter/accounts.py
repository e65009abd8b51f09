# SPDX-License-Identifier: Apache-2.0
"""The watch's own accounts: signs and what became of them, delays, time armed, events lost, run time of the programs.

In: what the watch does, and the tracer's counters. Out: the counters of a `Status`.
"""

from __future__ import annotations

import bisect

from ebpf_mig.exporter.observation import DELAYS_S


class Accounts:
    """Counters since the watch started. Times in seconds are of `time.monotonic`."""

    def __init__(self) -> None:
        self.triggers: dict[str, dict[str, int]] = {}
        """By kind of sign and by outcome."""
        self.delays = [0] * (len(DELAYS_S) + 1)
        self.delay_s = 0.0
        self.lost: dict[str, int] = {}
        self.run_ns: dict[str, int] = {}
        self._losses: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._armed_at: float | None = None
        self._armed_s = 0.0

    @property
    def armed(self) -> bool:
        """Whether the costly probes are attached."""
        return self._armed_at is not None

    def armed_s(self, now_s: float) -> float:
        """For how long they have been attached, all in all."""
        return self._armed_s + (now_s - self._armed_at if self._armed_at is not None else 0.0)

    def arm(self, now_s: float) -> None:
        """They are attached."""
        self._armed_at = now_s

    def disarm(self, now_s: float) -> None:
        """They are detached."""
        self._armed_s = self.armed_s(now_s)
        self._armed_at = None

    def count(self, kind: str, outcome: str) -> None:
        """One sign of that kind led to that."""
        outcomes = self.triggers.setdefault(kind, {})
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    def delayed(self, seconds: float) -> None:
        """So long after its sign a VM was traced."""
        self.delays[bisect.bisect_left(DELAYS_S, seconds)] += 1
        self.delay_s += seconds

    def since_last(
        self, losses: tuple[dict[str, int], dict[str, int]], runtime_ns: dict[str, int]
    ) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        """(lost, unpaired, run time in ns) since the last call, of all traced VMs together, from the totals now."""
        lost, unpaired = (_since(now, before) for now, before in zip(losses, self._losses, strict=True))
        self._losses = losses
        for name, number in lost.items():
            self.lost[name] = self.lost.get(name, 0) + number
        since = _since(runtime_ns, self.run_ns)
        self.run_ns |= runtime_ns
        return lost, unpaired, since


def _since(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: n - before.get(name, 0) for name, n in now.items() if n > before.get(name, 0)}
