# SPDX-License-Identifier: Apache-2.0
"""vCPUs by the VMM's own index, where KVM's ids have holes."""

from __future__ import annotations

from ebpf_mig.probes.thread_names import indices
from ebpf_mig.recording.events import Thread

APIC_IDS = [0, 1, 2, 4, 5, 6]
"""Of `-smp 6,sockets=2,cores=3`."""


def threads(form: str) -> dict[int, Thread]:
    return {100 + n: Thread(1, 100 + n, form.format(n), number) for n, number in enumerate(APIC_IDS)}


def test_names_number_the_vcpus() -> None:
    for form in ("CPU {}/KVM", "vcpu{}", "fc_vcpu {}"):
        assert indices(threads(form), APIC_IDS, "vmm") == {100 + n: n for n in range(6)}
    last = {105: threads("CPU {}/KVM")[105]}
    assert indices(last, [], "vmm") == {105: 5}, "also if the other vCPUs were not seen to run"


def test_without_such_names_the_rank_does() -> None:
    inherited = threads("qemu-system-x86")
    assert indices(inherited, APIC_IDS, "qemu-system-x86") == {100 + n: n for n in range(6)}
    assert indices({105: inherited[105]}, APIC_IDS, "qemu-system-x86") == {105: 5}, "86 is no index"
    assert indices(threads("worker"), APIC_IDS, "vmm") == {100 + n: n for n in range(6)}
