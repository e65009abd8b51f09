# SPDX-License-Identifier: Apache-2.0
"""What a field of an event or of a recording's header means to code that treats all kinds alike.

In: nothing. Out: `Meaning`, put on a field's type with `typing.Annotated`. A field without one is a plain number: a
duration, a count, a size, a pid. Every field that holds text has one (a test compares).
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
    """Tells one machine or one boot from all others."""
    PROCESS = "process"
    """A process's name."""
    THREAD = "thread"
    """A thread's name."""
    TEXT = "text"
    """Text that somebody else wrote."""
    SYMBOL = "symbol"
    """A kernel function."""
    VERSION = "version"
    """A program's name and version, or the version alone."""
    PROBE = "probe"
    """A BPF program, and the kernel function that it is attached to; or a kind of record."""
    TIER = "tier"
    """A way of attaching, or `absent: ` and why."""
    WORD = "word"
    """A word of ours or of the VMM's protocol."""
