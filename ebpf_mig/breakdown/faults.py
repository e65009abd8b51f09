# SPDX-License-Identifier: Apache-2.0
"""The part of the breakdown on memory that came only when the guest touched it: waits and page faults of each vCPU.

In: nothing. Out: an enum and frozen structs. The conventions are those of the package, which exports them all.
"""

from __future__ import annotations

from enum import StrEnum

from ebpf_mig.breakdown.vocabulary import Struct


class PageSource(StrEnum):
    """Where a page came from that a vCPU waited for, as its kernel stack says."""

    USERFAULTFD = "userfaultfd"
    """A userfaultfd handler filled it, or let the guest write to it."""
    FILE = "file"
    """It was read from the file that is mapped there, or that file's page was locked."""
    SWAP = "swap"
    """It was read from swap."""
    BACKGROUND = "background"
    """Not known: a kernel thread fetched it while the vCPU was halted (KVM's asynchronous page fault)."""
    OTHER = "other"
    """A page fault that slept elsewhere, for instance for a lock or for free memory."""
    UNKNOWN = "unknown"
    """The kernel kept no stack: it may also be a halted vCPU."""


class PageWaits(Struct, frozen=True, kw_only=True):
    """The sleeps of one vCPU for pages from one source."""

    source: PageSource
    """Where the pages came from."""
    count: int
    """Number of sleeps."""
    waited_ns: int
    """All together, ns."""
    longest_ns: int
    """The longest, ns."""
    last_ns: int
    """From the first vCPU's start to the end of the last sleep, ns."""


class VcpuFaults(Struct, frozen=True, kw_only=True):
    """What one vCPU waited for inside KVM_RUN, from the guest's start to the end of tracing."""

    vcpu: int
    """Index of the vCPU."""
    waits: list[PageWaits]
    """By source, in the order of `PageSource`."""
    minor: int | None
    """Number of page faults that the kernel counted for its thread and that read nothing; null: not known."""
    major: int | None
    """Number of those for which a file was read, or that were tried again after a wait; null: not known."""
