# SPDX-License-Identifier: Apache-2.0
"""Names of kernel functions, from the kernel's own list; an id in the kernel's stack map is looked up once."""

from __future__ import annotations

from pathlib import Path

from ebpf_mig.probes.loader import Program
from ebpf_mig.probes.stacks import Stacks
from ebpf_mig.probes.trigger import CONTRACT
from ebpf_mig.recording.events import OffCpu, Samples
from tests.conftest import requires


@requires("root", "bcc")
def test_a_sample_s_addresses_get_the_names_of_kallsyms() -> None:
    symbols = [line.split() for line in Path("/proc/kallsyms").read_text().splitlines()]
    schedule = next(int(address, 16) for address, _, name, *_ in symbols if name == "schedule")
    program = Program("trigger.bpf.c", {"OFF_skc_num": 14}, CONTRACT)
    stacks = Stacks(program)
    stacks.prepare()
    sample = Samples(1, 7, 8, 100, 1, (str(schedule + 4), str(schedule)))
    assert stacks.named_sample(sample).stack == ("schedule", "schedule")
    program.close()


class Recorded:
    """Stands for a kernel's stack map, which cannot be filled from user space."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def kernel_stack(self, name: str, stack_id: int) -> tuple[str, ...]:
        assert name == "stacks"
        self.asked.append(stack_id)
        return ("__schedule", "schedule", "futex_wait_queue", *(f"f{i}" for i in range(20)))


def test_a_wait_is_named_without_the_scheduler_and_looked_up_once() -> None:
    program = Recorded()
    stacks = Stacks(program)  # type: ignore[arg-type]
    wait = OffCpu(1, 2, 7, 8, ("12",))
    first, second = stacks.named_wait(wait), stacks.named_wait(wait)
    assert first == second and first.stack[:2] == ("futex_wait_queue", "f0") and len(first.stack) == 12
    assert program.asked == [12]
    assert stacks.named_wait(OffCpu(1, 2, 7, 8)).stack == ()
