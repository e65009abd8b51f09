# SPDX-License-Identifier: Apache-2.0
"""KVM's ioctl numbers by name, as x86-64 and arm64 encode them (include/uapi/linux/kvm.h, Linux 6.12).

A number consists of direction, size, type 0xAE and command number. Struct sizes differ on other architectures, so
`name_of` falls back to matching type and command number only.
"""

from __future__ import annotations

from functools import lru_cache

KVM_TYPE = 0xAE

RUN = 0xAE80
GET_DIRTY_LOG = 0x4010AE42
CLEAR_DIRTY_LOG = 0xC018AEC0
RESET_DIRTY_RINGS = 0xAEC7
SET_USER_MEMORY_REGION = 0x4020AE46
SET_USER_MEMORY_REGION2 = 0x40A0AE49
SET_CLOCK = 0x4030AE7B
GET_CLOCK = 0x8030AE7C
KVMCLOCK_CTRL = 0xAEAD
CREATE_VM = 0xAE01
CREATE_VCPU = 0xAE41

MEM_LOG_DIRTY_PAGES = 1
"""Flag of SET_USER_MEMORY_REGION[2]."""

DIRTY_LOG = frozenset({GET_DIRTY_LOG, CLEAR_DIRTY_LOG, RESET_DIRTY_RINGS})
MEMSLOT = frozenset({SET_USER_MEMORY_REGION, SET_USER_MEMORY_REGION2})

_BY_NUMBER: dict[int, str] = {
    0x01: "CREATE_VM", 0x03: "CHECK_EXTENSION", 0x05: "GET_SUPPORTED_CPUID", 0x41: "CREATE_VCPU",
    0x42: "GET_DIRTY_LOG", 0x46: "SET_USER_MEMORY_REGION", 0x47: "SET_TSS_ADDR",
    0x48: "SET_IDENTITY_MAP_ADDR", 0x49: "SET_USER_MEMORY_REGION2", 0x60: "CREATE_IRQCHIP",
    0x62: "GET_IRQCHIP", 0x63: "SET_IRQCHIP", 0x64: "CREATE_PIT", 0x65: "GET_PIT", 0x66: "SET_PIT",
    0x6A: "SET_GSI_ROUTING", 0x76: "IRQFD", 0x77: "CREATE_PIT2", 0x79: "IOEVENTFD", 0x7B: "SET_CLOCK",
    0x7C: "GET_CLOCK", 0x80: "RUN", 0x81: "GET_REGS", 0x82: "SET_REGS", 0x83: "GET_SREGS",
    0x84: "SET_SREGS", 0x88: "GET_MSRS", 0x89: "SET_MSRS", 0x8C: "GET_FPU", 0x8D: "SET_FPU",
    0x8E: "GET_LAPIC", 0x8F: "SET_LAPIC", 0x90: "SET_CPUID2", 0x91: "GET_CPUID2", 0x92: "TPR_ACCESS_REPORTING",
    0x93: "SET_VAPIC_ADDR",
    0x98: "GET_MP_STATE", 0x99: "SET_MP_STATE", 0x9F: "GET_VCPU_EVENTS", 0xA0: "SET_VCPU_EVENTS",
    0xA1: "GET_DEBUGREGS", 0xA2: "SET_DEBUGREGS", 0xA3: "ENABLE_CAP_OR_TSC_KHZ", 0xA4: "GET_XSAVE",
    0xA5: "SET_XSAVE", 0xA6: "GET_XCRS", 0xA7: "SET_XCRS", 0xAB: "GET_ONE_REG", 0xAC: "SET_ONE_REG",
    0xAD: "KVMCLOCK_CTRL", 0xAE: "ARM_VCPU_INIT", 0xAF: "ARM_PREFERRED_TARGET",
    0xB0: "GET_REG_LIST", 0xB7: "SMI", 0xBE: "GET_NESTED_STATE", 0xBF: "SET_NESTED_STATE",
    0xC0: "CLEAR_DIRTY_LOG", 0xC6: "X86_SET_MSR_FILTER", 0xC7: "RESET_DIRTY_RINGS",
    0xCC: "GET_SREGS2", 0xCD: "SET_SREGS2", 0xCF: "GET_XSAVE2",
    0xE0: "CREATE_DEVICE", 0xE1: "SET_DEVICE_ATTR", 0xE2: "GET_DEVICE_ATTR",
    0xE3: "HAS_DEVICE_ATTR",
}  # fmt: skip

SET_TSC_KHZ = 0xAEA2
GET_TSC_KHZ = 0xAEA3
ENABLE_CAP = 0x4068AEA3
GET_PIT2 = 0x8070AE9F
SET_PIT2 = 0x4070AEA0

_SHARED: dict[int, str] = {
    SET_TSC_KHZ: "SET_TSC_KHZ",
    GET_TSC_KHZ: "GET_TSC_KHZ",
    ENABLE_CAP: "ENABLE_CAP",
    GET_PIT2: "GET_PIT2",
    SET_PIT2: "SET_PIT2",
}
"""Command numbers that two ioctls share; direction and size distinguish them."""


def number(cmd: int) -> int:
    """The KVM command number within type 0xAE."""
    return cmd & 0xFF


@lru_cache(maxsize=1024)
def name_of(cmd: int) -> str:
    """The kernel's name of a KVM ioctl, without `KVM_`; `0x...` if unknown."""
    if cmd in _SHARED:
        return _SHARED[cmd]
    if (cmd >> 8) & 0xFF != KVM_TYPE:
        return hex(cmd)
    return _BY_NUMBER.get(number(cmd), hex(cmd))


_DIRTY_LOG_NAMES = frozenset(map(name_of, DIRTY_LOG))
_MEMSLOT_NAMES = frozenset(map(name_of, MEMSLOT))


@lru_cache(maxsize=1024)
def is_dirty_log(cmd: int) -> bool:
    """Whether an ioctl fetches or clears the dirty log."""
    return name_of(cmd) in _DIRTY_LOG_NAMES


@lru_cache(maxsize=1024)
def is_memslot(cmd: int) -> bool:
    """Whether an ioctl sets a memslot."""
    return name_of(cmd) in _MEMSLOT_NAMES


VCPU_STATE_GET = frozenset({
    "GET_REGS", "GET_SREGS", "GET_SREGS2", "GET_MP_STATE", "GET_VCPU_EVENTS", "GET_LAPIC", "GET_XSAVE",
    "GET_XSAVE2", "GET_XCRS", "GET_FPU", "GET_DEBUGREGS", "GET_NESTED_STATE", "GET_ONE_REG", "GET_CPUID2",
})  # fmt: skip
"""Reading these on a stopped VM means that the VMM saves vCPU state."""

VCPU_STATE_SET = frozenset({
    "SET_REGS", "SET_SREGS", "SET_SREGS2", "SET_MP_STATE", "SET_VCPU_EVENTS", "SET_LAPIC", "SET_XSAVE",
    "SET_XCRS", "SET_FPU", "SET_DEBUGREGS", "SET_NESTED_STATE", "SET_ONE_REG", "SET_MSRS",
})  # fmt: skip
"""Writing these means that the VMM loads vCPU state."""
