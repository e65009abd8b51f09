# SPDX-License-Identifier: Apache-2.0
"""The part of the breakdown on dirty logging: fetches of the dirty log, pre-copy passes, re-arming.

In: nothing. Out: frozen structs. The conventions are those of the package, which exports them all.
"""

from __future__ import annotations

import msgspec

from ebpf_mig.breakdown.vocabulary import DirtyLogMode, Struct


class Slot(Struct, frozen=True, kw_only=True):
    slot: int
    """Number of the memslot, address space in bits 16 and up."""
    base: int
    """Guest physical address, bytes."""
    size_bytes: int
    """Its size, bytes."""


class Split(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What dirty-log ioctls did on the CPU, without spinning for locks. Only estimates from samples have errors."""

    walk: int
    """Write-protecting pages or clearing their dirty bits, ns."""
    flush: int
    """Flushing TLBs, with the wait for other CPUs, ns."""
    copy: int
    """Copying the bitmap to or from user space, ns."""
    other: int
    """The rest, ns."""
    samples: int | str
    """`exact`, or the number of samples that the estimate is made from."""
    walk_error: int | None = None
    """Error of `walk` at 95 % confidence, ns."""
    flush_error: int | None = None
    """Error of `flush` at 95 % confidence, ns."""
    copy_error: int | None = None
    """Error of `copy` at 95 % confidence, ns."""
    other_error: int | None = None
    """Error of `other` at 95 % confidence, ns."""

    @property
    def parts(self) -> dict[str, int]:
        """Time by part, ns."""
        return {"walk": self.walk, "flush": self.flush, "copy": self.copy, "other": self.other}

    @property
    def errors(self) -> dict[str, int | None]:
        """Error of each part at 95 % confidence, ns; None if the part is exact."""
        return {
            "walk": self.walk_error,
            "flush": self.flush_error,
            "copy": self.copy_error,
            "other": self.other_error,
        }


class FetchIoctl(Struct, frozen=True, kw_only=True):
    ioctl: str
    """The request's name without its prefix, e.g. `GET_DIRTY_LOG`."""
    slot: int
    """Number of the memslot."""
    begin: int
    """When it was called, ns from the window's begin."""
    duration_ns: int
    """From call to return, ns."""
    lock_wait_ns: dict[str, int] | None = None
    """Waiting for locks, by lock (`slots_lock`, `mmu_lock`, `other`), ns; null: not measured."""
    off_cpu_ns: int | None = None
    """The part off the CPU, ns; null: not measured."""
    split: Split | None = None
    """What the ioctl did on the CPU; null: too short to be sampled, or not traced."""


class Fetch(Struct, frozen=True, kw_only=True):
    begin: int
    """Begin of its first ioctl, ns from the window's begin."""
    end: int
    """End of its last ioctl, ns from the window's begin."""
    kernel_ns: int
    """Time inside its ioctls, ns."""
    ioctls: list[FetchIoctl]
    """In order of time."""
    split: Split | None = None
    """What all its ioctls did on the CPU; null: too short to be sampled, or not traced."""


class VcpuShare(Struct, frozen=True, kw_only=True):
    vcpu: int
    """Index of the vCPU."""
    outside_ns: int
    """Time outside KVM_RUN, ns."""
    longest_gap_ns: int
    """The longest uninterrupted time outside KVM_RUN, ns."""
    lock_wait_ns: int | None
    """Time inside KVM_RUN spent waiting for locks, ns; null: not measured."""


class Stretch(Struct, frozen=True, kw_only=True):
    """A span of time in which the guest ran, and the time that its vCPUs lost in it."""

    begin: int
    """When it began, ns from the window's begin."""
    duration_ns: int
    """How long it lasted, ns."""
    vcpus: list[VcpuShare]
    """One row for each vCPU."""


class Logging(Struct, frozen=True, kw_only=True):
    """Dirty logging switched on or off over some slots (KVM_SET_USER_MEMORY_REGION)."""

    on: bool
    """True: switched on; false: switched off."""
    begin: int
    """First ioctl's begin, ns from the window's begin."""
    end: int
    """Last ioctl's end, ns from the window's begin."""
    kernel_ns: int
    """Time inside the ioctls, ns."""
    slots: int
    """Number of slots."""
    in_blackout_ns: int | None
    """The part of `kernel_ns` that lies in the blackout, ns; null: no stop was seen."""


class Rearm(Struct, frozen=True, kw_only=True):
    """Avoidable work: pages that were write-protected again although the vCPUs no longer ran."""

    ns: int
    """Duration, ns."""
    error_ns: int
    """Error of `ns` at 95 % confidence, ns; 0 if `ns` is exact."""
    samples: int | str
    """`exact`, or the number of samples."""
    pages: int
    """Number of pages that were re-armed, dirty or not."""
    ns_per_page: float
    """`ns` divided by `pages`, ns/page."""
    ms_per_gib: float
    """Duration per memory size, ms/GiB."""


class Pass(Struct, frozen=True, kw_only=True):
    """One pre-copy pass: a fetch while the guest runs, and the sends up to the next fetch."""

    begin: int
    """Begin of its fetch, ns from the window's begin."""
    kernel_ns: int
    """Time inside the fetch's ioctls, ns."""
    user_ns: int
    """Time between these ioctls and up to the first send, ns."""
    pages: int | None
    """Number of dirty pages in the ring; null with a bitmap."""
    bytes: int | None
    """Amount sent up to the next fetch, bytes; null: sends were not traced."""
    send_ns: int | None
    """Time inside these send calls, ns; null: sends were not traced."""
    blocked_ns: int | None
    """The part of `send_ns` off the CPU, ns; null: not measured, or nothing was sent."""
    dirty_pages_per_s: int | None
    """`pages`, or else `pages_at_most`, divided by the time since the previous fetch, pages/s; null for the first."""
    pages_at_most: int | None = None
    """Number of whole pages that fit into `bytes`. Zero pages, which are sent as a header only, are not included."""
    user_off_cpu_ns: int | None = None
    """The part of `user_ns` that the fetching thread was off the CPU, ns; null: not measured."""
    split: Split | None = None
    """What the ioctls did on the CPU; null: too short to be sampled, or not traced."""
    brownout: Stretch | None = None
    """Time that the vCPUs lost from this fetch to the next one, or to the stop; null: not measured."""
    baseline: Stretch | None = None
    """A span of the same length before logging was switched on, shorter if tracing began later; null: not measured."""
    tcp_info: dict[str, int] | None = None
    """As `SocketUse.tcp_info`, for all migration sockets together; us, bytes and numbers."""


class FinalFetch(Struct, frozen=True, kw_only=True):
    kernel_ns: int | None
    """Phase fetch.kernel, ns; null: fetches were not traced."""
    user_ns: int | None
    """Phase fetch.user, ns; null: fetches were not traced."""
    pages: int | None
    """Number of ring entries that KVM_RESET_DIRTY_RINGS reset since the previous fetch; null with a bitmap, whose bits
    are not counted."""
    bytes: int | None
    """Memory sent after the stop, bytes; null: sends were not traced."""
    send_ns: int | None
    """Phase memory.send, ns; null: sends were not traced."""
    user_off_cpu_ns: int | None = None
    """The part of `user_ns` that the fetching thread was off the CPU, ns; null: not measured."""
    split: Split | None = None
    """What all its ioctls did on the CPU; null: too short to be sampled, or not traced."""
    rearm: Rearm | None = None
    """Avoidable work in the final fetch; null: none, or unknown."""


class DirtyLog(Struct, frozen=True, kw_only=True):
    mode: DirtyLogMode
    """How dirty pages were logged."""
    slots: list[Slot]
    """The memslots that were fetched and have a known place."""
    passes: list[Pass]
    """The pre-copy passes in order of time."""
    final: FinalFetch | None
    """The fetches after the stop and the sends that they caused; null: none."""
    fetches: list[Fetch]
    """The fetches that began after the last vCPU stopped."""
    logging: list[Logging] = msgspec.field(default_factory=list)
    """Each time that dirty logging was switched on or off."""
