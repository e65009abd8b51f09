# SPDX-License-Identifier: Apache-2.0
"""The meaning of a field of an event or a header, for code that treats all kinds alike.

In: nothing. Out: `Meaning`, put on a field's type with `typing.Annotated`. A field without a meaning is a plain number:
a duration, a count, a size, a pid. Every text field has a meaning (a test checks this).
"""

from __future__ import annotations

from enum import Enum


class Meaning(Enum):
    """The meaning of a field."""

    INSTANT = "instant"
    """A point in time on the recording's clock, ns."""
    ADDRESS = "address"
    """A network address with its port."""
    HOST = "host"
    """A host's name."""
    MACHINE_ID = "machine-id"
    """Identifies one machine or one boot."""
    PROCESS = "process"
    """A process's name."""
    THREAD = "thread"
    """A thread's name."""
    TEXT = "text"
    """Free text from another party."""
    SYMBOL = "symbol"
    """A kernel function."""
    VERSION = "version"
    """The name and version of a program, or only the version."""
    PROBE = "probe"
    """A BPF program with the kernel function to which it is attached, or a kind of record."""
    TIER = "tier"
    """An attach tier, or `absent: ` and the reason."""
    WORD = "word"
    """A word of ebpf-mig or of the VMM's protocol."""
