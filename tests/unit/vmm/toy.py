# SPDX-License-Identifier: Apache-2.0
"""A VMM that does not exist: one folder's worth of adapter, which the registry test adds with one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from ebpf_mig.analysis.witnesses import MarkNames
from ebpf_mig.breakdown import Witness
from ebpf_mig.errors import VmmError
from ebpf_mig.linux.check import OK, Check
from ebpf_mig.vmm.adapter import Adapter, Kind, Option, Values
from ebpf_mig.vmm.witness import VmmWitness


class ToyWitness(VmmWitness):
    """Counts its own downtime, and adds a row."""

    marks = MarkNames(stopped=frozenset({"toy.stopped"}), downtime={"toy.downtime_ms": "as toys count"})
    parts = {"toy.wound": 2}  # noqa: RUF012

    def rows(self, traced: Any, attribution: Any, found: Any, wires: Any, late_ns: int) -> list[Witness]:  # noqa: ARG002
        own = [Witness(name="toy.wound", value_ns=1, difference_ns=0, explanation="by hand")]
        return [*found, *own] if any(m.name.startswith("toy.") for m in traced.material.marks) else list(found)


class ToyAdapter(Adapter):
    """Raises the error that it was given."""

    name = "toy"
    title = "Toy"
    comms = ("toyvmm",)
    about = "Migrate a toy."
    options = (
        Option("VM", "", argument=True),
        Option("--speed", "How fast.", Kind.RATE),
        Option("--patience", "How long.", Kind.DURATION),
        Option("--wheels", "How many.", Kind.COUNT, most=4),
        Option("--shape", "Which.", Kind.CHOICE, choices=("round", "square")),
        Option("--loud", "With a noise.", Kind.FLAG),
    )
    epilog = "Toys have no manual."
    examples = {"migrate": ("ebpf-mig migrate toy teddy",), "demo": ("ebpf-mig demo --vmm toy",)}  # noqa: RUF012
    has_lab = True
    hands_over = True

    @property
    def witness(self) -> VmmWitness:
        return ToyWitness()

    def connect(self, values: Values, remote: Any = None) -> NoReturn:  # noqa: ARG002
        raise VmmError(f"asked for {dict(sorted(values.items()))}")

    def lab(self, scenario: Any, binary: Any = None, *, local: bool = False, link: Any = None) -> NoReturn:
        raise VmmError(f"lab of {scenario.vcpus} vCPUs, {binary}, local {local}, link {link is not None}")

    def checks(self) -> Iterator[Check]:
        yield Check("toy box", OK, "full")

    def process_behind(self, path: str) -> int | None:
        return 4711 if path.endswith("toy.sock") else None


ADAPTER = ToyAdapter()
