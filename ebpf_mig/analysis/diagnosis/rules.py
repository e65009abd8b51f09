# SPDX-License-Identifier: Apache-2.0
"""The rules of the diagnosis, one row each.

In: nothing. Out: `RULES`, the most specific first. An instant belongs to the first rule that explains it. Each row has
a test on a real or a built recording in `tests/unit/analysis/test_diagnosis.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebpf_mig.analysis.diagnosis import claims
from ebpf_mig.analysis.diagnosis.claims import Finder
from ebpf_mig.analysis.lost_cpu import CPU_QUOTA, PREEMPTED, QUEUED, RT_THROTTLED, RUNNABLE, STOLEN
from ebpf_mig.breakdown import PhaseName, Side


@dataclass(frozen=True, slots=True)
class Rule:
    """One cause."""

    name: str
    """Public: it stands in the JSON report."""
    what: str
    """The cause in words; `{side}` becomes the source or the destination."""
    find: Finder
    """The time that it explains, and the evidence."""
    help: str = ""
    """What would help; empty: not known."""
    known: bool = True
    """False: it only says where the time went."""
    without: str = ""
    """What a prediction without this cause takes for granted (`--what-if NAME=0`); empty: it cannot be predicted."""


RULES = (
    Rule(
        "management",
        "the VMM is ready and waits for its manager",
        claims.manager,
        "shorten what the manager does before it lets the VMM go on",
        without="the manager lets the VMM go on at once",
    ),
    Rule(
        "slots_lock",
        "the dirty-log fetch waits for slots_lock, which another thread holds",
        claims.lock("slots_lock"),
        "find the holder: memslot changes and dirty-log ioctls take it",
        without="nobody holds slots_lock when the fetch needs it",
    ),
    Rule(
        "mmu_lock",
        "the dirty-log fetch waits for mmu_lock, which another thread holds",
        claims.lock("mmu_lock"),
        "find the holder: page faults and unmapping take it",
        without="nobody holds mmu_lock when the fetch needs it",
    ),
    Rule(
        "nagle",
        "Nagle's algorithm holds data back until a delayed ACK",
        claims.in_flight("Nagle, delayed ACK"),
        "set TCP_NODELAY, or write small messages with what follows them",
    ),
    Rule(
        "retransmission",
        "lost TCP segments are sent again",
        claims.in_flight("retransmission"),
        "look for packet loss between the hosts",
        without="no segment is lost, and the bytes arrive as soon as they were sent",
    ),
    Rule(
        "quota",
        "a CPU quota throttles {side}",
        claims.lost_cpu(CPU_QUOTA),
        "a higher CPU quota (cpu.max) during the migration",
        without="the CPU quota is never used up",
    ),
    Rule(
        "steal",
        "a hypervisor below the host withholds CPUs of {side}",
        claims.lost_cpu(STOLEN),
        "CPUs of that hypervisor which the host does not share",
        without="the hypervisor below withholds no CPU",
    ),
    Rule(
        "real-time",
        "the kernel throttles real-time threads of {side}",
        claims.lost_cpu(RT_THROTTLED),
        "a higher sched_rt_runtime_us, or no real-time policy for threads that never sleep",
        without="real-time threads are not throttled",
    ),
    Rule(
        "vcpus",
        "several vCPU threads of {side} wait for a CPU at once",
        claims.lost_cpu(PREEMPTED, QUEUED, RUNNABLE, vcpus=True),
        "give the VMM more CPUs, or the guest fewer vCPUs",
        without="each vCPU thread gets a CPU at once",
    ),
    Rule(
        "cpu",
        "threads of {side} could run and got no CPU (other load, a quota, or a hypervisor)",
        claims.contention,
        "a free CPU for the VMM's threads: less other load, or pinning",
        without="each thread gets a CPU at once",
    ),
    Rule(
        "srcu",
        "KVM waits in synchronize_srcu",
        claims.asleep(r"synchronize_srcu"),
        "fewer changes of memslots and interrupt routes after the stop",
        without="KVM does not wait for a grace period",
    ),
    Rule(
        "rcu",
        "the kernel waits for an RCU grace period",
        claims.asleep(r"synchronize_(rcu|sched|net)\w*|rcu_barrier\w*|wait_rcu_gp\w*"),
        without="the kernel does not wait for a grace period",
    ),
    Rule(
        "block",
        "the source waits for a block device",
        claims.block_device,
        "a faster disk, or less unwritten data in its cache at the stop",
        without="the block device answers at once",
    ),
    Rule(
        "link",
        "the link carries the data no faster",
        claims.limited_link,
        "more bandwidth, or less to send: a lower dirty rate, compression",
    ),
    Rule(
        "window",
        "the destination reads too slowly, and its receive window is full",
        claims.in_flight("receive window"),
        "a free CPU at the destination, prefaulted or huge pages",
    ),
    Rule(
        "reader",
        "the destination reads too slowly, and the source's send buffer stays full",
        claims.slow_reader,
        "a free CPU at the destination, prefaulted or huge pages",
    ),
    Rule(
        "buffer",
        "the source's send buffer is full",
        claims.full_buffer,
        "more bandwidth or a faster reader; which of them is not recorded",
    ),
    Rule(
        "fault",
        "{side} waits in page faults",
        claims.asleep(r"handle_(mm|pte)_fault|handle_userfault|do_fault|filemap_fault|kvm_mmu_faultin_pfn"),
        "prefault the memory, or use huge pages",
        without="the memory is mapped before it is touched",
    ),
    Rule(
        "timer",
        "the source sleeps on a timer while its vCPUs stop",
        claims.asleep(r"hrtimer_nanosleep|do_nanosleep", PhaseName.QUIESCE, side=Side.SOURCE),
        "a VMM that is woken by its vCPUs does not poll",
        without="the VMM notices the stop at once",
    ),
    Rule("wait", "{side} sleeps in the kernel", claims.named_waits, without="these sleeps take no time"),
    Rule(
        "fetch",
        "the final dirty-log fetch",
        claims.fetch,
        "huge pages, a dirty ring, fewer memslots; see --what-if fetch=0",
    ),
    Rule("ioctl", "{side} is inside KVM's ioctls", claims.inside_kvm, without="these calls take no time"),
    Rule(
        "late",
        "the destination reads late, the data had arrived",
        claims.in_flight("late reader", phases=(PhaseName.HANDOVER,)),
    ),
    Rule("data", "the destination waits for data", claims.no_data, known=False),
    Rule(
        "flight",
        "sent bytes had not arrived, and nothing says why",
        claims.in_flight("unknown", "waiting for an ACK", phases=claims.WAITS_FOR_DATA),
        known=False,
    ),
    Rule("thread", "{side} waits for another of its own threads", claims.other_threads, known=False),
    Rule(
        "settle",
        "the source settles its devices, and sleeps in poll meanwhile",
        claims.asleep(r"\w*poll\w*", PhaseName.QUIESCE, side=Side.SOURCE),
        known=False,
    ),
    Rule("asleep", "{side} sleeps, and its stack names no cause", claims.no_name, known=False),
    Rule("work", "{side} is at work", claims.at_work, known=False),
)

PREDICTABLE = {rule.name: rule.without for rule in RULES if rule.without}
"""What a prediction without a cause takes for granted, by the rule's name."""
