# SPDX-License-Identifier: Apache-2.0
"""Literal breakdowns for the report tests: what a QEMU migration looks like, and how migrations end badly.

Every number is written out, so that a test's expected lines can be checked against this page by eye.
"""

from __future__ import annotations

import msgspec

from ebpf_mig import breakdown as b

ORDER = [name for name, _ in b.PHASES]


def phases(aborted: bool = False, **spans: list[b.Span]) -> list[b.Phase]:
    """Every phase in order, with the spans given (`fetch__kernel` for `fetch.kernel`)."""
    given = {name.replace("__", "."): list(value) for name, value in spans.items()}
    assert set(given) <= set(ORDER)
    return [
        b.Phase(
            phase=name,
            side=side,
            spans=given.get(name, []),
            duration_ns=sum(end - begin for begin, end in given.get(name, [])),
        )
        for name, side in b.sides_of(aborted, b.OF_FILES & set(given))
    ]


def precopy() -> b.Breakdown:
    """QEMU over TCP, one vCPU, 43.112 ms of window, nothing lost."""
    return b.Breakdown(
        migration=b.Migration(
            vmm="QEMU",
            vmm_version="10.0.13",
            mode="precopy",
            transport="tcp",
            connections=1,
            result="completed",
            source=b.Endpoint(host="alpha", pid=4242),
            destination=b.Endpoint(host="beta", pid=777),
            total_ns=1_534_200_000,
        ),
        window_ns=43_112_000,
        blackout_ns=42_700_000,
        blackout=(412_000, 43_112_000),
        phases=phases(
            pause=[(0, 412_000)],
            quiesce=[(412_000, 722_000)],
            fetch__kernel=[(722_000, 1_622_000), (1_722_000, 2_022_000)],
            fetch__user=[(1_622_000, 1_722_000), (2_022_000, 2_467_000)],
            memory__send=[(2_467_000, 32_468_000)],
            state__save=[(32_468_000, 34_000_000)],
            state__send=[(34_000_000, 34_112_000)],
            handover=[(34_112_000, 36_112_000)],
            state__load=[(36_112_000, 41_612_000)],
            resume=[(42_112_000, 43_112_000)],
            unattributed=[(41_612_000, 42_112_000)],
        ),
        vcpus=[b.Vcpu(vcpu=0, kick_ns=412_000, stop=412_000, start=43_112_000, blackout_ns=42_700_000)],
        dirty_log=b.DirtyLog(
            mode="manual",
            slots=[
                b.Slot(slot=0, base=0, size_bytes=256 << 20),
                b.Slot(slot=3, base=0xFD000000, size_bytes=16 << 20),
            ],
            passes=[
                b.Pass(
                    begin=-900_000_000 + at * 300_000_000,
                    kernel_ns=900_000,
                    user_ns=250_000,
                    pages=16384,
                    bytes=64 << 20,
                    send_ns=200_000_000,
                    blocked_ns=None,
                    dirty_pages_per_s=43_000,
                )
                for at in range(3)
            ],
            final=b.FinalFetch(kernel_ns=1_200_000, user_ns=545_000, pages=4096, bytes=16_900_000, send_ns=30_001_000),
            fetches=[
                b.Fetch(
                    begin=722_000,
                    end=2_467_000,
                    kernel_ns=1_200_000,
                    ioctls=[
                        b.FetchIoctl(ioctl="KVM_GET_DIRTY_LOG", slot=0, begin=722_000, duration_ns=900_000),
                        b.FetchIoctl(ioctl="KVM_GET_DIRTY_LOG", slot=3, begin=1_722_000, duration_ns=300_000),
                    ],
                )
            ],
        ),
        sockets=[
            b.SocketUse(
                role="source migration",
                bytes=16_901_120,
                calls=257,
                copy_ns=None,
                blocked_ns=None,
                between_ns=1_500_000,
                in_call_ns=28_601_000,
                local="10.0.0.1:40000",
                remote="10.0.0.2:4444",
            )
        ],
        wire=None,
        waits=None,
        witnesses=[
            b.Witness(
                name="qmp.downtime_ms",
                value_ns=44_000_000,
                difference_ns=1_300_000,
                explanation="whole milliseconds; from before the kick until the source is done",
            )
        ],
        completeness=b.Completeness(
            verdict="complete",
            lost={},
            unpaired={"ioctl": 2},
            attach={"dirty_log": "fentry", "vcpu": "tracepoint", "socket": "fentry"},
            observer_ns=21_000,
            reasons=[],
        ),
        clock=b.Clock(),
        notes=[],
    )


def many_vcpus() -> b.Breakdown:
    """The same with six vCPUs that start one after the other, and one that is never seen to start."""
    vcpus = [
        b.Vcpu(
            vcpu=at,
            kick_ns=100_000 + at * 50_000,
            stop=100_000 + at * 50_000,
            start=43_000_000 + at * 20_000,
            blackout_ns=42_900_000 - at * 30_000,
        )
        for at in range(6)
    ]
    vcpus[5] = b.Vcpu(vcpu=5, kick_ns=None, stop=350_000, start=None, blackout_ns=None)
    return msgspec.structs.replace(precopy(), vcpus=vcpus)


def cancelled_early() -> b.Breakdown:
    """Cancelled while the guest ran: there is no window."""
    whole = precopy()
    return msgspec.structs.replace(
        whole,
        migration=msgspec.structs.replace(whole.migration, result="cancelled", total_ns=812_000_000),
        window_ns=None,
        blackout_ns=None,
        blackout=None,
        phases=phases(),
        vcpus=[],
        dirty_log=msgspec.structs.replace(whole.dirty_log, final=None, fetches=[]),
        sockets=[],
        witnesses=[],
    )


def aborted() -> b.Breakdown:
    """Failed after the vCPUs had stopped: they ran again on the source."""
    whole = precopy()
    return msgspec.structs.replace(
        whole,
        migration=msgspec.structs.replace(whole.migration, result="failed", destination=None),
        window_ns=12_412_000,
        blackout_ns=12_000_000,
        blackout=(412_000, 12_412_000),
        phases=phases(
            aborted=True,
            pause=[(0, 412_000)],
            fetch__kernel=[(412_000, 1_412_000)],
            memory__send=[(1_412_000, 9_412_000)],
            unattributed=[(9_412_000, 12_412_000)],
        ),
        dirty_log=msgspec.structs.replace(
            whole.dirty_log,
            passes=whole.dirty_log.passes[:1],
            final=b.FinalFetch(kernel_ns=1_000_000, user_ns=0, pages=None, bytes=8 << 20, send_ns=8_000_000),
            fetches=[
                b.Fetch(
                    begin=412_000,
                    end=1_412_000,
                    kernel_ns=1_000_000,
                    ioctls=[
                        b.FetchIoctl(
                            ioctl="KVM_GET_DIRTY_LOG",
                            slot=0x10002,
                            begin=412_000,
                            duration_ns=1_000_000,
                            lock_wait_ns={"mmu_lock": 200_000, "slots_lock": 50_000},
                        )
                    ],
                )
            ],
        ),
        sockets=[],
        witnesses=[],
        completeness=msgspec.structs.replace(
            whole.completeness,
            verdict="incomplete",
            lost={"socket": 12, "vcpu": 0},
            observer_ns=None,
            reasons=["12 events of the socket probe were lost: the ring buffer was full"],
        ),
        notes=["the destination died 9.412 ms into the window"],
    )
